"""A recipe: everything that decides what a conversion computes, as one flat frozen record.

Precedence, weakest first: the defaults below, the recipe file, `--set key=value`, command-line flags. A recipe file (YAML) states
only what differs from the defaults. What may differ between two machines without changing the experiment (device, workers,
folders) is not in here.
"""

import difflib
import hashlib
import importlib.resources
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from siman_convert.errors import InputError, one_line

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Binarized = Literal["activations", "weights", "all"]

MAX_RECIPE_BYTES = 1 << 16  # a recipe is a page of text; anything larger is some other file
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


class Stage(BaseModel):
    """A stage of the binary training: what is binary in it, and the recipe's fields that have another value there."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    binarize: Binarized
    epochs: Count | None = None
    opt: Literal["sgd", "adamw"] | None = None
    lr: PositiveFloat | None = None
    momentum: ShareBelowOne | None = None
    weight_decay: NonNegative | None = None
    warmup_epochs: Count | None = None
    warmup_lr: NonNegative | None = None
    min_lr: NonNegative | None = None
    clip_grad: PositiveFloat | None = None
    label_weight: NonNegative | None = None
    distill_weight: NonNegative | None = None
    distill_temperature: PositiveFloat | None = None
    feature_weight: NonNegative | None = None
    smoothing: ShareBelowOne | None = None
    mixup: NonNegative | None = None
    cutmix: NonNegative | None = None

    @model_serializer(mode="wrap")
    def _stated(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class Recipe(BaseModel):
    """The fields with their defaults; names are timm's where timm has one. Epochs are counted from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    # What becomes binary, and how
    init: Literal["remap", "copy", "scratch"] = "remap"  # latents keep the weights' signs, are the weights, are random
    binarizer: Literal["half", "analytic", "sign"] = "half"  # how latents become bits: by magnitude, or by sign
    keep: tuple[str, ...] = ()  # globs of convolutions to keep in full precision
    binarize: tuple[str, ...] = ()  # globs of convolutions to binarize against the plan's rules
    shortcuts: bool = (
        False  # an identity around every binary convolution where shapes allow, with its BatchNorm (Bi-Real)
    )
    prelu: bool = False  # PReLU in place of ReLU behind binary convolutions, the same function at first
    shifts: bool = False  # learned thresholds and shifts around the PReLUs (ReActNet); needs prelu
    clip_percent: Annotated[float, Field(ge=0.0, lt=50.0)] = 15.0  # clip of the first epoch; falls linearly to 0
    calibration_images: Count = 2048  # training images that re-estimate alpha and BatchNorm after conversion
    final_calibration_images: Count = 4096  # and BatchNorm again after the last binary epoch

    # Length and optimizer
    epochs: Count = 30  # binary epochs (of each stage that does not say); 0: post-training mode, nothing is trained
    stages: tuple[Stage, ...] = ()  # of the binary epochs, in order, the last one of all; (): one of all
    fp_epochs: Count = 0  # epochs of full-precision fine-tuning before the conversion
    fp_lr: PositiveFloat | None = None  # learning rate of those; None: lr
    batch_size: Positive = 128  # images per micro-batch and process
    grad_accum_steps: Positive = 1  # micro-batches per optimizer step
    opt: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.02  # of one optimizer step, whatever the batch size
    momentum: ShareBelowOne = 0.9  # of sgd
    weight_decay: NonNegative = 1e-4  # never on the parameters of binary layers
    latent_weight_decay: NonNegative = 0.0  # on their latent weights; above 0 only to see what it does to them
    warmup_epochs: Count = 0
    warmup_lr: NonNegative = 1e-5
    min_lr: NonNegative = 0.0
    sched_on_updates: bool = True  # the cosine falls at every step; else once an epoch
    clip_grad: PositiveFloat | None = None  # largest norm of the gradient
    label_weight: NonNegative = 1.0  # of the labels' cross-entropy in the binary epochs
    distill_weight: NonNegative = 0.0  # of the distance to a teacher's answers, beside it; 0: off
    distill_temperature: PositiveFloat = 4.0  # divides the logits of both
    feature_weight: NonNegative = 0.0  # of the distance between the stages' attention maps, beside both; 0: off
    teacher: str | None = None  # None: the full-precision model itself; NAME: timm's pretrained; NAME=FILE: its weights
    smoothing: ShareBelowOne = 0.0  # of labels
    mixup: NonNegative = 0.0  # alpha of mixup; 0: off
    cutmix: NonNegative = 0.0  # alpha of cutmix; 0: off
    model_ema: bool = False  # evaluate and keep an exponential moving average of the weights
    model_ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9998
    amp: bool = False  # mixed precision
    amp_dtype: Literal["float16", "bfloat16"] = "bfloat16"
    channels_last: bool = False
    sync_bn: bool = False  # BatchNorm's statistics over all processes, on GPUs
    seed: Count = 42

    # Data
    img_size: Positive | None = None  # None: the model's, or less for small images
    val_split: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # taken from a single folder of classes
    mean: tuple[float, ...] | None = None  # None: the model's
    std: tuple[PositiveFloat, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    pad_to_size: bool = False  # images smaller than the input are padded with black, not enlarged
    scale: tuple[PositiveFloat, PositiveFloat] = (0.35, 1.0)  # area of the random crop
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)  # aspect of the random crop
    crop_padding: Count = 0  # > 0: pad by this and crop, instead of the random resized crop
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: NonNegative = 0.0
    aa: str | None = None  # timm's auto-augment string
    reprob: Share = 0.0  # random erasing
    no_aug: bool = False
    max_bad_images: Share = 0.05  # share of unreadable images that is skipped (one always is); more is an error

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} goes from {low} down to {high}; expected the smaller first")
        if self.shifts and not self.prelu:
            raise ValueError("shifts go before the sign and around PReLUs; they need prelu (--prelu)")
        if self.label_weight == 0 and not self.taught:
            raise ValueError("label_weight and distill_weight are both 0: nothing to learn from; expected one above 0")
        if 0 < self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leave nothing of {self.epochs} epochs; expected fewer"
            )
        return self

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Recipe":
        kinds = [stage.binarize for stage in self.stages]
        first = kinds.index("all") if "all" in kinds else len(kinds)
        if kinds and (kinds[-1] != "all" or len(set(kinds[:first])) > 1 or set(kinds[first:]) != {"all"}):
            raise ValueError(
                f"stages binarize {', '.join(kinds)}; expected activations (or weights) first and all from then on"
            )
        taught = [] if self.stages else [self.taught]
        for number, stage in enumerate(self.stages, start=1):
            try:
                taught.append(self._of_stage(stage).taught)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"stage {number} of stages: {reason}") from None
        if self.teacher is not None and not any(taught):
            raise ValueError(
                f"teacher {self.teacher!r} teaches nothing: distill_weight is 0; expected more, or no teacher"
            )
        return self

    def _of_stage(self, stage: Stage) -> "Recipe":
        stated = stage.model_dump(exclude={"binarize"})
        return Recipe.model_validate({**self.model_dump(), "stages": (), "teacher": None, **stated})

    @property
    def resolved_stages(self) -> tuple["ResolvedStage", ...]:
        """The stages of the binary training; without `stages` one. Those of no epochs are left out, but for the last."""
        staged = [(stage.binarize, self._of_stage(stage)) for stage in self.stages] or [("all", self)]
        kept = [*((what, recipe) for what, recipe in staged[:-1] if recipe.epochs), staged[-1]]
        resolved, epochs, clipped = [], 0, 0
        for what, recipe in kept:
            resolved.append(ResolvedStage(what, recipe, epochs, clipped))
            epochs += recipe.epochs
            clipped += recipe.epochs if what != "activations" else 0
        return tuple(resolved)

    @property
    def binary_epochs(self) -> int:
        """Epochs after the conversion, of all stages together."""
        last = self.resolved_stages[-1]
        return last.before + last.recipe.epochs

    @property
    def clipped_epochs(self) -> int:
        """Those of them that train binary weights: the clip falls to 0 over them."""
        last = self.resolved_stages[-1]
        return last.clipped_before + last.recipe.epochs

    @property
    def taught(self) -> bool:
        """Whether the loss has a teacher, but for what stages say otherwise."""
        return self.distill_weight > 0 or self.feature_weight > 0

    @property
    def distils(self) -> bool:
        """Whether any epoch learns from a teacher."""
        return any(stage.recipe.epochs and stage.recipe.taught for stage in self.resolved_stages)

    def to_yaml(self) -> str:
        """All fields in order, as YAML that `parse_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all fields, hexadecimal."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ResolvedStage:
    """What a stage binarizes and the recipe it follows, with the epochs of the stages before it: all, and those that clip."""

    binarize: Binarized
    recipe: Recipe
    before: int
    clipped_before: int

    @property
    def name(self) -> Literal["activations", "weights", "binary"]:
        """What its phase is called."""
        return "binary" if self.binarize == "all" else self.binarize


def load_recipe(name: str = "finetune", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name or file, with `overrides` (field -> value, or its text) on top. Raises InputError.

    >>> recipe = load_recipe("quick", {"lr": "1e-3"})
    >>> recipe.epochs, recipe.lr, recipe.opt
    (6, 0.001, 'adamw')
    """
    return build_recipe({**read_recipe_fields(name), **(overrides or {})}, origin=f"recipe {name}")


