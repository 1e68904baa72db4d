"""Certificate files that are no compared network's own: verified with the program and the data that are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arqsearch import data as datasets
from arqsearch.certify.certificate import read_lines
from arqsearch.certify.linf.robustness_file import is_robustness_file
from arqsearch.certify.smoothing import program_classifier
from arqsearch.certify.verify import verify_file
from arqsearch.errors import ArqError
from arqsearch.recipe import Certify, Recipe
from arqsearch.search.certification import find_program
from arqsearch.search.checks import verifying_base
from arqsearch.search.robustness import check_robustness_file, described, find_robust_program
from arqsearch.search.workspace import Workspace


@dataclass(frozen=True)
class Behind:
    """What a certificate file outside a run is checked against.

    :param program: integer program.
    :param data: name or path of the data set.
    :param data_path: folder or file of that data set.
    :param image_size: size that its images are scaled to.
    :param base: certificate file of the base network (``incremental``).
    :param base_program: its program.
    """

    program: Path | None = None
    data: str | None = None
    data_path: str | None = None
    image_size: int | None = None
    base: str | None = None
    base_program: str | None = None


def verify_certificate(path: Path, behind: Behind, images: int, run: Recipe | None = None) -> dict[str, Any]:
    """Recompute a certificate file that is no compared network's own.

    :param images: lines to recompute, chosen at random; 0 = all.
    :param run: recipe of the run that the file belongs to, where it does: its data and its programs are taken.
    :returns: as :func:`arqsearch.search.delivery.verify`.
    :raises ArqError: listing every difference, or what is missing.
    """
    folder = None if run is None else run.run_dir
    robustness = is_robustness_file(path)
    find = find_robust_program if robustness else find_program
    program = find(path, None if behind.program is None else str(behind.program), folder)
    if program is None:
        raise ArqError(f"Which program is {path} about? Name it: --program FILE.")
    if behind.data is not None:
        test = datasets.load(behind.data, "test", path=behind.data_path, image_size=behind.image_size)
    elif run is not None:
        test = Workspace(run).test_set
    else:
        raise ArqError(f"Which data set was certified in {path}? Name it: --data NAME, such as --data digits.")
    if robustness:
        found = check_robustness_file(path, program, test, images)
        row = {"check": "robustness", "network": program.hash[:12], "items": found.lines, "result": described(found)}
        return {"verified": True, "checks": [row]}
    section = Certify(base=behind.base, base_program=behind.base_program)
    base = verifying_base(path, section, program, test, images, folder)
    lines = read_lines(path)
    classify = program_classifier(program, lines[0].sigma if lines else 0.25)
    checked = verify_file(
        path, classify, test, program.hash, sample=images or None, classes=program.num_classes, base=base
    )
    result = f"lines hold, {len(checked.recomputed)} recomputed with equal counts and radius"
    row = {"check": "certificates", "network": program.hash[:12], "items": checked.lines, "result": result}
    return {"verified": True, "checks": [row]}
