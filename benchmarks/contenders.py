"""What is timed: one small protocol, our integer engine, and PyTorch in two forms."""

from __future__ import annotations

import copy
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arqsearch.benchmarks.environment import peers_isa
from arqsearch.benchmarks.networks import FIRST_LAST, MIXED, UNIFORM, Network
from arqsearch.errors import ArqError, nearest
from arqsearch.integer.backend_torch import TorchBackend
from arqsearch.integer.lowering import lower
from arqsearch.integer.native import engine
from arqsearch.integer.program import IntegerProgram

#: Timed calls of each candidate form of the best float network.
CHOOSING_CALLS = 2


class Contender(ABC):
    """Runs one network on one batch; made fresh for each network."""

    #: Key in tables and files.
    name: str
    #: Precision, in words.
    bits: str
    #: Instruction set that it used.
    isa: str
    #: How it ran, in words.
    note: str = ""
    #: What ours runs, whose logits are checked; a peer has none.
    program: IntegerProgram | None = None

    def available(self) -> str | None:
        """Return why it cannot run here; None where it can."""
        return None

    @abstractmethod
    def prepare(self, network: Network) -> None:
        """Compile, and lay the batch out as it likes best; not timed."""

    @abstractmethod
    def run(self) -> np.ndarray:
        """Return logits ``(N, K)`` for the batch; this is timed."""


# ---- ours ------------------------------------------------------------------------------------


def engine_name() -> str:
    """``native`` where the compiled engine is built, else ``torch``."""
    return "native" if engine.native_available() else "torch"


def require_isa(isa: str) -> None:
    """Refuse an instruction set before anything is prepared.

    :raises ArqError: when the native engine is built, but not for it, or the processor lacks it.
    """
    known = ("auto", *engine.native_isas())
    if engine.native_available() and isa not in known:
        raise ArqError(f"This build and processor do not run --isa {isa}. {nearest(isa, known)}")


def integer_engine(program: IntegerProgram, isa: str) -> tuple[Callable[[np.ndarray], Tensor], str]:
    """The fastest way to run a program on one thread: the native engine, the torch backend where it is not built.

    :param isa: instruction set for the native engine.
    :returns: a function from int16 pixels ``(N, H, W, C)`` to int32 logits, and the instruction set that it uses.
    :raises ArqError: when the processor does not have that instruction set.
    """
    if not engine.native_available():
        return TorchBackend(program).run, peers_isa(isa)
    backend = engine.NativeBackend(program, isa=isa, threads=1)
    return backend.run, backend.isa


class IntegerNetwork(Contender):
    """Our integer program at one configuration, from int16 pixels: input quantization is part of it.

    :param configuration: of :data:`arqsearch.benchmarks.networks.CONFIGURATIONS`.
    :param isa: instruction set.
    """

    def __init__(self, configuration: str, isa: str = "auto") -> None:
        self.configuration = configuration
        self.name = f"arqsearch_{configuration}"
        ends = "W{}A{}".format(*FIRST_LAST)
        cycle = ", ".join(f"W{weight}A{activation}" for weight, activation in MIXED)
        self.bits = configuration.upper() if configuration in UNIFORM else f"mixed: {cycle} in turn"
        if UNIFORM.get(configuration) != FIRST_LAST:
            self.bits += f"; first and last {ends}"
        self.isa = isa

    def prepare(self, network: Network) -> None:
        net = network.quantized
        net.set_bitwidths(network.bitwidths(self.configuration))
        self.program = lower(net, noise_limit=network.table.hi)
        self._run, self.isa = integer_engine(self.program, self.isa)
        kind = "power-of-two" if network.multiplier == "pow2" else f"{network.multiplier}-bit"
        self.note = f"{engine_name()} engine, {kind} multipliers"
        self._pixels = network.pixels

    def run(self) -> np.ndarray:
        return np.asarray(self._run(self._pixels).numpy())


# ---- PyTorch ---------------------------------------------------------------------------------


class Normalize(nn.Module):
    """The first layer of published smoothing code: (x − mean) / std of [0,1] pixels.

    :param mean: for each channel.
    :param std: for each channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same shape."""
        result: Tensor = (x - self.get_buffer("mean")) / self.get_buffer("std")
        return result


class TorchEager(Contender):
    """PyTorch as published smoothing code runs it: eager, batch norm not folded, NCHW, normalisation as a layer."""

    name, bits, note = "torch_eager", "fp32", "batch norm not folded, NCHW, normalisation included"

    def __init__(self, isa: str = "auto") -> None:
        self.isa = peers_isa(isa)

    def prepare(self, network: Network) -> None:
        mean, std = network.normalization.mean, network.normalization.std
        self._model = nn.Sequential(Normalize(mean, std), network.model).eval()
        self._batch = network.scaled()

    @torch.no_grad()
    def run(self) -> np.ndarray:
        return np.asarray(self._model(self._batch).numpy())


class TorchBest(Contender):
    """PyTorch at its best: batch norm folded, the faster memory format, eager or frozen, whichever is fastest here."""

    name, bits = "torch_best", "fp32"

    def __init__(self, isa: str = "auto") -> None:
        self.isa = peers_isa(isa)

    @torch.no_grad()
    def prepare(self, network: Network) -> None:
        nchw = network.normalized()
        folded = fold_batch_norm(network.model)
        forms: dict[str, tuple[Any, Tensor]] = {}
        for name, layout in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
            # Memory formats are constants that torch's annotations do not know as such.
            model = copy.deepcopy(folded).to(memory_format=layout)  # type: ignore[call-overload]
            batch = nchw.contiguous(memory_format=layout)
            forms[f"{name}, eager"] = model, batch
            forms[f"{name}, frozen"] = freeze(model, batch), batch
        seconds = {name: _seconds(model, batch) for name, (model, batch) in forms.items()}
        chosen = min(seconds, key=lambda name: seconds[name])
        self._model, self._batch = forms[chosen]
        self.note = f"batch norm folded, {chosen}; normalisation not timed"

    @torch.no_grad()
    def run(self) -> np.ndarray:
        return np.asarray(self._model(self._batch).numpy())


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of the model in evaluation mode whose batch norms lie in the layers before them."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model.eval())


def freeze(model: nn.Module, batch: Tensor) -> Any:
    """The model traced, frozen and optimised for inference by TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), batch, check_trace=False)  # type: ignore[no-untyped-call]
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced))


def _seconds(model: Any, batch: Tensor) -> float:
    """Shortest time of a few calls, after one that warms up."""
    times = []
    for _ in range(1 + CHOOSING_CALLS):
        start = time.perf_counter()
        model(batch)
        times.append(time.perf_counter() - start)
    return min(times[1:])
