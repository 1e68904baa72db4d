"""L∞ robustness of integer programs: boxes, linear bounds, attacks, complete verification."""
