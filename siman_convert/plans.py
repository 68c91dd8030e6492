"""Which convolutions of a model become binary, and why: one decision with a reason for each. Changes nothing.

The rules look at the shape-tracing forward (`trace.py`) and at the modules, never at names. The first that applies
decides: what the user asked for, what the network was designed for, then what gains nothing or costs too much accuracy
(stem, classifier, depthwise, 1x1 maps, 1x1 shortcuts), then what the layer cannot stand in for yet; every other
convolution is binarized.
The plan is made at the input size that the network is to train and run at; the model's native one where none is given.
Small images alone keep nothing in full precision: maps that are 1x1 only because of them belong to a network's last stages, which
hold most of its weights (ResNet-18 at 32x32 would keep 91 % of its bytes). So a convolution is one of a 1x1 map where it is
one at the given size and at the native one: a gate is at both, whatever the images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.utils.parametrize as parametrize
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from siman_convert.errors import InputError
from siman_convert.timm_convs import CONVOLUTIONS, is_understood
from siman_convert.topology import Topology, decide_topology
from siman_convert.trace import Call, Trace, image_readers, shortcut_convs, trace

Count = Annotated[int, Field(ge=0)]
Pair = tuple[Count, Count]
Size = tuple[Count, Count, Count]  # (C, H, W)


@dataclass(frozen=True)
class ConvDecision:
    """What happens to one convolution; shapes are (C, H, W) of its largest call, None if it is never called."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    binarize: bool
    reason: str
    in_channels: Count
    out_channels: Count
    kernel_size: Pair
    stride: Pair
    padding: Pair | Literal["same", "valid"]
    dilation: Pair
    groups: Count
    bias: bool
    input_shape: Size | None
    output_shape: Size | None
    calls: Count


@dataclass(frozen=True)
class Plan:
    """The decisions for every convolution of a model, in the model's own order, and what changes around the binary ones."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str
    input_size: Size
    decisions: tuple[ConvDecision, ...]
    topology: Topology

    @property
    def binarized(self) -> list[str]:
        return [decision.name for decision in self.decisions if decision.binarize]

    def to_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings, numbers, booleans and None."""
        as_json: dict[str, Any] = _json().dump_python(self, mode="json")
        return as_json

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The inverse of `to_dict`, strict: a missing or unknown field or a value of another type is an InputError."""
        try:
            plan: Plan = _json().validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"plan: {'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"plan: not JSON: {error}") from error
        repeated = [name for name, count in Counter(d.name for d in plan.decisions).items() if count > 1]
        if repeated:
            raise InputError(f"plan: {repeated[0]!r} has more than one decision")
        return plan


@cache
def _json() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def make_plan(
    model: nn.Module,
    *,
    name: str = "",
    input_size: Size | None = None,
    keep: Sequence[str] = (),
    binarize: Sequence[str] = (),
    shortcuts: bool = False,
    prelu: bool = False,
    shifts: bool = False,
) -> Plan:
    """Decide for every convolution of `model`; `keep` and `binarize` are globs on module names and go before all rules.

    `input_size` (C, H, W): what it trains and runs at, by default the size in the model's timm configuration. A model may
    have an attribute `binary_by_design`, glob -> whether, which goes before the rules, too; what cannot be binary is left
    to them.
    `shortcuts`, `prelu` and `shifts` ask for what `topology` decides.
    """
    size = input_size or native_input_size(model)
    convs: dict[str, Any] = {path: module for path, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    kept, asked = _matches(keep, convs, "keep"), _matches(binarize, convs, "binarize")
    design: Mapping[str, bool] = getattr(model, "binary_by_design", {})
    graph = trace(model, size)
    facts = _Facts.of(model, graph)
    decisions = []
    for path, conv in convs.items():
        if path in kept:
            verdict = False, f"you asked to keep {kept[path]}"
        elif path in asked:
            obstacle = _impossible(path, conv, facts)
            if obstacle:
                raise InputError(f"--binarize {asked[path]}: {path} cannot be binarized: {obstacle}; --keep it instead")
            verdict = True, f"you asked to binarize {asked[path]}"
        elif (wish := _by_design(path, conv, design, facts)) is not None:
            verdict = wish, f"{'binary' if wish else 'full precision'} by the network's design"
        else:
            reason = next((why for rule in _RULES if (why := rule(path, conv, facts))), None)
            verdict = reason is None, reason or _taps(conv)
        decisions.append(_decision(path, conv, *verdict, graph))
    binary = [decision.name for decision in decisions if decision.binarize]
    topology = decide_topology(model, graph, binary, shortcuts=shortcuts, prelu=prelu, shifts=shifts)
    return Plan(name or type(model).__name__, size, tuple(decisions), topology)


def at_size(plan: Plan, model: nn.Module, input_size: Size) -> Plan:
    """The same decisions with the shapes on images of `input_size`: earlier versions planned at the model's native size."""
    if plan.input_size == input_size:
        return plan
    graph = trace(model, input_size)
    decisions = tuple(replace(decision, **_seen(decision.name, graph)) for decision in plan.decisions)
    return replace(plan, input_size=input_size, decisions=decisions)


