"""The main job: a timm model and images in; a trained, evaluated binary network in a run folder out.

    check (environment, data, plan, time)  ->  full-precision epochs  ->  conversion, calibration  ->  binary epochs

Everything is decided and checked before anything is written; from then on the run folder can be resumed at any moment.
"""

import contextlib
import copy
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn

from siman_convert.calibrate import estimate_batch_norm, fit_scales
from siman_convert.costs import Costs, plan_costs
from siman_convert.data import (
    Augment,
    Preprocess,
    Source,
    eval_loader,
    eval_transform,
    iterate,
    open_source,
    resolve_preprocess,
    train_loader,
    train_transform,
    worker_error,
)
from siman_convert.environment import describe_environment, siman_version
from siman_convert.errors import InputError, SimanError
from siman_convert.files import disk_errors
from siman_convert.metrics import Metrics, evaluate_model
from siman_convert.models import LoadedModel, create, load_model, require_known
from siman_convert.plans import Plan, make_plan
from siman_convert.recipe import Recipe
from siman_convert.runs import Progress, Run, RunInfo, find_run, run_name
from siman_convert.surgery import apply_plan, binary_layers
from siman_convert.train import Data, Interrupted, Phase, PhaseName, Silent, Stop, TrainingStep, Watcher, make_optimizer

CALIBRATION_BATCH = 64  # images; statistics are averaged over batches, so this is not the training batch
TIMED_BATCH = 16  # images in the steps that the estimate of the duration is measured on


@dataclass(frozen=True)
class Options:
    """What decides where and on what a conversion runs, but not what it computes.

    device: "auto", "cpu", "cuda", "cuda:1", "mps". save_every: minutes between states within an epoch, None for never.
    """

    output: Path = Path("runs")
    experiment: str | None = None  # name of the run folder; None: <model>-<data>-<time>
    device: str = "auto"
    workers: int = 0
    save_every: float | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """A conversion after its checks: everything needed to train."""

    loaded: LoadedModel
    source: Source
    preprocess: Preprocess
    plan: Plan
    costs: Costs
    recipe: Recipe


@dataclass(frozen=True)
class Result:
    """What a finished conversion reports; top-1 in percent, None where not measured; sizes in bytes of tensors."""

    run: Path
    full_precision_top1: float | None
    best_top1: float
    best_epoch: int
    last_top1: float
    bytes_before: int
    bytes_after: int
    bad_images: int


def convert(
    model: str,
    data: str = "digits",
    *,
    recipe: Recipe | None = None,
    weights: str = "pretrained",
    options: Options | None = None,
    watcher: Watcher | None = None,
) -> Result | None:
    """Convert timm model `model` on `data`; None after a dry run. See `Options` and `recipe.Recipe` for the rest.

    Raises InputError for what the user can mend before anything is written, SimanError for what fails later (numerics,
    memory, disk) and Interrupted when a signal asked to stop; in both latter cases the run can be resumed.
    """
    recipe, options, watcher = recipe or Recipe(), options or Options(), watcher or Silent()
    with _one_line_errors(recipe), stopping_on_signals(watcher) as stop:
        require_known(model)
        accelerator = _accelerator(recipe, options.device)
        watcher = watcher if accelerator.is_main_process else Silent()
        _report_environment(accelerator, watcher)
        job = _check(model, data, recipe, weights, watcher)
        _report_duration(job, accelerator.device, watcher)
        if options.dry_run:
            return None
        run = _create_run(job, options, accelerator)
        return _train(job, run, options, watcher, stop)


def resume(run: Run, *, options: Options | None = None, watcher: Watcher | None = None) -> Result:
    """Go on with a run where its newest state left it; the recipe and the data are the run's own."""
    options, watcher = options or Options(), watcher or Silent()
    recipe, info = run.recipe(), run.info()
    with _one_line_errors(recipe), stopping_on_signals(watcher) as stop:
        accelerator = _accelerator(recipe, options.device)
        watcher = watcher if accelerator.is_main_process else Silent()
        if accelerator.is_main_process:
            run.publish()
        accelerator.wait_for_everyone()
        _report_environment(accelerator, watcher)
        source = open_run_data(run)
        _report_data(source, watcher)
        loaded = _starting_model(run, info, recipe)
        plan = run.plan()
        job = Job(loaded, source, Preprocess.from_dict(info.preprocess), plan, plan_costs(loaded.module, plan), recipe)
        return _train(job, run, options, watcher, stop)


