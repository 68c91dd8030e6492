"""The numbered checks before a conversion: environment, data, plan, time. Nothing is written before all of them passed."""

import math
from dataclasses import dataclass

import torch

from siman_convert.costs import Costs, plan_costs
from siman_convert.data import (
    Augment,
    Preprocess,
    Source,
    eval_transform,
    open_source,
    resolve_preprocess,
    train_transform,
)
from siman_convert.duration import seconds_per_step, spoken
from siman_convert.environment import describe_environment
from siman_convert.errors import InputError
from siman_convert.models import LoadedModel, create, load_model
from siman_convert.plans import Plan, make_plan
from siman_convert.recipe import Recipe
from siman_convert.runs import Run
from siman_convert.subjects import open_run_data
from siman_convert.train import Data
from siman_convert.watch import Watcher


@dataclass(frozen=True)
class Job:
    """A conversion after its checks: everything needed to train."""

    loaded: LoadedModel
    source: Source
    preprocess: Preprocess
    data: Data
    plan: Plan
    costs: Costs
    recipe: Recipe


def check_environment(device: torch.device, processes: int, watcher: Watcher) -> None:
    """Step 1."""
    facts = describe_environment(device)
    several = f", {processes} processes" if processes > 1 else ""
    packages = facts["packages"]
    text = f"{facts['device']}, {facts['threads']} threads{several}, torch {packages['torch']}, timm {packages['timm']}"
    watcher.stage(1, "environment", text)


def check_job(model: str, data: str, recipe: Recipe, weights: str, workers: int, watcher: Watcher) -> Job:
    """Steps 2 and 3 of a new run: the data, then the model with its plan."""
    source = open_source(data, val_split=recipe.val_split, seed=recipe.seed)
    _report_data(source, watcher)
    torch.manual_seed(recipe.seed)  # a new head, or all weights, are drawn at random
    loaded = load_model(model, len(source.classes), weights)
    preprocess, note = resolve_preprocess(
        loaded.module,
        image_size=source.image_size,
        img_size=recipe.img_size,
        mean=recipe.mean,
        std=recipe.std,
        crop_pct=recipe.crop_pct,
        interpolation=recipe.interpolation,
        pad_to_size=recipe.pad_to_size,
    )
    plan = make_plan(loaded.module, name=model, keep=recipe.keep, binarize=recipe.binarize)
    if not plan.binarized:
        raise InputError(
            f"{model}: none of its {len(plan.decisions)} convolutions can be binarized; "
            f"`siman inspect {model}` gives the reason of each"
        )
    job = _assemble(loaded, source, preprocess, plan, recipe, workers)
    _report_plan(job, watcher)
    if note:
        watcher.note(note)
    if loaded.new_head and weights != "none" and recipe.fp_epochs == 0:
        watcher.note(
            f"the classifier is new for these {len(source.classes)} classes and starts untrained; "
            "--fp-epochs N would fine-tune the full-precision model first"
        )
    return job


def check_resumed_job(run: Run, workers: int, watcher: Watcher) -> Job:
    """Steps 2 and 3 of a run to go on with: its own data and plan. The model has no weights yet if there is a state."""
    info, recipe = run.info(), run.recipe()
    if recipe.digest() != info.recipe_digest:
        raise InputError(
            f"{run.folder / 'recipe.yaml'} was changed since the run started; undo that, or start a new run"
        )
    source = open_run_data(run)
    _report_data(source, watcher)
    if run.state() is None:
        torch.manual_seed(recipe.seed)
        loaded = load_model(info.model, len(info.classes), info.weights)
    else:
        loaded = LoadedModel(create(info.model, len(info.classes)), info.model, info.weights, info.new_head)
    job = _assemble(loaded, source, Preprocess.from_dict(info.preprocess), run.plan(), recipe, workers)
    _report_plan(job, watcher)
    return job


def check_duration(job: Job, device: torch.device, processes: int, watcher: Watcher) -> None:
    """Step 4: how long the whole run will take."""
    recipe = job.recipe
    steps = math.ceil(len(job.source.train) / (recipe.batch_size * recipe.grad_accum_steps * processes))
    phases = [("full-precision", recipe.fp_epochs, None), ("binary", recipe.epochs, job.plan)]
    parts, total = [], 0.0
    for name, epochs, plan in phases:
        if epochs:
            step = seconds_per_step(job.loaded.module, plan, recipe, job.preprocess.input_size, device)
            plural = "s" if epochs > 1 else ""
            parts.append(f"{epochs} {name} epoch{plural} of {steps} steps at about {spoken(step)}")
            total += epochs * steps * step
    watcher.stage(4, "time", f"{', then '.join(parts)}; about {spoken(total)} in all" if parts else "nothing to train")


def _assemble(
    loaded: LoadedModel, source: Source, preprocess: Preprocess, plan: Plan, recipe: Recipe, workers: int
) -> Job:
    augment = Augment(
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        aa=recipe.aa,
        reprob=recipe.reprob,
        no_aug=recipe.no_aug,
        crop_padding=recipe.crop_padding,
    )
    data = Data(
        train=source.train,
        val=source.val,
        train_transform=train_transform(preprocess, augment),
        eval_transform=eval_transform(preprocess),
        classes=len(source.classes),
        workers=workers,
    )
    return Job(loaded, source, preprocess, data, plan, plan_costs(loaded.module, plan), recipe)


def _report_data(source: Source, watcher: Watcher) -> None:
    height, width = source.image_size
    counts = f"{len(source.train):,} training and {len(source.val):,} validation images of about {width}x{height}"
    watcher.stage(2, "data", f"{source.name} ({source.kind}): {len(source.classes)} classes, {counts}")


def _report_plan(job: Job, watcher: Watcher) -> None:
    plan, costs = job.plan, job.costs
    share = 100 * (1 - costs.float_macs_share)
    size = f"{costs.bytes_before / 1e6:.1f} -> {costs.bytes_after / 1e6:.1f} MB"
    text = f"{plan.model}: {len(plan.binarized)} of {len(plan.decisions)} convolutions become binary, {share:.1f} % of the work"
    watcher.stage(3, "plan", f"{text}; {size}; input {'x'.join(map(str, job.preprocess.input_size))}")
