"""Carries out a plan: the planned convolutions become binary layers, in place, with the planned topology around them.

No layer is judged here; what may become binary is decided in `plans.py`, what changes around it in `topology.py`.
Everything is checked before the first swap, so a plan that does not fit leaves the model as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from siman_convert.binarize import Selection
from siman_convert.blocks import BinaryUnit, Shift, ShiftedPReLU, behind_norm, norm_alone
from siman_convert.errors import InputError
from siman_convert.layers import Binarized, Init, SiMaNConv2d
from siman_convert.plans import ConvDecision, Plan
from siman_convert.topology import Activation, Topology

M = TypeVar("M", bound=nn.Module)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    init: Init = "remap",
    selection: Selection = "half",
    seed: int = 0,
    binarizes: Binarized = "all",
) -> nn.Module:
    """Swap what is planned of `model` and return it (a model that is itself one convolution: its replacement).

    Device, dtype, training flags and requires_grad stay; a module registered under several names is swapped under all.
    What `init="scratch"` draws for a layer depends on `seed` and the layer's name alone, not on the layers around it.
    """
    center = not plan.topology.shifts
    layers = {
        name: SiMaNConv2d.from_float(conv, init, selection, _generator(seed, name), binarizes, center)
        for name, conv in planned_convs(model, plan).items()
    }
    return put_in_place(model, plan.topology, layers)


def put_in_place(model: nn.Module, topology: Topology, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Swap the convolutions of these names for `layers`, the planned topology around them, in place, and return the model.

    Raises InputError, before anything changes, where the topology does not fit the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    factory = {"device": like.device, "dtype": like.dtype}
    norms = {conv: _planned_norm(modules, conv, norm) for conv, norm in topology.norm_of.items()}
    activations: dict[int, nn.Module] = {}
    for decision in topology.prelus:
        before = _planned_activation(modules, decision)
        kind = ShiftedPReLU if topology.shifts else nn.PReLU
        activations[id(before)] = kind(decision.channels, decision.slope, **factory).train(before.training)
    model = swap(model, activations)  # first: some are inside norms that are swapped next
    replacements = {id(modules[name]): layer for name, layer in layers.items()}
    for name, layer in layers.items() if topology.shifts or norms else ():
        norm, conv = norms.get(name), modules[name]
        assert isinstance(conv, nn.Conv2d)  # planned_convs gave it
        shift = Shift(conv.in_channels, **factory) if topology.shifts else None
        if norm is not None or shift is not None:
            replacements[id(conv)] = BinaryUnit(layer, None if norm is None else norm_alone(norm), shift)
        if norm is not None:
            replacements[id(norm)] = behind_norm(norm)
    return swap(model, replacements)


def planned_convs(model: nn.Module, plan: Plan) -> dict[str, nn.Conv2d]:
    """The convolutions of `model` that `plan` binarizes, by name; InputError where the plan does not fit the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {decision.name: _planned(modules, decision) for decision in plan.decisions if decision.binarize}


def swap(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put `replacements` (by id of the module replaced) in their places, under all names, and return the model."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in replacements:
                module._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


def binary_layers(model: nn.Module) -> dict[str, SiMaNConv2d]:
    """The binary layers of a model by the plan's names, those of the convolutions they replaced, in the model's order."""
    return planned_layers(model, SiMaNConv2d)


def planned_layers(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """The modules of that kind by the plan's names: one within a BinaryUnit has the unit's."""
    units = {id(unit.conv): name for name, unit in model.named_modules() if isinstance(unit, BinaryUnit)}
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, kind))
    return {units.get(id(module), name): module for name, module in found}


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _planned(modules: dict[str, nn.Module], decision: ConvDecision) -> nn.Conv2d:
    """The convolution a decision is about; InputError if the model has none like it under that name."""
    module = modules.get(decision.name)
    if module is None:
        raise InputError(
            f"the plan binarizes {decision.name}, which the model does not have; is it another model's plan?"
        )
    if not isinstance(module, nn.Conv2d) or isinstance(module, SiMaNConv2d):
        found = "is binary already" if isinstance(module, SiMaNConv2d) else f"is a {type(module).__name__} in the model"
        raise InputError(f"the plan binarizes {decision.name}, which {found}; expected an nn.Conv2d")
    for field in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        planned, found = getattr(decision, field), getattr(module, field)
        if planned != found:
            raise InputError(
                f"{decision.name}: the plan has {field} {planned}, the model {found}; is it another model's?"
            )
    if decision.bias != (module.bias is not None):
        raise InputError(f"{decision.name}: plan and model do not agree on whether it has a bias")
    return module


def _planned_norm(modules: dict[str, nn.Module], conv: str, name: str) -> nn.BatchNorm2d:
    """The BatchNorm that goes inside a convolution's shortcut; InputError if there is none that fits."""
    norm, planned = modules.get(name), modules.get(conv)
    if not isinstance(planned, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        raise InputError(f"the plan has a shortcut around {conv} and {name}, which are no Conv2d and BatchNorm2d here")
    if not planned.in_channels == planned.out_channels == norm.num_features:
        raise InputError(f"the plan has a shortcut around {conv} and {name}, whose channels are not equal")
    return norm


def _planned_activation(modules: dict[str, nn.Module], decision: Activation) -> nn.Module:
    module = modules.get(decision.name)
    if not isinstance(module, nn.ReLU | nn.LeakyReLU):
        raise InputError(f"the plan has a PReLU in place of {decision.name}, which is no ReLU here")
    return module