def read_recipe_fields(name: str) -> dict[str, Any]:
    """The fields that a shipped recipe or a YAML file states, unvalidated."""
    return parse_recipe(recipe_text(name), origin=f"recipe {name}")


def parse_recipe(text: str, origin: str) -> dict[str, Any]:
    """YAML text -> its fields. Raises InputError naming `origin` and the line."""
    try:
        fields = _from_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{origin}: not valid YAML: {one_line(' '.join(str(error).split()))}") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise InputError(f"{origin}: expected lines of `field: value`; `siman recipes show finetune` shows one")
    return fields


def build_recipe(fields: Mapping[str, Any], origin: str) -> Recipe:
    """Validate fields into a recipe; unknown keys are refused with close matches. Raises InputError."""
    for key in fields:
        if key not in Recipe.model_fields:
            raise InputError(f"{origin}: unknown field {_shown(key)}{_did_you_mean(key, Recipe.model_fields)}")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        what = (
            f"{place}: {first['msg']}, got {_shown(first['input'])}"
            if place
            else first["msg"].removeprefix("Value error, ")
        )
        raise InputError(f"{origin}: {one_line(what)}") from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts of `--set` -> fields; values are read as YAML scalars or lists."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set {assignment}: expected key=value, for example --set lr=0.05")
        fields[key.strip()] = _parse_value(key.strip(), value)
    return fields


