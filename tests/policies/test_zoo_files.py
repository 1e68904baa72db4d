"""The zoo files hold the Python defaults and build agents on the registered environments."""

from __future__ import annotations

from importlib import import_module

import gymnasium
import pytest
import yaml

import arqsearch.envs  # noqa: F401 (registers the ids)
from arqsearch.policies.agent import AgentPolicy
from arqsearch.policies.registry import available, create
from arqsearch.policies.zoo_files import FOLDER, ZOO_POLICIES, zoo_text


@pytest.mark.parametrize("name", ZOO_POLICIES)
def test_the_file_is_what_the_defaults_give(name: str) -> None:
    text = (FOLDER / f"{name}.yml").read_text(encoding="utf-8")
    assert text == zoo_text(name), "run `python -m arqsearch.policies.zoo_files`"


@pytest.mark.parametrize("name", ZOO_POLICIES)
def test_the_settings_build_an_agent(name: str) -> None:
    content = yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"))
    ((env_id, settings),) = content.items()
    module, wrapper = settings.pop("env_wrapper").rsplit(".", 1)
    env = getattr(import_module(module), wrapper)(gymnasium.make(env_id))
    # What the zoo itself takes out before it calls the constructor.
    for key in ("n_timesteps", "noise_type", "noise_std"):
        settings.pop(key, None)
    if "train_freq" in settings:
        settings["train_freq"] = tuple(settings["train_freq"])
    policy = create(name)
    assert isinstance(policy, AgentPolicy)
    model = policy.algorithm(settings.pop("policy"), env, device="cpu", **settings)
    assert model.gamma == 1.0
    assert model.get_env() is not None


def test_every_agent_that_the_zoo_knows_has_a_file() -> None:
    agents = {name for name in available() if isinstance(create(name), AgentPolicy)}
    assert agents - {"masked_ppo"} == set(ZOO_POLICIES) == {path.stem for path in FOLDER.glob("*.yml")}
