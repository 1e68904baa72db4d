"""Policies are found by name and refuse settings they do not have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from arqsearch import policies
from arqsearch.errors import ArqError


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArqError, match=r"No policy named 'dddpg'. Did you mean 'ddpg'"):
        policies.create("dddpg")


def test_an_unknown_hyper_parameter_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArqError, match=r"'batchsize'. Did you mean 'batch_size'"):
        policies.create("ddpg", batchsize=32)


@pytest.mark.parametrize(
    "settings", [{"learning_rate": -1.0}, {"tau": 2.0}, {"hidden": []}, {"hidden": [0]}, {"batch_size": "many"}]
)
def test_a_value_outside_its_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ArqError, match=f"hyper-parameter {next(iter(settings))}"):
        policies.create("ddpg", **settings)


def test_settings_are_kept_and_converted() -> None:
    policy = policies.create("ddpg", hidden=[32, 32], learning_rate=1)
    assert policy == policies.create("ddpg", hidden=(32, 32), learning_rate=1.0)
    assert policy != policies.create("ddpg")


def test_hyperparameters_are_the_defaults() -> None:
    for name in policies.available():
        defaults = policies.hyperparameters(name)
        assert "name" not in defaults
        assert policies.create(name, **defaults) == policies.create(name)


def test_listing_imports_no_agent() -> None:
    code = "import sys; from arqsearch import policies; policies.available(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
