"""What a packed model says about itself, in both file formats: all that evaluating it far from its run needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from siman_convert.data import Preprocess
from siman_convert.errors import InputError
from siman_convert.plans import Plan

FORMAT = 2  # of the files; raised when a reader of the old one would be wrong
KEY = "siman"  # the metadata key, in safetensors and ONNX
_ATTRIBUTE = "siman_description"  # on the module that `load` and `frozen_run` give


@dataclass(frozen=True)
class Accuracy:
    """top1, top5: percent of `images` validation images of the data set named `data`, before export."""

    top1: float
    top5: float
    images: int
    data: str


@dataclass(frozen=True)
class Description:
    """A packed model, its tensors apart.

    architecture: timm's name; it is created with as many classes as `classes` has. weights: which of the run's, "best" or
    "last". half: the remaining full-precision weights were rounded to float16. No time, host or path.
    """

    architecture: str
    plan: Plan
    preprocess: Preprocess
    classes: tuple[str, ...]
    weights: Literal["best", "last"]
    recipe_digest: str
    accuracy: Accuracy | None
    siman_version: str
    half: bool = False


def canonical_json(value: Any) -> str:
    """The one way a value is written: sorted keys, no spaces, UTF-8 as it is, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def describe(model: nn.Module, description: Description) -> nn.Module:
    """Attach the description to a packed model, which is returned."""
    setattr(model, _ATTRIBUTE, description)
    return model


def description_of(model: nn.Module) -> Description:
    """The description of a packed model; InputError for any other module."""
    found = getattr(model, _ATTRIBUTE, None)
    if not isinstance(found, Description):
        raise InputError(f"{type(model).__name__} is not a packed model of siman; siman_convert.load gives one")
    return found


def as_half(description: Description) -> Description:
    return replace(description, half=True)
