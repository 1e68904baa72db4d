"""Measurements against peers and papers, and the comparison of policies."""
