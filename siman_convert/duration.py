"""How long a training step will take, from a few real ones on a copy of the model."""

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from siman_convert.objective import Objective
from siman_convert.plans import Plan
from siman_convert.recipe import Recipe
from siman_convert.schedule import make_optimizer
from siman_convert.surgery import apply_plan, binary_layers
from siman_convert.train import TrainingStep

TIMED_BATCH = 16  # images in the larger of the two batches that a large one is extrapolated from


def seconds_per_step(
    model: nn.Module, plan: Plan | None, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device
) -> float:
    """Forward, backward and update of one optimizer step on random images; with a `plan`, of the converted model."""
    model = copy.deepcopy(model)
    if plan:
        model = apply_plan(model, plan, init="copy", selection=recipe.binarizer)
    step = TrainingStep(model, Objective()).to(device).train()
    optimizer = make_optimizer(model, recipe, recipe.lr)

    def seconds(images: int) -> float:
        batch = torch.randn(images, *input_size, device=device)
        targets = torch.zeros(images, dtype=torch.int64, device=device)
        times = []
        for _ in range(3):
            started = _clock(device)
            for layer in binary_layers(model).values():
                layer.clip_weights_(recipe.clip_percent)
            step(batch, targets)[0].backward()
            optimizer.step()
            times.append(_clock(device) - started)
        return min(times)  # the first run warms up

    return _of_whole_step(seconds, recipe, device)


def seconds_of_teacher(
    teacher: nn.Module, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device
) -> float:
    """What a teacher's answers add to one optimizer step."""
    teacher = copy.deepcopy(teacher).to(device).eval()

    @torch.no_grad()
    def seconds(images: int) -> float:
        batch = torch.randn(images, *input_size, device=device)
        times = []
        for _ in range(3):
            started = _clock(device)
            teacher(batch)
            times.append(_clock(device) - started)
        return min(times)

    return _of_whole_step(seconds, recipe, device)


def _of_whole_step(seconds: Callable[[int], float], recipe: Recipe, device: torch.device) -> float:
    """From the `seconds` that so many images take to those of a step of the recipe.

    On a CPU a large batch is extrapolated from two small ones: clip, bits and update cost the same for any batch.
    """
    if device.type != "cpu" or recipe.batch_size <= TIMED_BATCH:
        return seconds(max(2, recipe.batch_size)) * recipe.grad_accum_steps
    quarter, whole = seconds(TIMED_BATCH // 4), seconds(TIMED_BATCH)
    per_image = max(0.0, whole - quarter) / (TIMED_BATCH - TIMED_BATCH // 4)
    return (whole + per_image * (recipe.batch_size - TIMED_BATCH)) * recipe.grad_accum_steps


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spoken(seconds: float) -> str:
    """Seconds as a person says it."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(count: int, what: str) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
