"""Which backend runs a program, and the checks that every backend makes of its pixels."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from arqsearch.errors import ArqError, nearest

if TYPE_CHECKING:
    from arqsearch.integer.program import IntegerProgram

#: Names for ``backend``; "auto" is the native engine on a CPU where it is built, else the torch backend.
BACKENDS = ("auto", "torch", "native")
#: Environment variable that says what "auto" means.
VARIABLE = "ARQSEARCH_BACKEND"


class Backend(Protocol):
    """Runs one program exactly."""

    def run(self, pixels: Any) -> Tensor:
        """Return logits as int32 ``(N, classes)`` for integer pixels ``(N, H, W, C)``."""
        ...


def backend_of(program: IntegerProgram, device: str, backend: str, kept: dict[str, Backend | ArqError]) -> Backend:
    """What runs a program; compiled once for each device.

    A program beyond a limit of the native engine runs on torch, with a warning, unless "native" was asked for.

    :param device: torch device.
    :param backend: one of `BACKENDS`.
    :param kept: what was compiled before; is added to.
    :raises ArqError: as :func:`choose_backend`, and when the program cannot be compiled.
    """
    kind, strict = choose_backend(device, backend)
    if kind == "native":
        if kind not in kept:
            from arqsearch.integer.native.engine import NativeBackend

            try:
                kept[kind] = NativeBackend(program)
            except ArqError as error:
                kept[kind] = error
        found = kept[kind]
        if not isinstance(found, ArqError):
            return found
        if strict:
            raise ArqError(str(found))
    if device not in kept:
        from arqsearch.integer.backend_torch import TorchBackend

        kept[device] = TorchBackend(program, device=device)
        if kind == "native":
            _warn_once(f"the native engine refuses this program ({found})", depth=5)
    on_torch = kept[device]
    assert not isinstance(on_torch, ArqError)
    return on_torch


def choose_backend(device: str, backend: str) -> tuple[Literal["torch", "native"], bool]:
    """Resolve a name and the environment to the backend that should run.

    :param device: torch device; the native engine runs on "cpu".
    :param backend: one of `BACKENDS`; "auto" asks ``$ARQSEARCH_BACKEND``, then takes the fastest.
    :returns: the backend, and whether it was asked for by name.
    :raises ArqError: for an unknown name, and for "native" where it cannot run.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(VARIABLE):
        source, backend = VARIABLE, os.environ[VARIABLE]
    if backend not in BACKENDS:
        raise ArqError(f"{source} = {backend!r} is unknown. {nearest(backend, BACKENDS)}")
    if backend == "torch":
        return "torch", True
    if torch.device(device).type != "cpu":
        # A variable set for all programs does not forbid to run one on another device.
        if backend == "native" and source != VARIABLE:
            raise ArqError(f"backend = 'native' runs on device 'cpu', not on {device!r}; choose backend='torch'.")
        return "torch", False
    from arqsearch.integer.native.engine import native_problem

    problem = native_problem()
    if problem is None:
        return "native", backend == "native"
    if backend == "native":
        raise ArqError(f"{source} = 'native', but {problem}. {_FIX}")
    _warn_once(f"{problem}. {_FIX}", depth=6)
    return "torch", False


_FIX = "Install a C compiler and install arqsearch again, or choose the torch backend: ARQSEARCH_BACKEND=torch."


@cache
def _warn_once(reason: str, depth: int) -> None:
    """Warn about the caller of `IntegerProgram.run`, `depth` calls up."""
    warnings.warn(f"Integer programs run on torch, which is slower: {reason}", RuntimeWarning, stacklevel=depth)


def check_pixels(program: IntegerProgram, pixels: Any) -> Tensor:
    """Images as an integer tensor that this program may run on.

    :param pixels: integer tensor or array ``(N, H, W, C)``; copied only where torch cannot view it.
    :returns: the same numbers as a tensor, on whatever device they were.
    :raises ArqError: when type, shape or range do not fit.
    """
    if not isinstance(pixels, Tensor):
        array = np.asarray(pixels)
        # torch has no negative strides: a reversed view is copied.
        pixels = torch.from_numpy(array if min(array.strides, default=0) >= 0 else array.copy())
    x: Tensor = pixels
    spec = program.input
    if x.is_floating_point() or x.ndim != 4 or tuple(x.shape[1:]) != spec.shape:
        raise ArqError(
            f"This program takes integer pixels of shape (N, {', '.join(map(str, spec.shape))}); "
            f"got {x.dtype} {tuple(x.shape)}. Pass the uint8 or int16 image as NHWC."
        )
    if len(x) and (int(x.min()) < spec.lo or int(x.max()) > spec.hi):
        raise ArqError(
            f"Pixels span {int(x.min())}..{int(x.max())}, the proofs cover {spec.lo}..{spec.hi}; "
            "lower the network again for this noise level."
        )
    return x
