"""The numbered checks before a conversion: environment, data, plan, export, time. Nothing is written before all passed."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

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
from siman_convert.duration import counted, seconds_of_teacher, seconds_per_step, spoken
from siman_convert.environment import describe_environment
from siman_convert.errors import InputError
from siman_convert.models import LoadedModel, create, load_model, usual_weights
from siman_convert.objective import attention_distance, stage_outputs
from siman_convert.plans import Plan, at_size, make_plan, native_input_size
from siman_convert.recipe import Recipe
from siman_convert.runs import Run, RunInfo
from siman_convert.schedule import Span
from siman_convert.subjects import open_run_data
from siman_convert.train import Data
from siman_convert.trial import trial_export
from siman_convert.watch import Watcher

FEW_STEPS = 8  # in an epoch; with fewer a smaller batch is proposed
SMALLEST_BATCH = 8  # to propose: BatchNorm needs some images


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
    teacher: nn.Module | None = None  # another network than the model itself, in eval mode

    @property
    def distills(self) -> bool:
        """Whether the binary epochs learn from a teacher. A classifier that is still random has nothing to teach."""
        recipe = self.recipe
        knows = recipe.teacher is not None or recipe.fp_epochs > 0 or not self.loaded.new_head
        return recipe.distils and knows


def check_environment(device: torch.device, processes: int, recipe: Recipe, watcher: Watcher) -> None:
    """Step 1. Raises InputError."""
    if recipe.sync_bn and processes > 1 and device.type != "cuda":
        raise InputError(f"--sync-bn: torch synchronises BatchNorm on GPUs only, and this is {device.type}; leave it out, "
                         "or train in one process")  # fmt: skip
    facts = describe_environment(device)
    several = f", {processes} processes" if processes > 1 else ""
    packages = facts["packages"]
    threads = counted(facts["threads"], "thread")
    text = f"{facts['device']}, {threads}{several}, torch {packages['torch']}, timm {packages['timm']}"
    watcher.stage(1, "environment", text)


def check_job(model: str, data: str, recipe: Recipe, weights: str | None, workers: int, watcher: Watcher) -> Job:
    """Steps 2 and 3 of a new run: the data, then the model with its plan."""
    wanted = usual_weights(model) if weights is None else weights
    source = open_source(data, val_split=recipe.val_split, seed=recipe.seed)
    _report_data(source, watcher)
    torch.manual_seed(recipe.seed)  # a new head, or all weights, are drawn at random
    loaded = load_model(model, len(source.classes), wanted)
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
    plan = make_plan(
        loaded.module,
        name=model,
        input_size=preprocess.input_size,
        keep=recipe.keep,
        binarize=recipe.binarize,
        shortcuts=recipe.shortcuts,
        prelu=recipe.prelu,
        shifts=recipe.shifts,
    )
    if not plan.binarized:
        raise InputError(
            f"{model}: none of its {len(plan.decisions)} convolutions can be binarized; "
            f"`siman inspect {model}{_size_flag(plan, loaded.module)}` gives the reason of each"
        )
    teacher = _named_teacher(recipe, len(source.classes), preprocess)
    job = _assemble(loaded, source, preprocess, plan, recipe, workers, teacher)
    _report_plan(job, watcher)
    if note:
        watcher.note(note)
    if weights is None and wanted == "none":
        watcher.note(f"{model} has no pretrained weights; it starts from random ones")
    if loaded.new_head and wanted != "none" and recipe.fp_epochs == 0:
        watcher.note(
            f"the classifier is new for these {len(source.classes)} classes and starts untrained; "
            "--fp-epochs N would fine-tune the full-precision model first"
        )
    _require_stages(job)
    _report_teacher(job, watcher)
    return job


def check_resumed_job(run: Run, workers: int, watcher: Watcher) -> Job:
    """Steps 2 and 3 of a run to go on with: its own data and plan. The model has no weights yet if there is a state."""
    info, recipe = run.info(), run.recipe()
    if recipe.digest() != info.recipe_digest:
        raise InputError(
            f"{run.folder / 'recipe.yaml'} was changed since the run started; undo that, or start a new run"
        )
    source = open_run_data(run)
    _require_same_images(source, info)
    _report_data(source, watcher)
    if run.state() is None:
        torch.manual_seed(recipe.seed)
        loaded = load_model(info.model, len(info.classes), info.weights)
    else:
        loaded = LoadedModel(create(info.model, len(info.classes)), info.model, info.weights, info.new_head)
    preprocess = Preprocess.from_dict(info.preprocess)
    teacher = _named_teacher(recipe, len(info.classes), preprocess, run)
    plan = at_size(run.plan(), loaded.module, preprocess.input_size)
    job = _assemble(loaded, source, preprocess, plan, recipe, workers, teacher)
    _report_plan(job, watcher)
    _require_stages(job)
    _report_teacher(job, watcher)
    return job


def _size_flag(plan: Plan, model: nn.Module) -> str:
    """What `siman inspect MODEL` needs to show this plan."""
    return "" if plan.input_size == native_input_size(model) else f" --img-size {plan.input_size[1]}"


def _require_same_images(source: Source, info: RunInfo) -> None:
    """Raise InputError where images came or went: all orders and --val-split's choice are drawn from their list."""
    if info.data_digest in ("", source.digest()):
        return
    now, then = (f"{train:,} + {val:,}" for train, val in ((len(source.train), len(source.val)), info.images))
    raise InputError(f"{source.spec}: its images changed since the run started ({now} for training and validation, {then} then; "
                     "or their names); put back what is gone (an empty file of that name will do, it is skipped as unreadable), "
                     "remove what is new, or start a new run")  # fmt: skip


