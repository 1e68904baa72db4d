"""Frozen layers, groups and automatic ties, resolved on names and on traced networks."""

from __future__ import annotations

import pytest

from arqsearch import models
from arqsearch.errors import ArqError
from arqsearch.quantize.cost import Constraints, LayerInfo, residual_ties
from arqsearch.quantize.trace import trace

NAMES = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc")


def test_globs_freeze_and_tie() -> None:
    found = Constraints.resolve(NAMES, {"layer2.*": [4, 8]}, [["layer1.*"]], ends=[8, 8])
    assert found.fixed == {"layer2.0.conv1": (4, 8), "layer2.0.conv2": (4, 8), "conv1": (8, 8), "fc": (8, 8)}
    assert found.ties == (("layer1.0.conv1", "layer1.0.conv2"),)


def test_freezing_an_end_goes_before_the_default() -> None:
    found = Constraints.resolve(NAMES, {"conv1": [2, 8]}, [], ends=[8, 8])
    assert found.fixed == {"conv1": (2, 8), "fc": (8, 8)}


def test_a_glob_leaves_out_ends_that_are_fixed_by_default_only() -> None:
    found = Constraints.resolve(NAMES, {}, [["*"]], ends=[8, 8])
    assert found.ties == (NAMES[1:-1],)


def test_groups_that_share_a_layer_are_one() -> None:
    groups = [["layer2.0.conv1", "fc"], ["conv1", "layer1.0.conv1"], ["layer1.0.conv1", "layer2.0.conv1"]]
    found = Constraints.resolve(NAMES, {}, groups)
    assert found.ties == (("conv1", "layer1.0.conv1", "layer2.0.conv1", "fc"),)


def test_automatic_groups_leave_frozen_layers_out() -> None:
    found = Constraints.resolve(NAMES, {"layer1.0.conv2": [8, 8]}, [], automatic=[NAMES[:4], NAMES[4:]], ends=[8, 8])
    assert found.ties == (("layer1.0.conv1", "layer2.0.conv1"),)


@pytest.mark.parametrize(
    ("freeze", "group", "says"),
    [
        (
            {"layer1.0.convl": [8, 8]},
            [],
            "search.freeze: no layer matches 'layer1.0.convl'. Did you mean 'layer1.0.conv",
        ),
        ({}, [["layer3.*", "fc"]], "search.group: no layer matches 'layer3.[*]'"),
        ({"layer1.*": [8, 8], "layer1.0.conv1": [4, 4]}, [], "contradicts itself: layer 'layer1.0.conv1' is frozen at"),
        ({"layer1.0.*": [4, 4]}, [["layer1.0.conv1", "layer2.0.conv1"]], "'layer1.0.conv1', which search.freeze"),
        ({"layer1.0.conv1": [4, 4]}, [["layer1.*"]], "'layer1.0.conv1', which search.freeze"),
        ({}, [["conv1", "layer1.0.conv1"]], "'conv1', which search.first_last fixes at"),
        ({}, [["layer1.0.conv1"]], "needs at least two"),
    ],
)
def test_what_cannot_be_is_refused(freeze: dict[str, list[int]], group: list[list[str]], says: str) -> None:
    with pytest.raises(ArqError, match=says):
        Constraints.resolve(NAMES, freeze, group, ends=[8, 8])


def test_ties_are_written_into_the_layers() -> None:
    layers = [LayerInfo(name, "conv", 4, 4) for name in NAMES]
    applied = Constraints.resolve(NAMES, {}, [["layer2.*"]]).applied(layers)
    assert [layer.tie for layer in applied] == [None, None, None, "layer2.0.conv1", "layer2.0.conv1", None]


def test_residual_sums_tie_the_layers_of_a_stage() -> None:
    found = residual_ties(trace(models.build("mobilenet_v2", 10), (3, 32, 32)))
    assert found[0] == ("features.2.conv.2", "features.3.conv.2")
    assert found[1] == tuple(f"features.{block}.conv.2" for block in (4, 5, 6))


def test_shortcuts_without_a_layer_tie_all_stages() -> None:
    blocks = [f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert residual_ties(trace(models.build("resnet20", 10), (3, 32, 32))) == (("conv1", *blocks),)
