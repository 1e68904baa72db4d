"""The recipe: one strict schema for YAML files, command-line overrides and the JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arqsearch.errors import ArqError, nearest

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where images come from; always uint8."""

    name: str = Field("digits", description="digits, mnist, fashion-mnist, cifar10, imagenet, folder, or hf:owner/name")
    path: str | None = Field(None, description="folder or file; default: $ARQSEARCH_DATA/data")
    image_size: Positive | None = Field(None, description="resize images of a folder to this height and width")
    holdout: Positive = Field(297, description="training images set aside to score candidates (CIFAR-10: 5000)")


class Model(Section):
    """The base network."""

    name: str = Field("cnn_small", description="a registered name, or package.module:function for your own nn.Module")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the builder")
    weights: str | None = Field(
        None,
        description="safetensors (or .pt) file, from the current folder or $ARQSEARCH_DATA, or zoo:NAME; "
        "omit to train the base",
    )
    mean: list[float] | None = Field(None, description="per-channel mean of [0,1] pixels; default: the model's own")
    std: list[float] | None = Field(None, description="per-channel standard deviation of [0,1] pixels")


class Objective(Section):
    """The training loss: a smoothing part and an interval part."""

    smoothing: Literal["none", "gaussian", "stability", "consistency", "macer", "smoothadv", "distillation"] = Field(
        "consistency", description="none = clean cross-entropy; noise is the deployed integer noise"
    )
    copies: Positive | None = Field(
        None, description="noisy copies m of each image; default: 1, consistency and smoothadv 2, macer 16"
    )
    consistency: float = Field(10.0, ge=0, description="weight λ of KL(mean ‖ F_i) (Jeong & Shin 2020)")
    entropy: float = Field(0.5, ge=0, description="weight η of the entropy of the mean prediction")
    stability: float = Field(2.0, ge=0, description="weight λ of CE(clean prediction, noisy) (Li et al. 2019)")
    macer: float = Field(12.0, ge=0, description="weight λ of the radius hinge (Zhai et al. 2020)")
    macer_margin: float = Field(8.0, gt=0, description="hinge γ of MACER, in units of σ/2")
    macer_temperature: float = Field(16.0, gt=0, description="softmax factor β of MACER")
    attack_radius: float = Field(0.25, gt=0, description="SmoothAdv: L2 radius of the attack, in [0,1] pixels")
    attack_steps: Positive = Field(2, description="SmoothAdv: gradient steps of the attack")
    distillation: float = Field(
        0.0, ge=0, description="weight of the squared distance to the teacher's softmax on the same noisy images"
    )
    interval: float = Field(
        0.0, ge=0, le=1,
        description="final weight of the interval bounds: κ of worst-case cross-entropy, λ of the hinge",
    )  # fmt: skip
    bound_loss: Literal["cross-entropy", "hinge"] = Field(
        "cross-entropy", description="(1-κ)·loss + κ·worst-case cross-entropy, or loss + λ·hinge (Lechner et al. 2023)"
    )
    margin: float = Field(0.2, ge=0, description="hinge: margin that every z_label - z_j is asked for, in logits")
    width: float = Field(0.0, ge=0, description="weight μ of the sum over layers of the mean interval width")
    epsilon: float = Field(0.0, ge=0, description="L∞ radius of the interval part, in grey levels")
    warmup: float = Field(0.0, ge=0, lt=1, description="part of training before the interval part begins")
    ramp: float = Field(0.6, gt=0, le=1, description="part of training over which ε and its weights grow after that")
    small_box: float = Field(
        1.0, gt=0, le=1, description="bound a box of τ·ε around an attack point instead (Müller et al. 2023); 1 = all"
    )
    box_attack_steps: Positive = Field(8, description="small_box: gradient steps of the attack")


class Monitor(Section):
    """Box estimates on held-out images during a training, shown and written as CSV."""

    every: float = Field(0.0, ge=0, description="epochs between estimates; 0 = none")
    images: Positive = Field(500, description="held-out images bounded each time")
    epsilons: list[Positive] = Field(default=[1, 2, 4], description="L∞ radii in grey levels")