def check_export(job: Job, watcher: Watcher) -> None:
    """Step 4 of a new run: the untrained network goes the way to a file and through ONNX Runtime."""
    trial = trial_export(job.loaded.module, job.plan, job.preprocess, job.source.classes)
    size = f"{trial.bytes / 1e6:.1f} MB"
    watcher.stage(
        4, "export", f"{trial.binary} binary and {trial.operators - trial.binary} other operators, {size}; runs"
    )


def check_duration(job: Job, device: torch.device, processes: int, watcher: Watcher) -> None:
    """Step 5: how long the whole run will take. Raises InputError where its batches are too small."""
    recipe = job.recipe
    _require_batch(job, processes)

    def steps_of(batch_size: int) -> int:
        return math.ceil(len(job.source.train) / (batch_size * recipe.grad_accum_steps * processes))

    steps = steps_of(recipe.batch_size)
    spans = [Span.full_precision(recipe), *(Span.binary(recipe, i) for i in range(len(recipe.resolved_stages)))]
    parts, total = [], 0.0
    for span in spans:
        name, epochs = span.name, span.epochs
        if epochs:
            plan = None if name == "full-precision" else job.plan
            step = seconds_per_step(job.loaded.module, plan, span.recipe, job.preprocess.input_size, device)
            taught = ""
            if plan and job.distills and span.recipe.taught:
                teacher = job.teacher or job.loaded.module
                extra = seconds_of_teacher(teacher, recipe, job.preprocess.input_size, device)
                step, taught = step + extra, f" ({spoken(extra)} of it the teacher's)"
            what = f"{counted(epochs, f'{name} epoch')} of {counted(steps, 'step')}"
            parts.append(f"{what} at about {spoken(step)}{taught}")
            total += epochs * steps * step
    about = f"about {spoken(total)} of training steps in all"
    watcher.stage(5, "time", f"{', then '.join(parts)}; {about}" if parts else "nothing to train")
    smaller = recipe.batch_size
    while smaller > SMALLEST_BATCH and steps_of(smaller) < 2 * FEW_STEPS:
        smaller //= 2
    if parts and steps < FEW_STEPS and smaller < recipe.batch_size:
        watcher.note(
            f"an epoch is only {counted(steps, 'step')}, which trains little; -b {smaller} makes it {steps_of(smaller)}"
        )


def _require_batch(job: Job, processes: int) -> None:
    """Raise InputError where training takes single images, and the network has a BatchNorm of one value a channel."""
    trained = job.recipe.fp_epochs + job.recipe.binary_epochs
    if not trained or min(job.recipe.batch_size, math.ceil(len(job.source.train) / processes)) > 1:
        return
    try:
        copy.deepcopy(job.loaded.module).train()(torch.zeros(1, *job.preprocess.input_size))
    except ValueError as error:
        raise InputError(f"{job.loaded.name} cannot train on one image at a time ({error}); expected --batch-size 2 or more, "
                         "and as many images for every process") from error  # fmt: skip


