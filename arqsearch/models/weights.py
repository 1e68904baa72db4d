"""Weight files: safetensors, and ``.pt`` files without code; files with folded 8-bit layers become ordinary weights."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from arqsearch.errors import ArqError, nearest

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".tar")
#: Keys under which training scripts keep the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"
SHOWN = 4


@runtime_checkable
class FoldedLayers(Protocol):
    """A network that knows the names used by weight files whose batch norm is folded."""

    def folded_layers(self) -> dict[str, tuple[str, str | None]]:
        """File name of each layer, with the paths of layer and batch norm in the network."""
        ...


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights in place; every tensor must be there, with its shape.

    Accepts ``{"state_dict": ...}`` and keys that begin with ``module.``; converts float16 to the model's type, and
    int8 weights with ``weight_scale`` to ordinary ones whose batch norm does nothing (in evaluation mode).

    :param model: the network.
    :param path: ``.safetensors``, or a torch file (read with ``weights_only=True``).
    :raises ArqError: when the file is missing or unreadable, or keys or shapes differ.
    """
    file = Path(path).expanduser()
    tensors = _unwrap(_read(file), file)
    if any(key.endswith(".weight_scale") for key in tensors):
        tensors = _unfold(model, tensors, file)
    wanted = {key: value for key, value in model.state_dict().items() if not key.endswith(COUNTER)}
    given = {key: value for key, value in tensors.items() if not key.endswith(COUNTER)}
    problems = _differences(wanted, given)
    if problems:
        raise ArqError(
            f"{file} does not fit {type(model).__name__}: {'; '.join(problems)}. Check model.name and options."
        )
    model.load_state_dict(given, strict=False)


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and statistics as safetensors, in the model's own keys.

    :param path: of the file; its folder is made.
    :param metadata: strings kept in the file's header.
    """
    from safetensors.torch import save_file

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.endswith(COUNTER)
    }
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})


def _read(file: Path) -> object:
    if not file.is_file():
        raise ArqError(f"No weights at {file}; correct model.weights.")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ArqError(f"{file} cannot be read as safetensors ({error}); fetch it again.") from error
    if file.suffix not in TORCH_SUFFIXES:
        raise ArqError(f"{file} has an unknown ending; use .safetensors or one of {', '.join(TORCH_SUFFIXES)}.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArqError(
            f"{file} holds more than tensors (a pickled model or code), which is never run. Save its state_dict() and "
            "use that file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ArqError(f"{file} cannot be read as a torch file ({error}); it may be truncated.") from error


def _unwrap(content: object, file: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ArqError(f"{file} holds no dictionary of tensors; save the network's state_dict().")
    tensors: dict[str, Tensor] = {str(key): value for key, value in content.items()}
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _unfold(model: nn.Module, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Float weights from int8 ones, and a batch norm that only adds the bias, for each folded layer."""
    if not isinstance(model, FoldedLayers):
        raise ArqError(
            f"{file} holds int8 weights with folded batch norm, which {type(model).__name__} cannot take; such files "
            "fit mobilenet_v2."
        )
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for source, (layer, batch_norm) in model.folded_layers().items():
        parts = ("weight", "bias", "weight_scale", "weight_zero_point")
        keys = [f"{source}.{part}" for part in parts]
        absent = [key for key in keys[:3] if key not in tensors]
        if absent:
            raise ArqError(f"{file} lacks {absent[0]!r}. {nearest(absent[0], tensors)}")
        used.update(keys)
        weight, bias, scale = (tensors[key] for key in keys[:3])
        column = (-1, *(1,) * (weight.ndim - 1))
        zero = tensors.get(keys[3], torch.zeros(1))
        result[f"{layer}.weight"] = (weight.float() - zero.reshape(column).float()) * scale.reshape(column)
        if batch_norm is None:
            result[f"{layer}.bias"] = bias
            continue
        norm = model.get_submodule(batch_norm)
        assert isinstance(norm, nn.BatchNorm2d)
        result[f"{batch_norm}.weight"] = torch.ones_like(bias)
        result[f"{batch_norm}.bias"] = bias
        result[f"{batch_norm}.running_mean"] = torch.zeros_like(bias)
        result[f"{batch_norm}.running_var"] = torch.full_like(bias, 1 - norm.eps)
    # What the network has no place for is kept, so that it is reported.
    return result | {key: value for key, value in tensors.items() if key not in used}


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    problems = []
    if missing:
        hint = nearest(missing[0], unexpected) if unexpected else ""
        problems.append(f"{len(missing)} missing: {_some(missing)}" + (f" ({hint})" if hint.startswith("Did") else ""))
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    shapes = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    return problems + ([f"{len(shapes)} of another shape: {_some(shapes)}"] if shapes else [])


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