class Train(Section):
    """One training run."""

    epochs: float = Field(20.0, ge=0, description="passes over the training images (fractions allowed)")
    batch_size: Positive = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0, description="peak learning rate; warm-up then cosine to 0")
    weight_decay: float = Field(1e-4, ge=0)
    augment: Literal["none", "crop", "flip", "crop-flip"] = Field("none", description="random shifts, flips")
    shift: Positive | None = Field(None, description="largest shift in pixels; default: 1/8 of the height")
    freeze_batch_norm: float = Field(0.7, ge=0, le=1, description="part of training after which statistics are frozen")
    objective: Objective = Field(default_factory=Objective)
    start: str | None = Field(None, description="weights the base starts from, a file or zoo:NAME; default: random")
    initialization: Literal["default", "ibp"] = Field(
        "default", description="fresh weights: the model's own, or such that interval bounds keep their width"
    )
    teacher: str | None = Field(None, description="float weights that distillation follows; default: the base")
    device: Literal["auto", "cpu", "cuda"] = Field("cpu", description="auto = a GPU if there is one")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of matrix products; float16 needs a GPU"
    )
    monitor: Monitor = Field(default_factory=Monitor)


class Quantize(Section):
    """What is fixed for all candidates."""

    input_mode: Literal["wide", "clip"] = Field(
        "wide", description="wide covers the noise; clip clips pixels to 0..255 with one code a grey level at 8 bits"
    )
    residual_bits: Bits = Field(8, description="bits of residual sums and tensors with several consumers")
    multiplier: Literal["31", "15", "pow2"] = Field("31", description="requantization multipliers")
    rounding: Literal["half_up", "half_even", "floor"] = "half_up"


class Smoothed(Section):
    """The randomized smoothing term of the reward, estimated on common noise."""

    weight: float = Field(1.0, ge=0)
    measure: Literal["mean_radius", "accuracy"] = Field("mean_radius", description="accuracy = mean over the radii")
    radii: list[float] = Field(default=[0.25, 0.5], description="radii in [0,1] pixels for measure: accuracy")
    images: Positive = Field(200, description="held-out images scored")
    samples: Positive = Field(32, description="noise samples for each image")


class IntervalTerm(Section):
    """The QA-IBP term of the reward, on the lowered program."""

    weight: float = Field(0.0, ge=0)
    measure: Literal["certified_accuracy", "margin"] = Field(
        "certified_accuracy", description="margin = clipped worst-case margin, a dense surrogate"
    )
    epsilons: list[Positive] = Field(default=[1], description="whole grey levels; the term is the mean over them")
    images: Positive = 200
    margin_clip: float = Field(2.0, gt=0, description="margins are clipped to ± this, in logit units")


class EarlyStop(Section):
    """Stopping of losing candidates by a valid sequential test against the best one so far."""

    delta: float = Field(
        0.0, ge=0, lt=0.5,
        description="probability of stopping a candidate that is as good as the best one; 0 = score all in full",
    )  # fmt: skip
    block: Positive = Field(10, description="images between two looks")
    generation: Positive = Field(8, description="candidates raced against the same best one")


class Evaluate(Section):
    """How a candidate is scored during the search."""

    mode: Literal["shared", "finetune"] = Field(
        "shared", description="shared: one training for all bit-widths; finetune: a short one for each (ARQ-style)"
    )
    training: Train = Field(default_factory=lambda: Train(epochs=5, lr=0.01, freeze_batch_norm=0.0))
    configs_per_step: Positive = Field(2, description="assignments trained in each step of the shared training")
    smoothed: Smoothed = Field(default_factory=Smoothed)
    interval: IntervalTerm = Field(default_factory=IntervalTerm)
    early_stop: EarlyStop = Field(default_factory=EarlyStop)
    device: Literal["cpu", "cuda"] = Field("cpu", description="what counts votes; does not change a score")
    allow_constant_term: bool = Field(False, description="weigh a term although it does not vary over configurations")

    @model_validator(mode="after")
    def _something_to_race_on(self) -> Evaluate:
        if self.early_stop.delta > 0 and self.smoothed.weight == 0:
            raise ValueError("early_stop needs the smoothing term; set smoothed.weight above 0, or early_stop.delta=0")
        return self


