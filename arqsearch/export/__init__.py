"""Exports of an integer program to other runtimes."""
