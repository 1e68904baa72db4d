"""Write noise_vectors.json from the reference in plain Python: `python tests/certify/make_noise_vectors.py`."""

from __future__ import annotations

import json
from pathlib import Path

from noise_reference import uniform, value

CASES = [
    ("0.25", 0, 0, 0, 0),
    ("0.25", 0, 1, 0, 0),
    ("0.25", 0, 2, 0, 0),
    ("0.12", 0x0123456789ABCDEF, 2, 9999, 99999),
    ("0.5", 2**64 - 1, 1, 2**32 - 1, 2**32 - 1),
    ("1.0", 42, 2, 7, 123456),
    ("0.002", 42, 2, 7, 1),
]


def main() -> None:
    """Draw 18 coordinates (four blocks and a half) of each case."""
    cases = [
        {
            "sigma": sigma,
            "seed": seed,
            "stage": stage,
            "image": image,
            "sample": sample,
            "values": [value(uniform(seed, stage, image, sample, index), sigma) for index in range(18)],
        }
        for sigma, seed, stage, image, sample in CASES
    ]
    body = ",\n  ".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("noise_vectors.json").write_text(f"[\n  {body}\n]\n")


if __name__ == "__main__":
    main()
