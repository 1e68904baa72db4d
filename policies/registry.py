"""Policies by name; a module is imported when its policy is first asked for."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from arqsearch.errors import ArqError, nearest
from arqsearch.policies.base import Policy

_POLICIES: dict[str, tuple[str, str]] = {
    "adaqat": ("arqsearch.policies.adaqat", "AdaQATPolicy"),
    "arq_style": ("arqsearch.policies.arq_style", "ARQStylePolicy"),
    "ddpg": ("arqsearch.policies.ddpg", "DDPGPolicy"),
    "dqn": ("arqsearch.policies.dqn", "DQNPolicy"),
    "greedy": ("arqsearch.policies.greedy", "GreedyPolicy"),
    "ilp": ("arqsearch.policies.ilp", "ILPPolicy"),
    "masked_ppo": ("arqsearch.policies.masked_ppo", "MaskedPPOPolicy"),
    "nsga2": ("arqsearch.policies.nsga2", "NSGA2Policy"),
    "ppo": ("arqsearch.policies.ppo", "PPOPolicy"),
    "random": ("arqsearch.policies.random_search", "RandomPolicy"),
    "sac": ("arqsearch.policies.sac", "SACPolicy"),
    "td3": ("arqsearch.policies.td3", "TD3Policy"),
    "tpe": ("arqsearch.policies.tpe", "TPEPolicy"),
    "uniform": ("arqsearch.policies.uniform", "UniformPolicy"),
}


def available() -> tuple[str, ...]:
    """Names of all policies, sorted; imports none of them."""
    return tuple(sorted(_POLICIES))


def _policy_class(name: str) -> type[Any]:
    if name not in _POLICIES:
        raise ArqError(f"No policy named {name!r}. {nearest(name, _POLICIES)}")
    module, attribute = _POLICIES[name]
    return cast("type[Any]", getattr(import_module(module), attribute))


def hyperparameters(name: str) -> dict[str, Any]:
    """Hyper-parameters of a policy with their defaults.

    :param name: one of :func:`available`.
    :raises ArqError: for an unknown policy.
    """
    return {field.name: field.default for field in fields(_policy_class(name))}


def create(name: str, **settings: Any) -> Policy:
    """Build a policy.

    :param name: one of :func:`available`.
    :param settings: hyper-parameters that differ from their defaults.
    :raises ArqError: for an unknown policy or hyper-parameter, or a value outside its range.
    """
    known = hyperparameters(name)
    for key in settings:
        if key not in known:
            hint = nearest(key, known) or "It has none."
            raise ArqError(f"Policy {name!r} has no hyper-parameter {key!r}. {hint}")
    try:
        return cast(Policy, TypeAdapter(_policy_class(name)).validate_python(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArqError(
            f"Policy {name!r}: hyper-parameter {where} = {first['input']!r} is not valid: {first['msg']}."
        ) from error
