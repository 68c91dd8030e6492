"""Trains phases without the command line around them, for test_distributed: alone, or as a script under torchrun.

    torchrun --nproc-per-node 2 phase_script.py DATA OUTPUT DEVICE

writes OUTPUT/<scenario>-<rank>.pt for every scenario: what `train` returns.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d

from siman_convert.conversion import _accelerator
from siman_convert.data import Augment, Preprocess, eval_transform, open_source, train_transform
from siman_convert.data.transforms import Transform
from siman_convert.guards import Stop
from siman_convert.launch import processes
from siman_convert.objective import Objective
from siman_convert.plans import make_plan
from siman_convert.recipe import Recipe
from siman_convert.runs import Progress, Run
from siman_convert.schedule import Span
from siman_convert.surgery import apply_plan
from siman_convert.train import Data, Phase
from siman_convert.watch import Watcher

GLOBAL_BATCH = 16  # of 320 images: 20 steps
SCENARIOS = {
    "frozen": Recipe(epochs=2, opt="sgd", lr=0.05),  # float64, BatchNorm frozen, a layer never used
    "features": Recipe(epochs=2, lr=0.05, label_weight=0.0, feature_weight=1.0),  # likewise; no logits in the loss
    "real": Recipe(epochs=2, opt="adamw", lr=3e-3, model_ema=True, model_ema_decay=0.9, mixup=0.2, grad_accum_steps=3),
    "sync": Recipe(epochs=2, opt="sgd", lr=0.05, sync_bn=True),  # float64, on GPUs
}


class Losses(Watcher):
    """Keeps the mean loss of the epoch after every step."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def step(self, done: int, loss: float, top1: float, lr: float) -> None:  # noqa: ARG002
        self.means.append(loss)


def double(transform: Transform) -> Transform:
    return lambda image: transform(image).double()


def taught_by(recipe: Recipe) -> torch.nn.Module | None:
    """A teacher of random weights, in float64, where the recipe has one."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=10).eval().double() if recipe.taught else None


def train(scenario: str, data: str, device: str) -> dict[str, Any]:
    """One epoch of 20 steps, and an evaluation: running mean losses, metrics and the state_dict that was evaluated."""
    recipe = SCENARIOS[scenario].model_copy(update={"batch_size": GLOBAL_BATCH // processes()})
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    model = apply_plan(model, make_plan(model))
    if scenario in ("frozen", "features"):
        model = freeze_batch_norm_2d(model)
        model.spare = torch.nn.Conv2d(3, 3, 1)  # which the forward pass never uses
    preprocess = Preprocess((3, 32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center")
    source = open_source(data)
    images = Data(source.train, source.val, train_transform(preprocess, Augment()), eval_transform(preprocess), 10, 0)
    if scenario != "real":
        model, images = (
            model.double(),
            replace(
                images, train_transform=double(images.train_transform), eval_transform=double(images.eval_transform)
            ),
        )
    objective = Objective(recipe.label_weight, teacher=taught_by(recipe), feature_weight=recipe.feature_weight)
    accelerator, losses, progress = _accelerator(recipe, device), Losses(), Progress(phase="binary")
    phase = Phase(
        Span.binary(recipe, 0), model, objective, images, accelerator, Run(Path("nowhere")), progress, losses, Stop()
    )
    phase._train_epoch()
    metrics = phase.evaluate()
    state = {name: value.detach().cpu().clone() for name, value in phase.evaluated_model.state_dict().items()}
    counts = {"top1": metrics.top1, "top5": metrics.top5, "images": metrics.images}
    return {"losses": losses.means, "metrics": counts, "loss": metrics.loss, "sums": progress.sums, "state": state}


if __name__ == "__main__":
    data, output, device = sys.argv[1:]
    for name in SCENARIOS:
        if (name == "sync") == (device == "cuda"):
            result = train(name, data, device)
            torch.save(result, Path(output) / f"{name}-{torch.distributed.get_rank()}.pt")
