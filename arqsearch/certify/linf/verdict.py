"""What complete verification says about one image, and how much work it may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from numpy import uint8
from numpy.typing import NDArray

#: robust: proven for every integer image in the box. non-robust: an image in the box has another class.
#: misclassified: the image itself has another class. unknown: a limit was hit first.
Status: TypeAlias = Literal["robust", "non-robust", "misclassified", "unknown"]

#: What decided, or what was tried last: running the image itself, interval bounds, linear bounds, splitting with
#: bounds, integer programming, a search for counter-examples.
Method: TypeAlias = Literal["run", "boxes", "linear", "branch-and-bound", "milp", "attack"]

STATUSES: tuple[Status, ...] = get_args(Status)
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Limits:
    """Work allowed for one image at one ε; None stands for no limit.

    :param seconds: wall clock. A verdict that this limit cuts off is "unknown" and depends on the machine.
    :param domains: domains bounded; cuts off at the same place on every machine.
    :param milp: hand what stays open to integer programming.
    """

    seconds: float | None = 20.0
    domains: int | None = None
    milp: bool = True


@dataclass(frozen=True)
class Verdict:
    """Outcome for one image at one ε.

    :param status: see `Status`.
    :param method: see `Method`.
    :param counterexample: for "non-robust": uint8 ``(H, W, C)`` within ε whose class, by the integer program, is not
        the label.
    :param domains: domains bounded.
    :param limit: for "unknown": the limit that was hit, such as "20 s" or "1000 domains".
    :param seconds: wall clock spent.
    """

    status: Status
    method: Method
    counterexample: NDArray[uint8] | None = None
    domains: int = 0
    limit: str | None = None
    seconds: float = 0.0