class Budget(Section):
    """Upper limits, all met at once; a percentage is of the FP32 network."""

    bops: str | int | None = Field("1.62%", description="bit operations: '1.62%', '0.67G' or a whole number")
    weight_bytes: str | int | None = Field(None, description="packed weights, biases and multipliers: '80k', '10%'")
    peak_activation_bytes: str | int | None = Field(
        None, description="most bytes of activations alive at once in the native engine and the C package: '64k'"
    )
    latency: str | int | float | None = Field(
        None, description="one image on the native engine, by the table of `arqsearch profile`: '850us', '1.2ms'"
    )


class Search(Section):
    """The bit-width search."""

    policy: str = Field("ddpg", description="a policy of docs/search.md, such as ddpg, ilp, nsga2, greedy or random")
    options: dict[str, Any] = Field(default_factory=dict, description="hyper-parameters of the policy")
    compare: list[str] = Field(default=["uniform", "random"], description="policies run beside it at equal evaluations")
    evaluations: Positive = 100
    seed: int = 0
    budget: Budget = Field(default_factory=Budget)
    latency_table: str | None = Field(
        None, description="table for the latency; default: latency.json of the run folder"
    )
    bits: list[Bits] = Field(default=[2, 3, 4, 5, 6, 7, 8], min_length=1, description="bits a layer may take")
    freeze: dict[str, Annotated[list[Bits], Field(min_length=2, max_length=2)]] = Field(
        default_factory=dict, description="layer or glob: its [weight, activation] bits, which are not searched"
    )
    group: list[list[str]] = Field(
        default_factory=list, description="lists of layers or globs that share one pair of bits"
    )
    tie_residual: bool = Field(False, description="layers that feed the same residual sum share one pair of bits")
    first_last: list[Bits] | None = Field(
        default=[8, 8],
        min_length=2,
        max_length=2,
        description="weight and activation bits of first and last layer; null searches them",
    )
    require: str | None = Field(
        None, description="minimise cost under a floor instead: 'certified@0.5 >= 40%', 'ibp@1 >= 30% and acr >= 0.4'"
    )
    minimise: Literal["bops", "weight_bytes", "latency"] = Field("bops", description="require: the cost to minimise")
    confidence: float = Field(
        0.95, ge=0.5, lt=1, description="require: one-sided confidence of the estimates that the search compares"
    )
    attempts: Positive = Field(3, description="require: candidates certified at most until one meets the floor")
    objectives: list[str] = Field(
        default_factory=list,
        description="write the trade-off of these: costs, reward, certified, certified@R, ibp@EPS, acr",
    )
    front_points: int = Field(5, ge=0, description="objectives: points of the front that are fine-tuned and certified")
    record: str | None = Field(None, description="SQLAlchemy URL of the record; default: SQLite in the run folder")

    @model_validator(mode="before")
    @classmethod
    def _floor_without_budget(cls, values: Any) -> Any:
        """A floor takes the place of the default budget; a stated budget stays a limit beside it."""
        if isinstance(values, dict) and values.get("require") and "budget" not in values:
            return {**values, "budget": {"bops": None}}
        return values


class Certify(Section):
    """Certificates on test images."""

    rule: Literal["fixed", "sequential", "incremental"] = Field(
        "fixed", description="fixed: Cohen's protocol; sequential: until the radii are decided; incremental: from base"
    )
    images: Positive | None = Field(100, description="test images, the first of the set (or of every k-th); null = all")
    every: Positive = Field(1, description="take every k-th test image (Cohen et al.: every 20th of CIFAR-10, 500)")
    n0: Positive = Field(100, description="samples that select the class")
    n: Positive = Field(10_000, description="fixed: fresh samples that estimate its probability")
    alpha: float = Field(0.001, gt=0, lt=0.5, description="failure probability for each image")
    radii: list[float] = Field(
        default=[0.0, 0.25, 0.5], description="L2 radii in [0,1] pixels, for the tables; sequential decides these"
    )
    cap: Positive = Field(10_000, description="sequential: samples after which an image stays undecided")
    target: Literal["selected", "label"] = Field(
        "selected", description="sequential: test the class that n0 samples select, or the true label without them"
    )
    two_class: bool = Field(False, description="fixed: also the two-class radius, a separate figure with its own alpha")
    base: str | None = Field(None, description="incremental: certificate file of the network to start from")
    base_program: str | None = Field(None, description="incremental: its program; default: found by hash in the run")
    shared: Positive = Field(1000, description="incremental: samples on which the two networks are compared")
    gained: bool = Field(False, description="incremental: also count pairs that this network gains, α in three parts")
    epsilons: list[Positive] = Field(default=[1, 2, 4], description="L∞ radii in grey levels for interval bounds")
    interval_images: Positive = Field(500, description="test images bounded")
    clean_images: Positive = Field(1000, description="test images for clean accuracy")
    batch_size: Positive = 250
    skip_misclassified: bool = Field(
        True, description="do not estimate an image whose selected class is wrong: it counts 0 either way"
    )
    seed: int = 20260101


