"""What a report says of a run's robustness files."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from arqsearch.certify.linf.robustness import counted
from arqsearch.certify.linf.robustness_file import read_lines
from arqsearch.certify.linf.robustness_line import RobustnessLine, unpack_image
from arqsearch.report.content import Broken
from arqsearch.search.results import display_name
from arqsearch.search.robustness import robustness_path
from arqsearch.search.workspace import Workspace

#: Counter-examples for each network.
EXAMPLES = 3


def accuracy(space: Workspace, names: Sequence[str]) -> pd.DataFrame:
    """Verdicts by network and ε: counts, certified accuracy and its interval; empty where nothing was verified."""
    rows = []
    for name in names:
        lines = _lines(space, name)
        for row in counted(lines, sorted({line.epsilon for line in lines})):
            row["certified_accuracy"] = row.pop("certified accuracy")
            rows.append({"network": display_name(space, name)} | row)
    return pd.DataFrame(rows)


def examples(space: Workspace, names: Sequence[str]) -> list[Broken]:
    """A few counter-examples of each network: those of the smallest ε, in the order of the data set."""
    found = []
    for name in names:
        broken = [line for line in _lines(space, name) if line.counterexample is not None]
        rank = {int(image): position for position, image in enumerate(space.test_set.ids)} if broken else {}
        shown: dict[int, RobustnessLine] = {}
        for line in sorted(broken, key=lambda line: (line.epsilon, line.image)):
            if line.image in rank:
                shown.setdefault(line.image, line)
        for line in list(shown.values())[:EXAMPLES]:
            assert line.counterexample is not None
            caption = f"image {line.image}, ε = {line.epsilon}:\n{line.label} becomes {line.counterexample.predicted}"
            image = space.test_set.images[rank[line.image]]
            found.append(Broken(caption, image, unpack_image(line.counterexample)))
    return found


def _lines(space: Workspace, name: str) -> list[RobustnessLine]:
    path = robustness_path(space, name)
    return read_lines(path) if path.is_file() else []
