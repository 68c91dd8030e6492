"""Carries out a plan: the planned convolutions become binary layers, in place, and nothing else changes.

No layer is judged here; what may become binary is decided in `plans.py`. Everything is checked before the first swap, so
a plan that does not fit leaves the model as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from siman_convert.binarize import Selection
from siman_convert.errors import InputError
from siman_convert.layers import Binarized, Init, SiMaNConv2d
from siman_convert.plans import ConvDecision, Plan


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    init: Init = "remap",
    selection: Selection = "half",
    seed: int = 0,
    binarizes: Binarized = "all",
) -> nn.Module:
    """Swap the planned convolutions of `model` and return it (a model that is itself one convolution: its replacement).

    Device, dtype, training flags and requires_grad stay; a module registered under several names is swapped under all.
    What `init="scratch"` draws for a layer depends on `seed` and the layer's name alone, not on the layers around it.
    """
    layers = {
        id(conv): SiMaNConv2d.from_float(conv, init, selection, _generator(seed, name), binarizes)
        for name, conv in planned_convs(model, plan).items()
    }
    return swap(model, layers)


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
    """The binary layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SiMaNConv2d)}


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