class Export(Section):
    """Artefacts written by `arqsearch run`."""

    formats: list[Literal["onnx", "onnx-fast", "qdq", "config", "c"]] = Field(default=["onnx", "qdq", "config"])


class Recipe(Section):
    """Everything a run needs."""

    name: str = "digits"
    run: str | None = Field(None, description="run folder; default: runs/<name>")
    seed: int = 0
    workers: Positive = Field(2, description="processes, or tasks on a cluster, at a time; each uses one thread")
    executor: str = Field(
        "local", pattern=r"^(local|ray|ray:auto|ray://.+:\d+)$",
        description="local; ray (this machine, or $RAY_ADDRESS); ray:auto (this machine's cluster); ray://host:port",
    )  # fmt: skip
    sigma: float = Field(0.25, gt=0, description="noise level σ in the unit of [0,1] pixels")
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    quantize: Quantize = Field(default_factory=Quantize)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    search: Search = Field(default_factory=Search)
    finetune: Train = Field(default_factory=lambda: Train(epochs=5, lr=0.01, freeze_batch_norm=0.0))
    certify: Certify = Field(default_factory=Certify)
    export: Export = Field(default_factory=Export)

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything the run makes."""
        return Path(self.run) if self.run else Path("runs") / self.name


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe (or a run folder's resolved one) and apply ``a.b=c`` overrides.

    :raises ArqError: when the file is missing or a key or value is wrong, naming the nearest valid one.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "recipe.yaml"
    if not file.is_file():
        packaged = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        if str(path) in packaged:
            file = RECIPES / f"{path}.yaml"
        else:
            raise ArqError(
                f"No recipe at {path}. `arqsearch init` writes one; packaged recipes: {', '.join(packaged)}."
            )
    try:
        data = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ArqError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ArqError(f"{file} holds a {type(data).__name__}; a recipe is a mapping of sections.")
    for override in overrides or []:
        apply_override(data, override)
    if Path(path).is_dir():
        # A run folder may have been moved or copied since its recipe was stored.
        data["run"] = str(path)
    return parse_recipe(data, str(file))


def parse_recipe(data: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Validate a mapping.

    :param where: named in errors.
    :raises ArqError: listing every wrong key and value.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(e["loc"], e["type"], e["msg"], e.get("input")) for e in error.errors()]
        raise ArqError(f"{where}:\n  " + "\n  ".join(problems)) from error


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


RECIPES = Path(__file__).parent / "recipes"


def apply_override(data: dict[str, Any], override: str) -> None:
    """Change a mapping of sections by one ``section.key=value``.

    :raises ArqError: when it is not of that form.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ArqError(
            f"Override {override!r} is not understood; write section.key=value, for example search.evaluations=50."
        )
    parts = key.split(".")
    target = data
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ArqError(f"Override {override!r}: {part!r} is a value, not a section.")
    try:
        target[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArqError(f"Override {override!r}: {text!r} is not valid YAML: {error}") from error


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The schema class that a location's last key belongs to."""
    current: Any = Recipe
    for part in location[:-1]:
        field = (
            current.model_fields.get(str(part))
            if isinstance(current, type) and issubclass(current, BaseModel)
            else None
        )
        if field is None:
            return None
        options = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        current = next((a for a in options if issubclass(a, BaseModel)), None)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _explain(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    key = ".".join(map(str, location))
    section = _section_at(location)
    if kind == "extra_forbidden" and section is not None:
        return f"{key}: unknown key. {nearest(str(location[-1]), section.model_fields)}"
    return f"{key}: {message} (given: {value!r})"