def native_input_size(model: nn.Module) -> Size:
    """(C, H, W) the model was made for, from timm's configuration; C follows the model (`in_chans=1`)."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    if size is None:
        raise InputError(f"{type(model).__name__} does not say its input size; give one, such as (3, 224, 224)")
    channels, height, width = size
    first = config.get("first_conv") if isinstance(config, Mapping) else None
    stem = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    if isinstance(stem, nn.Conv2d) and stem.in_channels % channels:  # a multiple is a space-to-depth stem
        channels = stem.in_channels
    return int(channels), int(height), int(width)


# The rules: (name, module, facts) -> why it is kept, or None.


@dataclass(frozen=True)
class _Facts:
    """What the rules need to know of the whole model."""

    model: nn.Module
    graph: Trace
    classifiers: frozenset[int]  # ids of modules
    readers: frozenset[str]
    shortcuts: frozenset[str]
    sharers: Mapping[int, int]  # id of a parameter -> how many modules hold it

    @classmethod
    def of(cls, model: nn.Module, graph: Trace) -> _Facts:
        get_classifier: Any = getattr(model, "get_classifier", None)
        head = get_classifier() if callable(get_classifier) else None
        heads = head if isinstance(head, tuple | list) else [head]
        held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        found = frozenset(id(module) for module in heads if isinstance(module, nn.Conv2d))
        return cls(model, graph, found, image_readers(graph), shortcut_convs(graph), held)

    @cached_property
    def native(self) -> Trace:
        """The forward at the model's own size; the one there is where it says none, or cannot run at it."""
        try:
            size = native_input_size(self.model)
            return self.graph if size == self.graph.input_size else trace(self.model, size)
        except InputError:
            return self.graph


_Rule = Callable[[str, nn.Conv2d, _Facts], str | None]


def _unreached(path: str, _conv: nn.Conv2d, facts: _Facts) -> str | None:
    if path in facts.graph.calls:
        return None
    if path in facts.graph.read_outside:
        return "not called itself: another module computes with its weights"
    return "never reached by the forward"


def _constant(path: str, _conv: nn.Conv2d, facts: _Facts) -> str | None:
    """Of a table of positions, say: left as it is, the whole convolution is computed at export, and then never again."""
    seen = any(node.kind == "conv" and node.module == path for node in facts.graph.nodes)
    return None if seen else "its input does not depend on the image"