def open_run_data(run: Run, data: str | None = None) -> Source:
    """The data a run was made with, or `data` of the same classes instead; InputError when the classes differ."""
    info, recipe = run.info(), run.recipe()
    source = open_source(data or info.data, val_split=recipe.val_split, seed=recipe.seed)
    if source.classes != info.classes:
        theirs, ours = len(source.classes), len(info.classes)
        raise InputError(
            f"{source.spec}: its {theirs} classes are not the {ours} that {run.name} was trained on; "
            "expected the same names in the same order"
        )
    return source


def load_run_model(run: Run, which: str = "best") -> nn.Module:
    """The `best`, `last` or `full-precision` model of a run, in eval mode. Raises InputError."""
    info = run.info()
    path = run.weights(which)
    model = create(info.model, len(info.classes))
    if which != "full-precision":
        model = apply_plan(model, run.plan(), init="copy", selection=run.recipe().binarizer)
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not this run's: {' '.join(str(error).split())[:160]}") from error
    return model.eval()


def _starting_model(run: Run, info: RunInfo, recipe: Recipe) -> LoadedModel:
    """The model to restore a state into; with no state yet, the one that the run started from."""
    if run.state() is None:
        torch.manual_seed(recipe.seed)
        return load_model(info.model, len(info.classes), info.weights)
    return LoadedModel(create(info.model, len(info.classes)), info.model, info.weights, info.new_head)


def _check(model: str, data: str, recipe: Recipe, weights: str, watcher: Watcher) -> Job:
    """Steps 2 and 3: the data, then the model with its plan."""
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
        raise InputError(f"{model}: none of its {len(plan.decisions)} convolutions can be binarized; "
                         f"`siman inspect {model}` gives the reason of each")  # fmt: skip
    job = Job(loaded, source, preprocess, plan, plan_costs(loaded.module, plan), recipe)
    _report_plan(job, watcher)
    if note:
        watcher.note(note)
    if loaded.new_head and weights != "none" and recipe.fp_epochs == 0:
        watcher.note(f"the classifier is new for these {len(source.classes)} classes and starts untrained; "
                     "--fp-epochs N would fine-tune the full-precision model first")  # fmt: skip
    return job


def _report_environment(accelerator: Accelerator, watcher: Watcher) -> None:
    facts = describe_environment(accelerator.device)
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    watcher.stage(1, "environment", f"{facts['device']}, {facts['threads']} threads{processes}, "
                  f"torch {facts['packages']['torch']}, timm {facts['packages']['timm']}")  # fmt: skip


def _report_data(source: Source, watcher: Watcher) -> None:
    height, width = source.image_size
    watcher.stage(2, "data", f"{source.name} ({source.kind}): {len(source.classes)} classes, {len(source.train):,} training "
                  f"and {len(source.val):,} validation images of about {width}x{height}")  # fmt: skip


def _report_plan(job: Job, watcher: Watcher) -> None:
    plan, costs = job.plan, job.costs
    watcher.stage(3, "plan", f"{plan.model}: {len(plan.binarized)} of {len(plan.decisions)} convolutions become binary, "
                  f"{100 * (1 - costs.float_macs_share):.1f} % of the work; {costs.bytes_before / 1e6:.1f} -> "
                  f"{costs.bytes_after / 1e6:.1f} MB; input {'x'.join(map(str, job.preprocess.input_size))}")  # fmt: skip


def _report_duration(job: Job, device: torch.device, watcher: Watcher) -> None:
    """Step 4: time a few real steps on a copy of the model and say how long the whole run will take."""
    recipe = job.recipe
    steps = math.ceil(len(job.source.train) / (recipe.batch_size * recipe.grad_accum_steps * _processes()))
    phases = [("full-precision", recipe.fp_epochs, False), ("binary", recipe.epochs, True)]
    parts, total = [], 0.0
    for name, epochs, binary in phases:
        if epochs:
            step = _seconds_per_step(job, device, binary=binary)
            plural = "s" if epochs > 1 else ""
            parts.append(f"{epochs} {name} epoch{plural} of {steps} steps at about {_duration(step)}")
            total += epochs * steps * step
    watcher.stage(
        4, "time", f"{', then '.join(parts)}; about {_duration(total)} in all" if parts else "nothing to train"
    )


