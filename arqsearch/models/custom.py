"""The user's own network, named ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from torch import nn

from arqsearch.errors import ArqError, nearest


def build_custom(target: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Import and call it; the current folder is searched too.

    :param target: ``package.module:function`` (or a class) that returns an `nn.Module`.
    :param num_classes: passed on when the function takes an argument of that name.
    :param options: further keyword arguments.
    :raises ArqError: when it cannot be imported, takes other arguments, or returns something else.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ArqError(f"Model {target!r} is not of the form package.module:function.")
    function = _import(module_name, attribute)
    arguments = dict(options)
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "num_classes" in parameters or takes_any:
        arguments.setdefault("num_classes", num_classes)
    unknown = [key for key in arguments if key not in parameters]
    if unknown and not takes_any:
        raise ArqError(f"{target} takes no argument {unknown[0]!r}. {nearest(unknown[0], parameters)}")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in arguments
    ]
    if missing:
        raise ArqError(f"{target} needs the argument {missing[0]!r}; set model.options.{missing[0]} in the recipe.")
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ArqError(f"{target} returned a {type(model).__name__}; it must return a torch.nn.Module.")
    return model


def _import(module_name: str, attribute: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ArqError(
                f"No module {error.name!r} for model {module_name}:{attribute}; start in the folder that holds it, or "
                "install its package."
            ) from error
        raise ArqError(f"Importing {module_name} failed: {error}. Install what it needs.") from error
    except ImportError as error:
        raise ArqError(f"Importing {module_name} failed: {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ArqError(f"{module_name} has no function {attribute!r}. {nearest(attribute, names)}")
    return function