def _parse_value(key: str, value: str) -> Any:
    try:
        return _from_yaml(value)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise InputError(f"--set {key}: cannot read the value {value!r}") from None


class _Loader(yaml.SafeLoader):
    """YAML's plain values. Not aliases: with them a page of text unfolds to more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not read; write the value out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """No field needs more digits, and converting many takes time that grows with their square."""
        if len(node.value) > 100:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _from_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _shown(value: Any) -> str:
    """repr, cut short at any length and depth."""
    return one_line(_REPR.repr(value))


def shipped_recipes() -> dict[str, str]:
    """Name -> first comment line of every shipped recipe, in alphabetical order."""
    files = sorted((item for item in _folder().iterdir() if item.name.endswith(".yaml")), key=lambda item: item.name)
    return {item.name.removesuffix(".yaml"): _headline(item.read_text(encoding="utf-8")) for item in files}


def recipe_text(name: str) -> str:
    """Text of a shipped recipe, or of a file when `name` is a path to one. Raises InputError with close matches."""
    if name in shipped_recipes():
        return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no recipe {name!r}: neither shipped nor a file{_did_you_mean(name, shipped_recipes())}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InputError(f"recipe {name}: larger than {MAX_RECIPE_BYTES} bytes, not a recipe")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {name}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"recipe {name}: cannot be read ({error.strerror})") from None


def _folder() -> Traversable:
    return importlib.resources.files("siman_convert.recipes")


def _headline(text: str) -> str:
    return text.partition("\n")[0].lstrip("# ").rstrip()


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else f"; known: {', '.join(known)}"
