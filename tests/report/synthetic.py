"""A made-up run, the size of a ResNet-20, for the report's tests."""

from __future__ import annotations

import numpy as np
import pandas as pd

from arqsearch.report import ReportContent

LAYERS = ["conv1", *(f"layer{g}.{b}.conv{c}" for g in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)), "linear"]
RADII = (0.0, 0.25, 0.5, 0.75)


def bitwidths() -> pd.DataFrame:
    """Uniform 4/4, random, and found bits for every layer."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"layer": LAYERS})
    frame["macs"] = [442_368, *[2_359_296] * 18, 640]
    frame["weights"] = [432, *[2304] * 6, 4608, *[9216] * 5, 18_432, *[36_864] * 5, 640]
    for name in ("uniform", "random", "found"):
        for kind in ("weight", "activation"):
            bits = np.full(len(LAYERS), 4) if name == "uniform" else rng.integers(2, 9, len(LAYERS))
            bits[[0, -1]] = 8
            frame[f"{name}.{kind}"] = bits
    return frame


def comparison() -> pd.DataFrame:
    """Float, uniform, random and found networks."""
    rows = []
    for name, shift in (("FP32", 0.03), ("uniform", 0.0), ("random", -0.05), ("found (ddpg)", 0.02)):
        row: dict[str, object] = {
            "name": name,
            "kind": "estimate" if name == "FP32" else "certified",
            "clean_accuracy": 0.75 + shift,
            "n": 10_000,
            "images": 100,
            "acr": 0.41296 + shift,
            "acr_low": 0.36 + shift,
            "acr_high": 0.47 + shift,
            "bops": 41_520_000_000 if name == "FP32" else 671_000_000,
            "bops_percent": 100.0 if name == "FP32" else 1.614,
            "weight_bytes": 1_080_000 if name == "FP32" else 141_003,
        }
        for radius, base in zip(RADII, (0.70, 0.58, 0.45, 0.29), strict=True):
            row[f"certified@{radius:g}"] = round(base + shift, 2)
            row[f"certified@{radius:g}_low"] = base + shift - 0.09
            row[f"certified@{radius:g}_high"] = base + shift + 0.08
        if name != "FP32":
            row["ibp@1"] = 0.31 + shift
        rows.append(row)
    return pd.DataFrame(rows)


def curves() -> pd.DataFrame:
    """Certified accuracy on a grid of radii."""
    radius = np.linspace(0, 0.95, 96)
    parts = []
    for name, shift in (("FP32", 0.03), ("uniform", 0.0), ("random", -0.05), ("found (ddpg)", 0.02)):
        accuracy = np.maximum(0, np.round((0.70 + shift) * (1 - (radius / 0.95) ** 1.6), 2))
        parts.append(pd.DataFrame({"network": name, "radius": radius, "accuracy": accuracy}))
    return pd.concat(parts, ignore_index=True)


def history(evaluations: int = 60) -> pd.DataFrame:
    """Three policies with the same number of evaluations, the agent improving."""
    rng = np.random.default_rng(2)
    parts = []
    for policy, drift in (("ddpg", 0.05), ("random", 0.0), ("uniform", 0.0)):
        count = 1 if policy == "uniform" else evaluations
        radius = 0.30 + drift * np.linspace(0, 1, count) + rng.normal(0, 0.012, count)
        bounds = 0.25 + 2 * drift * np.linspace(0, 1, count) + rng.normal(0, 0.03, count)
        reward = radius - 0.35 + bounds - 0.33
        part = pd.DataFrame({"policy": policy, "evaluation": np.arange(1, count + 1), "reward": reward})
        part["best_so_far"] = part["reward"].cummax()
        part["smoothed_radius"], part["ibp@1"] = radius, bounds
        part["bops"] = 671_000_000
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def content(**changes: object) -> ReportContent:
    """The whole made-up run, with some fields changed."""
    fields: dict[str, object] = {
        "title": "ResNet-20 on CIFAR-10 (JPEG copy), σ = 0.25, BOPs ≤ 1.62 %",
        "summary": {
            "Data set": "CIFAR-10 (JPEG copy), first 100 test images",
            "Model": "resnet20, noise-trained base",
            "Noise": "σ = 0.25 in units of [0,1] pixels",
            "Budget": "BOPs ≤ 1.62 % of FP32",
            "Evaluations": "60 per policy",
            "Program hash": "3f0c" * 16,
        },
        "bitwidths": bitwidths(),
        "comparison": comparison(),
        "curves": curves(),
        "history": history(),
        "terms": pd.DataFrame(
            {
                "term": ["smoothed_radius", "ibp@1"],
                "configurations": [20, 20],
                "min": [0.21, 0.12],
                "mean": [0.29, 0.24],
                "max": [0.33, 0.31],
                "std": [0.031, 0.052],
                "w8a8": [0.35, 0.33],
                "weight": [1.0, 1.0],
            }
        ),
        "guarantee": (
            "With probability at least 99.9 % per image, over the sampled noise, the smoothed integer network keeps "
            "its class for every image closer than the stated radius. The integer program in the export is the one "
            "that was certified, identified by its hash.\n\n"
            "Not guaranteed: the prediction of a single noise-free run, images that were not tested, and the "
            "floating-point network."
        ),
        "notes": ["Numbers on the JPEG copy are not comparable with those on the original images."],
        "provenance": {"Data identity (SHA-256)": "9b1e" * 16, "Noise seed (estimate)": 7},
    }
    fields.update(changes)
    return ReportContent(**fields)  # type: ignore[arg-type]
