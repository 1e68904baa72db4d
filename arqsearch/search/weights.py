"""State of a quantized network as safetensors, and the hash that names trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arqsearch.errors import ArqError
from arqsearch.quantize.network import QuantizedNet


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}{value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def save_state(net: QuantizedNet, path: Path) -> None:
    """Write a network's parameters, statistics and step sizes; replaces the file in one move."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, str(partial))
    partial.replace(path)


def load_state(net: QuantizedNet, path: Path) -> None:
    """Read what :func:`save_state` wrote.

    :raises ArqError: when the file is missing or belongs to another network.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArqError(f"No network at {path}; run the earlier steps first (`arqsearch run RECIPE` runs all).")
    state = load_file(str(path))
    expected = set(net.state_dict())
    if set(state) != expected:
        different = sorted(set(state) ^ expected)
        raise ArqError(
            f"{path} belongs to another network: {', '.join(different[:3])} do not match. Use its own run folder."
        )
    net.load_state_dict(state)