def _seconds_per_step(job: Job, device: torch.device, *, binary: bool) -> float:
    """Forward, backward and update of one optimizer step on random images, in a copy of the model.

    On a CPU a large batch is extrapolated from two small ones: clip, bits and update cost the same for any batch.
    """
    recipe = job.recipe
    model = copy.deepcopy(job.loaded.module)
    if binary:
        model = apply_plan(model, job.plan, init="copy", selection=recipe.binarizer)
    step = TrainingStep(model, nn.CrossEntropyLoss()).to(device).train()
    optimizer = make_optimizer(model, recipe, recipe.lr)

    def seconds(images: int) -> float:
        batch = torch.randn(images, *job.preprocess.input_size, device=device)
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

    if device.type != "cpu" or recipe.batch_size <= TIMED_BATCH:
        return seconds(max(2, recipe.batch_size)) * recipe.grad_accum_steps
    quarter, whole = seconds(TIMED_BATCH // 4), seconds(TIMED_BATCH)
    per_image = max(0.0, whole - quarter) / (TIMED_BATCH - TIMED_BATCH // 4)
    return (whole + per_image * (recipe.batch_size - TIMED_BATCH)) * recipe.grad_accum_steps


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _duration(seconds: float) -> str:
    """Seconds as a person says it."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _create_run(job: Job, options: Options, accelerator: Accelerator) -> Run:
    """The run folder, made by the main process and known to all."""
    folder = [""]
    if accelerator.is_main_process:
        info = RunInfo(
            model=job.loaded.name,
            classes=job.source.classes,
            data=job.source.spec,
            data_name=job.source.name,
            preprocess=job.preprocess.to_dict(),
            weights=job.loaded.weights,
            new_head=job.loaded.new_head,
            recipe_digest=job.recipe.digest(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            siman_version=siman_version(),
        )
        name = options.experiment or run_name(job.loaded.name, job.source.name)
        environment = describe_environment(accelerator.device)
        with disk_errors(options.output):
            folder = [str(Run.create(options.output, name, info, job.recipe, job.plan, environment).folder)]
    broadcast_object_list(folder)
    return Run(Path(folder[0]))


def _train(job: Job, run: Run, options: Options, watcher: Watcher, stop: Stop) -> Result:
    """Both phases, from wherever the run's state is."""
    watcher.start_run(run.folder)
    progress, recipe = run.progress(), job.recipe
    aug = Augment(
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
        job.source.train,
        job.source.val,
        train_transform(job.preprocess, aug),
        eval_transform(job.preprocess),
        len(job.source.classes),
        options.workers,
    )

    def phase(name: PhaseName, model: nn.Module) -> Phase:
        accelerator = _accelerator(recipe, options.device)
        return Phase(name, model, recipe, data, accelerator, run, progress, watcher, stop, options.save_every)

    state = run.state()
    if progress.phase == "full-precision":
        full_precision = phase("full-precision", job.loaded.module)
        if state:
            full_precision.restore(state)
        _finish_full_precision(full_precision, measurable=not job.loaded.new_head)
        model = _converted(job, full_precision)
        progress.phase, progress.epoch = "binary", 0
        binary = phase("binary", model)
        binary.conclude(binary.evaluate(), {"phase": "binary", "epoch": 0}, ("last",))
    else:
        binary = phase("binary", apply_plan(job.loaded.module, job.plan, init="copy", selection=recipe.binarizer))
        binary.restore(cast(Path, state))
    binary.train()
    return _result(job, run, progress)


def _finish_full_precision(phase: Phase, *, measurable: bool) -> None:
    """The remaining full-precision epochs; with none, the top-1 of pretrained weights whose classifier is theirs."""
    phase.train()
    if measurable and phase.progress.top1("full-precision") is None:
        phase.conclude(phase.evaluate(), {"phase": "full-precision", "epoch": 0}, ("full-precision",))


def _converted(job: Job, phase: Phase) -> nn.Module:
    """The binary model made from a trained full-precision one, with scales and statistics re-estimated."""
    recipe = job.recipe
    full_precision = phase.evaluated_model
    model = apply_plan(copy.deepcopy(full_precision), job.plan, init=recipe.init, selection=recipe.binarizer)
    if recipe.calibration_images:
        phase.watcher.note(f"re-estimating alpha and BatchNorm on {recipe.calibration_images} training images")
        fit_scales(full_precision, model, _calibration_batches(phase))
        estimate_batch_norm(model, _calibration_batches(phase))
    return model


def _calibration_batches(phase: Phase) -> Iterator[Tensor]:
    """The same training images in every process, without augmentation."""
    data, recipe = phase.data, phase.recipe
    loader = train_loader(
        data.train, data.eval_transform, batch_size=CALIBRATION_BATCH, epoch=0, seed=recipe.seed, workers=data.workers
    )
    for batch in itertools.islice(iterate(loader), math.ceil(recipe.calibration_images / CALIBRATION_BATCH)):
        if phase.stop.requested:
            raise Interrupted("stopped while re-estimating statistics; the full-precision model is saved")
        yield batch.images.to(phase.accelerator.device)


def _result(job: Job, run: Run, progress: Progress) -> Result:
    return Result(
        run=run.folder,
        full_precision_top1=progress.top1("full-precision"),
        best_top1=cast(float, progress.best_top1),
        best_epoch=cast(int, progress.best_epoch),
        last_top1=cast(float, progress.top1("binary")),
        bytes_before=job.costs.bytes_before,
        bytes_after=job.costs.bytes_after,
        bad_images=len(progress.bad_images),
    )


def _accelerator(recipe: Recipe, device: str) -> Accelerator:
    """A fresh Accelerator for a phase. In one process its shared state is made anew, so that settings can differ."""
    if _processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    if device not in ("auto", "cpu"):
        _require_device(device)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    precision = {"float16": "fp16", "bfloat16": "bf16"}[recipe.amp_dtype] if recipe.amp else "no"
    try:
        return Accelerator(cpu=device == "cpu", mixed_precision=precision, rng_types=[])
    except ValueError as error:  # this device cannot do that precision
        raise InputError(f"--amp-dtype {recipe.amp_dtype}: {error}; leave out --amp, or use bfloat16") from error


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {device}: not usable here ({reason}); expected auto, cpu, cuda, cuda:N or mps"
        ) from None


def _processes() -> int:
    """Processes of this training; 1 unless torchrun or accelerate started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def stopping_on_signals(watcher: Watcher) -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM asks for a clean stop, a second one ends at once. Does nothing outside the main thread."""
    stop = Stop()
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        stop.requested = True
        watcher.note("stopping after this step; once more ends at once")

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _one_line_errors(recipe: Recipe) -> Iterator[None]:
    """Out of memory, and a data worker's death, as one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and (translated := worker_error(error)):
            raise translated from error
        if _is_out_of_memory(error):
            batch, steps = max(1, recipe.batch_size // 2), 2 * recipe.grad_accum_steps
            raise SimanError(f"out of memory at --batch-size {recipe.batch_size}; try --batch-size {batch} "
                             f"--grad-accum-steps {steps} (as many images a step)") from error  # fmt: skip
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    texts = ("not enough memory", "can't allocate memory", "CUDA out of memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def evaluate(
    run: Run | str | Path | None = None,
    *,
    which: str = "best",
    data: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
) -> Metrics:
    """Metrics of a run's `best`, `last` or `full-precision` weights; None: the newest run in `runs/`.

    On the run's own data with its batch size this repeats what training reported, to the last digit.
    """
    run = run if isinstance(run, Run) else find_run(run, Path("runs"))
    recipe = run.recipe()
    target = _accelerator(recipe, device).device
    source = open_run_data(run, data)
    model = load_run_model(run, which).to(target)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    transform = eval_transform(Preprocess.from_dict(run.info().preprocess))
    loader = eval_loader(source.val, transform, batch_size=batch_size or recipe.batch_size, workers=workers)
    with _one_line_errors(recipe):
        return evaluate_model(model, iterate(loader), target, channels_last=recipe.channels_last)


def inspect_model(
    name: str, classes: int | None = None, *, keep: Sequence[str] = (), binarize: Sequence[str] = ()
) -> tuple[Plan, Costs]:
    """The plan of timm model `name` and its costs, without weights; `classes` defaults to the model's own."""
    require_known(name)
    with torch.device("meta"):
        model = create(name, classes)
    plan = make_plan(model, name=name, keep=keep, binarize=binarize)
    return plan, plan_costs(model, plan)


def inspect_run(folder: Path) -> tuple[Plan, Costs]:
    """The plan a run was made with and its costs."""
    run = Run(folder)
    info, plan = run.info(), run.plan()
    return plan, plan_costs(create(info.model, len(info.classes)), plan)
