"""Smoothing and interval certificates of integer programs."""
