"""What is trained when, and how fast: the phases of a run, their optimizer, and its learning rate."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from siman_convert.blocks import Shift
from siman_convert.recipe import Recipe
from siman_convert.runs import PhaseName
from siman_convert.surgery import binary_layers


@dataclass(frozen=True)
class Span:
    """What a phase trains, for how long, by which recipe, and where it lies in the run.

    `before` epochs of other phases are counted with its own in what is reported, of `total`; its clip has had `clipped_before`
    of its `clipped` epochs.
    """

    name: PhaseName
    recipe: Recipe
    epochs: int
    total: int
    before: int = 0
    clipped_before: int = 0
    clipped: int = 0
    lr: float = 0.0

    @classmethod
    def full_precision(cls, recipe: Recipe) -> "Span":
        """The epochs before the conversion."""
        return cls("full-precision", recipe, recipe.fp_epochs, recipe.fp_epochs, lr=recipe.fp_lr or recipe.lr)

    @classmethod
    def binary(cls, recipe: Recipe, stage: int) -> "Span":
        """A stage of the epochs after it."""
        at = recipe.resolved_stages[stage]
        return cls(at.name, at.recipe, at.recipe.epochs, recipe.binary_epochs, at.before, at.clipped_before,
                   recipe.clipped_epochs, at.recipe.lr)  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float, latent_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Weight decay 0 on every parameter of the binary layers, alpha, bias and shifts included; `weight_decay` elsewhere.

    l2 drives latent weights to a Laplacian, whose best bits carry less than one bit each; so the paper removes it there. In a
    stage of binary activations alone weights are no latents and decay as any others. `latent_weight_decay` is
    for latents all the same.
    """
    layers = binary_layers(model).values()
    thresholds = [module for module in model.modules() if isinstance(module, Shift)]
    binary = {id(p) for layer in (*layers, *thresholds) for p in layer.parameters()}
    binary -= {id(layer.weight) for layer in layers if layer.binarizes == "activations"}
    latents = {id(layer.weight) for layer in layers} & binary if latent_weight_decay else set()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in binary], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in binary - latents], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in latents], "weight_decay": latent_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimizer; momentum without dampening or Nesterov, as the authors'."""
    groups = parameter_groups(model, recipe.weight_decay, recipe.latent_weight_decay)
    if recipe.opt == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=lr)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, epochs: int, steps: int) -> CosineLRScheduler:
    """Cosine to min_lr after a linear warm-up, as a pure function of the update (or epoch): nothing to save."""
    unit = steps if recipe.sched_on_updates else 1
    warmup = min(recipe.warmup_epochs, max(0, epochs - 1))
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, (epochs - warmup) * unit),  # of 1 it warns, and its first rate is the same
        lr_min=recipe.min_lr,
        warmup_t=warmup * unit,
        warmup_lr_init=recipe.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=not recipe.sched_on_updates,
    )
