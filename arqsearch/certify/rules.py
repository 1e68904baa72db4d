"""The rules by which counts become a radius, one protocol: certify an image, and re-check a line from its counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arqsearch.certify.job import ImageJob
from arqsearch.certify.line import FIXED, INCREMENTAL, SEQUENTIAL, CertificateLine
from arqsearch.certify.rule_fixed import FixedRule
from arqsearch.certify.rule_incremental import IncrementalRule
from arqsearch.certify.rule_sequential import SequentialRule
from arqsearch.certify.smoothing import Classifier, SmoothingSettings
from arqsearch.errors import ArqError, nearest

if TYPE_CHECKING:
    from arqsearch.certify.base import BaseNetwork


class Rule(Protocol):
    """How one image is certified."""

    name: str

    def certify(self, job: ImageJob) -> CertificateLine:
        """Take samples and make the image's line."""
        ...

    def stated(self, settings: SmoothingSettings) -> dict[str, Any]:
        """What every line made with these settings has in its :attr:`CertificateLine.settings` because of this rule."""
        ...

    @staticmethod
    def problems(line: CertificateLine) -> list[str]:
        """What a line's own counts contradict."""
        ...


#: Every rule by its name.
RULES: dict[str, type[Rule]] = {
    FIXED: FixedRule, SEQUENTIAL: SequentialRule, INCREMENTAL: IncrementalRule,
}  # fmt: skip


def make_rule(settings: SmoothingSettings, base: BaseNetwork | None = None) -> Rule:
    """The rule that the settings name.

    :param base: the network whose votes ``incremental`` starts from.
    :raises ArqError: when ``incremental`` has no base, or another rule has one.
    """
    if settings.rule == INCREMENTAL:
        if base is None:
            raise ArqError(
                "The rule 'incremental' starts from another network's certificates: name their file (--base CERT)."
            )
        return IncrementalRule(base)
    if base is not None:
        raise ArqError(f"The rule {settings.rule!r} takes no base network; choose the rule 'incremental'.")
    return FixedRule() if settings.rule == FIXED else SequentialRule()


def certify_image(
    classify: Classifier,
    image: NDArray[np.uint8],
    image_id: int,
    label: int | None,
    settings: SmoothingSettings,
    *,
    program: str,
    data: str,
) -> CertificateLine:
    """Certify one image by the ``fixed`` or the ``sequential`` rule, which need no other network.

    :param image: uint8 ``(H, W, C)``, grey levels.
    :param image_id: its id in the data set.
    :param label: its true class, None when unknown.
    :param program: hash of what ``classify`` runs.
    :param data: identity of the data set.
    :raises ArqError: for another rule.
    """
    job = ImageJob(classify, image, image_id, label, settings, program, data)
    return make_rule(settings).certify(job)


def problems(line: CertificateLine) -> list[str]:
    """What a line's own counts contradict, without running the network."""
    if line.rule not in RULES:
        return [f"rule {line.rule!r} is unknown. {nearest(line.rule, RULES)}"]
    parts = {SEQUENTIAL: line.sequential, INCREMENTAL: line.incremental}
    found = [f"rule {line.rule!r} has no part {name!r}" for name, part in parts.items()
             if part is not None and name != line.rule]  # fmt: skip
    if line.rule in parts and parts[line.rule] is None:
        return [*found, f"the part {line.rule!r} is missing"]
    if line.two_class is not None and line.rule != FIXED:
        found.append(f"rule {line.rule!r} has no two-class radius")
    return found + RULES[line.rule].problems(line)