def _named_teacher(recipe: Recipe, classes: int, preprocess: Preprocess, run: Run | None = None) -> nn.Module | None:
    """The recipe's own teacher, from the run where it is kept there already; None: the model teaches itself, or nothing does.

    Raises InputError where it cannot be had, has other classes, or cannot take the images.
    """
    if recipe.teacher is None or not recipe.distils:
        return None
    name, _, file = recipe.teacher.partition("=")
    kept = run.folder / "teacher.safetensors" if run else None
    weights = str(kept) if kept and kept.is_file() else file or "pretrained"
    try:
        loaded = load_model(name, classes, weights)
        teacher = loaded.module.eval()
        if loaded.new_head:
            raise InputError(f"its classifier is not one of {classes} classes, as these data need")
        _try(teacher, preprocess.input_size)
    except InputError as error:
        raise InputError(f"--teacher {recipe.teacher}: {error}") from error
    if not file:  # of weights in a file it is not known which images they were trained on: the model's, most likely
        _normalise_as_trained(teacher, preprocess)
    return teacher


def _normalise_as_trained(teacher: nn.Module, preprocess: Preprocess) -> None:
    """Images come with the mean and std of `preprocess`; those that timm states for the teacher take their place."""
    own, _ = resolve_preprocess(teacher, image_size=preprocess.input_size[1:])
    if (own.mean, own.std) == (preprocess.mean, preprocess.std):
        return
    given_mean, given_std, mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std, own.mean, own.std)
    )
    scale, shift = given_std / std, (given_mean - mean) / std

    def normalise(_teacher: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (images,) = inputs
        return images * scale.to(images) + shift.to(images)

    teacher.register_forward_pre_hook(normalise)


@torch.no_grad()
def _require_stages(job: Job) -> None:
    """Raise InputError where features are to be compared and cannot be."""
    if not job.distills or not any(stage.recipe.feature_weight for stage in job.recipe.resolved_stages):
        return
    model, image = copy.deepcopy(job.loaded.module).eval(), torch.zeros(1, *job.preprocess.input_size)
    with stage_outputs(model) as features:
        model(image)
    with stage_outputs(job.teacher or model) as shown:
        (job.teacher or model)(image)
    attention_distance(features, shown)


@torch.no_grad()
def _try(teacher: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Raise InputError unless the network takes images of that size: some take one size only."""
    try:
        teacher(torch.zeros(1, *input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        size, reason = "x".join(map(str, input_size)), " ".join(str(error).split())[:160]
        raise InputError(f"it cannot take images of {size} ({reason}); choose another, or --img-size") from error


def _assemble(
    loaded: LoadedModel,
    source: Source,
    preprocess: Preprocess,
    plan: Plan,
    recipe: Recipe,
    workers: int,
    teacher: nn.Module | None,
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
    return Job(loaded, source, preprocess, data, plan, plan_costs(loaded.module, plan), recipe, teacher)


def _report_teacher(job: Job, watcher: Watcher) -> None:
    recipe = job.recipe
    if recipe.distils and not job.distills:
        watcher.note(
            "nothing to distil from: the model's classifier is random and would be its own teacher; training on labels alone "
            "(--fp-epochs N would train it first, --teacher NAME takes another)"
        )


def _report_data(source: Source, watcher: Watcher) -> None:
    height, width = source.image_size
    counts = f"{len(source.train):,} training and {len(source.val):,} validation images of about {width}x{height}"
    watcher.stage(2, "data", f"{source.name} ({source.kind}): {len(source.classes)} classes, {counts}")


def _report_plan(job: Job, watcher: Watcher) -> None:
    plan, costs = job.plan, job.costs
    share = 100 * (1 - costs.float_macs_share)
    size = f"{costs.bytes_before / 1e6:.1f} -> {costs.bytes_after / 1e6:.1f} MB"
    text = f"{plan.model}: {len(plan.binarized)} of {len(plan.decisions)} convolutions become binary, {share:.1f} % of the work"
    added, prelus = len(plan.topology.norm_of), len(plan.topology.prelus)
    around = f"; {added} shortcuts added" if plan.topology.shortcuts else ""
    around += f"; {prelus} PReLUs" if job.recipe.prelu else ""
    watcher.stage(3, "plan", f"{text}{around}; {size}; input {'x'.join(map(str, job.preprocess.input_size))}")
