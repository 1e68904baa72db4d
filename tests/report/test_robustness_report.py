"""The section on verdicts at ε: there when something was verified, with its examples, and absent otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from arqsearch.report import ReportContent, write_report
from arqsearch.report.content import Broken

ROWS = [
    {"network": "found", "epsilon": e, "images": 50, "robust": 40 - e, "certified_accuracy": (40 - e) / 50,
     "low": 0.5, "high": 0.9} for e in (1, 4)
]  # fmt: skip


def test_verdicts_and_examples_are_shown(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    broken = [Broken(f"image {i}, ε = 4:\n1 becomes 7", image, image + np.uint8(i + 1)) for i in range(4)]
    content = ReportContent("Verdicts", robustness=pd.DataFrame(ROWS), broken=broken)
    page = write_report(tmp_path, content).read_text()
    assert 'id="robustness"' in page and "image 0, ε = 4" in page and "verify-robustness" in page
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"robustness", "broken"}
    assert (tmp_path / "report" / "robustness.csv").read_text().startswith("network,epsilon,images,robust")
    assert "Robustness to bounded changes" in (tmp_path / "report.md").read_text()
    page = write_report(tmp_path, dataclasses.replace(content, robustness=pd.DataFrame(), broken=())).read_text()
    assert 'id="robustness"' not in page
    assert not list((tmp_path / "report").glob("*.png")) + list((tmp_path / "report").glob("robustness.csv"))