def _classifier(_path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    return "the classifier" if id(conv) in facts.classifiers else None


def _stem(path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    if path in facts.readers:
        return "stem: reads the image"
    return "3 input channels, like an image" if conv.in_channels == 3 else None


def _depthwise(_path: str, conv: nn.Conv2d, _facts: _Facts) -> str | None:
    if conv.in_channels != conv.groups:
        return None
    what = "depthwise" if conv.groups > 1 else "one input channel"
    return f"{what}: {_taps(conv)}"


def _no_map(path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    reason = _covers(conv, facts.graph.calls[path])
    return reason if reason and _covers(conv, facts.native.calls.get(path, ())) else None


def _covers(conv: nn.Conv2d, calls: Sequence[Call]) -> str | None:
    """Why there is no map to slide over in any of these calls."""
    maps = {call.input_shape[-2:] for call in calls}
    if maps == {(1, 1)}:
        return "input map is 1x1"
    kh, kw = (d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if maps and all(kh >= h and kw >= w for h, w in maps):
        return f"{_by(conv.kernel_size)} kernel covers its {_by(max(maps))} input"
    return None


def _shortcut(path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    return "1x1 residual shortcut" if conv.kernel_size == (1, 1) and path in facts.shortcuts else None


def _irreplaceable(path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    if not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} mixes another weight for every image"
    if parametrize.is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is parametrized, which is not supported yet"
    if not is_understood(conv):
        return f"{type(conv).__name__} convolves in its own way, which is not supported yet"
    if any(p is not None and facts.sharers[id(p)] > 1 for p in conv._parameters.values()):
        return "it shares its weights with another module"
    if path in facts.graph.read_outside:
        return "its weights are also read from outside"
    if conv.padding_mode != "zeros":
        return f"its padding is {conv.padding_mode!r}; only zeros are supported"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "it carries forward hooks"
    if not conv.weight.is_floating_point():
        return f"its weights are {str(conv.weight.dtype).removeprefix('torch.')}"
    return None


_RULES: tuple[_Rule, ...] = (_unreached, _classifier, _stem, _depthwise, _no_map, _shortcut, _irreplaceable, _constant)


def _impossible(path: str, conv: nn.Conv2d, facts: _Facts) -> str | None:
    """Why not even the user's wish makes it binary: the unbiased variances of the method need two elements."""
    if tap_count(conv) < 2:
        return "a filter has one weight"
    if any(call.input_shape[-3:] == (1, 1, 1) for call in facts.graph.calls.get(path, ())):
        return "its input is a single number"
    return _unreached(path, conv, facts) or _irreplaceable(path, conv, facts) or _constant(path, conv, facts)


def _by_design(path: str, conv: nn.Conv2d, design: Mapping[str, bool], facts: _Facts) -> bool | None:
    """What the network says of this convolution; None where it says nothing, or what cannot be."""
    wish = next((binary for glob, binary in design.items() if fnmatchcase(path, glob)), None)
    return None if wish and _impossible(path, conv, facts) else wish


def tap_count(conv: nn.Conv2d) -> int:
    """Weights of one filter. Not asked of `conv.weight`: a parametrized one is computed when read."""
    return prod(conv.kernel_size) * (conv.in_channels // conv.groups)


def _taps(conv: nn.Conv2d) -> str:
    taps = tap_count(conv)
    return f"{taps} {'tap' if taps == 1 else 'taps'} a filter"


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))


def _decision(path: str, conv: nn.Conv2d, binarize: bool, reason: str, graph: Trace) -> ConvDecision:
    padding: Any = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
    return ConvDecision(
        name=path,
        binarize=binarize,
        reason=reason,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=_pair(conv.kernel_size),
        stride=_pair(conv.stride),
        padding=padding,
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        **_seen(path, graph),
    )


def _seen(path: str, graph: Trace) -> dict[str, Any]:
    """What a decision says of a convolution's calls."""
    calls = graph.calls.get(path, ())
    largest = max(calls, key=lambda call: call.input_shape[-2] * call.input_shape[-1], default=None)
    return {
        "input_shape": None if largest is None else _chw(largest.input_shape),
        "output_shape": None if largest is None else _chw(largest.output_shape),
        "calls": len(calls),
    }


def _pair(values: Sequence[int]) -> Pair:
    return int(values[0]), int(values[1])


def _chw(shape: Sequence[int]) -> Size:
    return int(shape[-3]), int(shape[-2]), int(shape[-1])


def _matches(globs: Sequence[str], convs: Mapping[str, nn.Conv2d], option: str) -> dict[str, str]:
    """Convolution -> the first glob that matches it."""
    found: dict[str, str] = {}
    for glob in globs:
        names = [name for name in convs if fnmatchcase(name, glob)]
        if not names:
            inside = [f"{glob}.*"] if any(name.startswith(f"{glob}.") for name in convs) else []
            close = inside or get_close_matches(glob, convs, n=3, cutoff=0.5) or list(convs)[:3]
            hint = f"; did you mean {', '.join(close)}?" if close else "; the model has none"
            raise InputError(f"--{option} {glob}: no convolution has such a name{hint}")
        for name in names:
            found.setdefault(name, glob)
    return found
