"""Scoring candidates, remembering what was tried, and the run from recipe to report."""
