"""`Workspace`: a recipe's data, base network and run folder, made on demand by every stage and worker."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from arqsearch import data as datasets
from arqsearch import models, zoo
from arqsearch.certify.noise import NoiseTable
from arqsearch.data import Dataset
from arqsearch.envs.feasibility import Feasibility
from arqsearch.errors import ArqError
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.cost import Budget, Constraints, LayerInfo, residual_ties
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.smoothing_losses import integer_noise
from arqsearch.quantize.training import to_pixels
from arqsearch.recipe import Recipe, dump_recipe, load_recipe
from arqsearch.search.profile_memory import planned
from arqsearch.search.profile_table import LatencyTable, network_identity
from arqsearch.search.record import Record

#: Noisy training images that set the step sizes.
CALIBRATION_IMAGES = 512


#: Parts of a recipe that trained weights and search results depend on.
RESULT_SECTIONS = ("seed", "sigma", "data", "model", "train", "quantize", "evaluate", "search", "finetune")


def _difference(name: str, before: Any, now: Any) -> str:
    """The first key in which two parts of a recipe differ, with both values."""
    for key in getattr(type(before), "model_fields", {}):
        if getattr(before, key) != getattr(now, key):
            return _difference(f"{name}.{key}", getattr(before, key), getattr(now, key))
    return f"{name}={before!r}, now {now!r}"


class Workspace:
    """Paths and lazily built pieces of one run.

    :param recipe: the resolved recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dir = recipe.run_dir
        self._layers: dict[str, tuple[LayerInfo, ...]] = {}

    # ---- files -------------------------------------------------------------------------------

    @property
    def base_path(self) -> Path:
        """Trained base network (the model's own keys)."""
        return self.dir / "base.safetensors"

    @property
    def shared_path(self) -> Path:
        """Weights that score candidates: shared training in `shared` mode, calibrated base otherwise."""
        return self.dir / "shared.safetensors"

    def network_dir(self, name: str) -> Path:
        """Folder of one compared network (float, uniform, random, found)."""
        return self.dir / "networks" / name

    def certificate_path(self, name: str) -> Path:
        """Certificate lines of a network; for the float one, estimates by the same protocol."""
        return self.dir / ("estimates" if name == "float" else "certificates") / f"{name}.jsonl"

    def bounds_path(self, name: str) -> Path:
        """Clean accuracy and interval verdicts of a network."""
        return self.dir / "bounds" / f"{name}.json"

    def export_dir(self, name: str) -> Path:
        """Artefacts of a network."""
        return self.dir / "exports" / name

    def search_path(self, policy: str) -> Path:
        """Result of one policy's search."""
        return self.dir / "search" / f"{policy}.json"

    def save_recipe(self) -> None:
        """Store the resolved recipe; refuse to mix results of different settings in one folder.

        :raises ArqError: when the folder holds results that were made with other settings.
        """
        path = self.dir / "recipe.yaml"
        begun = any((self.dir / name).exists() for name in ("base.safetensors", "shared.safetensors", "networks"))
        if begun and path.is_file():
            earlier = load_recipe(self.dir)
            for name in RESULT_SECTIONS:
                before, now = getattr(earlier, name), getattr(self.recipe, name)
                if before != now:
                    raise ArqError(
                        f"{self.dir} holds results made with {_difference(name, before, now)}. "
                        "Choose another folder (run=...), or delete this one to start over."
                    )
        dump_recipe(self.recipe, path)

    # ---- data --------------------------------------------------------------------------------

    def _load(self, split: Literal["train", "test"]) -> Dataset:
        section = self.recipe.data
        return datasets.load(section.name, split, path=section.path, image_size=section.image_size)

    @cached_property
    def _split(self) -> tuple[Dataset, Dataset]:
        return datasets.split_holdout(self._load("train"), self.recipe.data.holdout)

    @property
    def train_set(self) -> Dataset:
        """Training images without the held-out part."""
        return self._split[0]

    @property
    def holdout(self) -> Dataset:
        """Training images that score candidates and nothing else."""
        return self._split[1]

    @cached_property
    def test_set(self) -> Dataset:
        """Test images: certificates and final figures only."""
        return self._load("test")

    # ---- networks ----------------------------------------------------------------------------

    def model(self, num_classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
        """The base network with fresh weights, for images of ``(H, W, C)``."""
        section = self.recipe.model
        torch.manual_seed(self.recipe.seed)
        return models.build(
            section.name, num_classes, **{**models.image_options(section.name, shape), **section.options}
        )

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Class count and image shape, kept in the run folder so that late stages need no training data."""
        path = self.dir / "data.json"
        section = self.recipe.data.model_dump(mode="json")
        if path.is_file():
            known = dict(json.loads(path.read_text()))
            if known.get("section") == section:
                return known
        train = self.train_set
        facts = {
            "section": section,
            "num_classes": train.num_classes,
            "shape": list(train.images.shape[1:]),
            "name": train.name,
            "holdout_identity": self.holdout.identity,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))
        return facts

    def net(self, base: Path | None = None) -> QuantizedNet:
        """The quantized network around the base model, in float mode.

        :param base: weights file in the model's own keys; None leaves fresh weights.
        """
        height, width, channels = self.facts["shape"]
        model = self.model(self.facts["num_classes"], (height, width, channels))
        if base is not None:
            models.load_weights(model, base)
        section = self.recipe.model
        normal = models.default_normalization(section.name, channels)
        settings = QuantizeSettings(**self.recipe.quantize.model_dump())
        net = QuantizedNet(
            model, (channels, height, width), section.mean or normal.mean, section.std or normal.std, settings
        )
        net.quantized = False
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def base_weights(self) -> Path:
        """The file with the base network's weights.

        :raises ArqError: when it was neither given nor trained yet.
        """
        given = self.recipe.model.weights
        if given is not None:
            return self.find_weights(given)
        if not self.base_path.is_file():
            raise ArqError(
                f"No base weights at {self.base_path}; run `arqsearch train` first, or set model.weights to a file."
            )
        return self.base_path

    def find_weights(self, named: str) -> Path:
        """A weights file that the recipe names, from the current folder, the data root or the zoo (``zoo:NAME``).

        :raises ArqError: when there is none.
        """
        if named.startswith(zoo.PREFIX):
            return zoo.find(named, "base").path
        path = Path(named).expanduser()
        places = [path] if path.is_absolute() else [path, datasets.data_root() / path]
        for place in places:
            if place.is_file():
                return place
        looked = " or ".join(map(str, places))
        raise ArqError(f"No weights at {looked}; name a safetensors (or .pt) file, or set $ARQSEARCH_DATA.")

    def calibration_pixels(self) -> list[torch.Tensor]:
        """Noisy training images in grey levels, as the deployed network sees them."""
        train = self.train_set
        images = to_pixels(train.images[:CALIBRATION_IMAGES])
        generator = torch.Generator().manual_seed(self.recipe.seed)
        noisy = images + integer_noise(tuple(images.shape), self.recipe.sigma, generator)
        return list(torch.split(noisy, 128))

    # ---- search ------------------------------------------------------------------------------

    @property
    def table(self) -> NoiseTable:
        """The noise table of the recipe's σ."""
        return NoiseTable.for_sigma(self.recipe.sigma)

    def constraints(self, net: QuantizedNet) -> Constraints:
        """Layers that are not searched and layers that share their bits.

        :raises ArqError: for a name that matches no layer, or entries that contradict each other.
        """
        section = self.recipe.search
        automatic = residual_ties(net.graph) if section.tie_residual else ()
        return Constraints.resolve(
            net.bitwidths.names, section.freeze, section.group, ends=section.first_last, automatic=automatic
        )

    def fixed(self, net: QuantizedNet) -> dict[str, tuple[int, int]]:
        """Layers that are not searched, with their bits; the first and the last one unless the recipe searches them."""
        return dict(self.constraints(net).fixed)

    def layer_infos(self, net: QuantizedNet) -> tuple[LayerInfo, ...]:
        """Every layer as the search sees it: with its ties, and with the memory plan and latencies that are needed.

        :raises ArqError: when the recipe needs latencies and there is no table that fits.
        """
        identity = network_identity(net)
        if identity not in self._layers:
            self._layers[identity] = self._costed(net, identity)
        return self._layers[identity]

    def _costed(self, net: QuantizedNet, identity: str) -> tuple[LayerInfo, ...]:
        section = self.recipe.search
        layers = self.constraints(net).applied(net.layer_infos)
        wanted = {section.minimise if section.require else "", *section.objectives}
        if section.budget.peak_activation_bytes is not None or "peak_activation_bytes" in wanted:
            layers = planned(net, layers)
        if section.budget.latency is not None or "latency" in wanted or section.latency_table is not None:
            layers = LatencyTable.load(self.latency_path).applied(layers, identity)
        return layers

    @property
    def latency_path(self) -> Path:
        """The latency table that the recipe names, or where `arqsearch profile` writes it."""
        named = self.recipe.search.latency_table
        return Path(named).expanduser() if named is not None else self.dir / "latency.json"

    def budget(self, net: QuantizedNet) -> Budget:
        """The budget of the recipe on this network, checked to be attainable."""
        layers = self.layer_infos(net)
        budget = Budget.parse(self.recipe.search.budget.model_dump(), layers)
        budget.check_attainable(layers, self.recipe.search.bits, self.fixed(net))
        return budget

    def feasibility(self, net: QuantizedNet) -> Feasibility:
        """Everything that the search may choose."""
        return Feasibility(self.layer_infos(net), self.budget(net), tuple(self.recipe.search.bits), self.fixed(net))

    def record(self) -> Record:
        """The record of evaluations."""
        return Record(self.recipe.search.record or f"sqlite:///{self.dir / 'record.sqlite'}")

    def bitwidths(self, name: str) -> BitWidths:
        """Bit-widths of a compared network.

        :raises ArqError: when the search has not run.
        """
        path = self.network_dir(name) / "bitwidths.json"
        if not path.is_file():
            raise ArqError(f"No bit-widths at {path}; run `arqsearch search` first.")
        return BitWidths.from_json(path.read_text())
