"""The agents' defaults as rl-baselines3-zoo files, so that its trainer runs on our environments unmodified.

``python -m rl_zoo3.train --gym-packages arqsearch.envs --algo ddpg --env arqsearch/BitWidthContinuous-v0 --conf-file
policies/zoo/ddpg.yml``. The files are written by ``python -m arqsearch.policies.zoo_files`` from the defaults in
Python, for the embedded task. The zoo knows constant noise only, over actions in [−1, 1]: `ddpg` starts there with
half of the σ that it has here, and keeps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from arqsearch.policies.agent import AgentPolicy, Run
from arqsearch.policies.registry import create

#: Policies whose algorithm the zoo's trainer knows, under the same name there (it has no MaskablePPO).
ZOO_POLICIES: tuple[str, ...] = ("ddpg", "dqn", "ppo", "sac", "td3")
FOLDER = Path(__file__).parent / "zoo"
#: Episodes of the embedded task.
EPISODES = 200

_HEADER = "# Written by `python -m arqsearch.policies.zoo_files` from the defaults in Python.\n"


def zoo_settings(name: str) -> dict[str, dict[str, Any]]:
    """Content of one zoo file: hyper-parameters by environment id.

    :param name: a policy that trains an agent.
    """
    policy = create(name)
    assert isinstance(policy, AgentPolicy)
    env = policy.environment()
    run = Run(EPISODES, env.steps_per_episode, seed=0)
    settings: dict[str, Any] = {
        "n_timesteps": run.total_steps,
        "policy": "MlpPolicy",
        "env_wrapper": "arqsearch.policies.reward.StandardizedReward",
    }
    settings |= policy.arguments(run)
    if "train_freq" in settings:
        settings["train_freq"] = list(settings["train_freq"])
    noise = getattr(policy, "noise", None)
    if noise is not None:
        settings.pop("action_noise", None)
        settings |= {"noise_type": "normal", "noise_std": noise}
    return {policy.environment.id: settings}


def zoo_text(name: str) -> str:
    """The zoo file of a policy.

    :param name: a policy that trains an agent.
    """
    return _HEADER + yaml.safe_dump(zoo_settings(name), sort_keys=False)


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name in ZOO_POLICIES:
        (FOLDER / f"{name}.yml").write_text(zoo_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
