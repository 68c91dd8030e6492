"""The main job: a timm model and images in; a trained, evaluated binary network in a run folder out.

    checks (environment, data, plan, time)  ->  full-precision epochs  ->  conversion, calibration  ->  binary epochs

Everything is decided and checked before anything is written; from then on the run folder can be resumed at any moment.
"""

import copy
import itertools
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from siman_convert.calibrate import estimate_batch_norm, fit_scales, fit_thresholds
from siman_convert.data import iterate, train_loader
from siman_convert.environment import describe_environment, siman_version
from siman_convert.errors import InputError
from siman_convert.evaluation import resolve_device
from siman_convert.files import disk_errors, replacing
from siman_convert.guards import Stop, one_line_errors, stopping_on_signals
from siman_convert.models import require_known
from siman_convert.objective import Objective
from siman_convert.preparation import Job, check_duration, check_environment, check_job, check_resumed_job
from siman_convert.recipe import Recipe
from siman_convert.runs import Progress, Run, RunInfo, require_usable, run_name
from siman_convert.subjects import load_run_model
from siman_convert.surgery import apply_plan
from siman_convert.train import Phase, PhaseName, save_weights
from siman_convert.watch import Watcher

CALIBRATION_BATCH = 64  # images; statistics are averaged over batches, so this is not the training batch
NOTHING_WRITTEN = "stopped before anything was written"


@dataclass(frozen=True)
class Options:
    """What decides where and on what a conversion runs, but not what it computes.

    device: "auto", "cpu", "cuda" or "cuda:1". save_every: minutes between states within an epoch, None for never.
    """

    output: Path = Path("runs")
    experiment: str | None = None  # name of the run folder; None: <model>-<data>-<time>
    device: str = "auto"
    workers: int = 0
    save_every: float | None = None
    dry_run: bool = False


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
    weights: str | None = None,
    options: Options | None = None,
    watcher: Watcher | None = None,
) -> Result | None:
    """Convert timm model `model` on `data`; None after a dry run. See `Options` and `recipe.Recipe` for the rest.

    `weights`: as `models.load_model` takes them; None: pretrained ones where the model is known to have any.

    Raises InputError for what the user can mend before anything is written, SimanError for what fails later (numerics,
    memory, disk) and Interrupted when a signal asked to stop; in both latter cases the run can be resumed.
    """
    recipe, options, watcher = recipe or Recipe(), options or Options(), watcher or Watcher()
    with one_line_errors(recipe.batch_size, recipe.grad_accum_steps), stopping_on_signals() as stop:
        require_known(model)
        require_usable(options.output, options.experiment)
        accelerator = _accelerator(recipe, options.device)
        watcher = watcher if accelerator.is_main_process else Watcher()
        check_environment(accelerator.device, accelerator.num_processes, watcher)
        job = check_job(model, data, recipe, weights, options.workers, watcher)
        stop.check(NOTHING_WRITTEN)
        check_duration(job, accelerator.device, accelerator.num_processes, watcher)
        stop.check(NOTHING_WRITTEN)
        if options.dry_run:
            return None
        run = _create_run(job, options, accelerator)
        with run.locked(accelerator.is_main_process):
            return _train(job, run, options, watcher, stop)


def resume(run: Run, *, options: Options | None = None, watcher: Watcher | None = None) -> Result | None:
    """Go on with a run where its newest state left it; the recipe and the data are the run's own. Raises as `convert`."""
    options, watcher = options or Options(), watcher or Watcher()
    recipe = run.recipe()
    with one_line_errors(recipe.batch_size, recipe.grad_accum_steps), stopping_on_signals() as stop:
        accelerator = _accelerator(recipe, options.device)
        watcher = watcher if accelerator.is_main_process else Watcher()
        with run.locked(accelerator.is_main_process and not options.dry_run):
            if accelerator.is_main_process and not options.dry_run:
                with disk_errors(run.folder):
                    run.publish()
            accelerator.wait_for_everyone()
            check_environment(accelerator.device, accelerator.num_processes, watcher)
            job = check_resumed_job(run, options.workers, watcher)
            stop.check("stopped before training went on")
            return None if options.dry_run else _train(job, run, options, watcher, stop)


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
            run = Run.create(options.output, name, info, job.recipe, job.plan, environment)
            if job.teacher:
                with replacing(run.folder / "teacher.safetensors") as temporary:
                    save_weights(job.teacher, temporary)
            folder = [str(run.folder)]
    broadcast_object_list(folder)
    return Run(Path(folder[0]))


def _train(job: Job, run: Run, options: Options, watcher: Watcher, stop: Stop) -> Result:
    """Both phases, from wherever the run's state is."""
    watcher.start_run(run.folder)
    progress, state = run.progress(), run.state()
    processes = _processes()
    if progress.step and progress.processes != processes:
        raise InputError(
            f"{run.folder} was stopped within an epoch of {progress.processes} processes; go on with as many, not {processes}"
        )

    def phase(name: PhaseName, model: nn.Module) -> Phase:
        accelerator = _accelerator(job.recipe, options.device)
        objective = _binary_objective(job, run) if name == "binary" else Objective(smoothing=job.recipe.smoothing)
        return Phase(
            name, model, objective, job.recipe, job.data, accelerator, run, progress, watcher, stop, options.save_every
        )

    if progress.phase == "full-precision":
        model = _full_precision_phase(job, phase("full-precision", job.loaded.module), state)
        progress.phase, progress.epoch = "binary", 0
        binary = phase("binary", model)
    else:
        binary = phase("binary", apply_plan(job.loaded.module, job.plan, init="copy", selection=job.recipe.binarizer))
        if state:
            binary.restore(state)
    if progress.top1("binary") is None:
        binary.conclude(binary.evaluate(), {"phase": "binary", "epoch": 0}, ("last",))
    binary.train()
    if not progress.finished(job.recipe):
        _re_estimate(binary)
    return _result(job, run, progress)


def _binary_objective(job: Job, run: Run) -> Objective:
    """What the binary epochs minimise: the recipe's loss, or that of the labels alone where no teacher knows anything."""
    recipe = job.recipe
    if not job.distills:
        return Objective(recipe.label_weight or 1.0, recipe.smoothing)
    teacher = job.teacher or load_run_model(run, "full-precision")
    return Objective(recipe.label_weight, recipe.smoothing, teacher, recipe.distill_weight, recipe.distill_temperature)


def _re_estimate(phase: Phase) -> None:
    """After the last epoch: new BatchNorm statistics, whose weights become `last` whether or not they are better.

    What it computes depends on the trained weights alone, not on the statistics before: repeated after a kill, it is the same.
    """
    model, images = phase.evaluated_model, phase.recipe.final_calibration_images
    phase.watcher.note(f"re-estimating BatchNorm on about {min(images, len(phase.data.train)):,} training images")
    estimate_batch_norm(model, _calibration_batches(phase, images))
    phase.conclude(phase.evaluate(), {"phase": "binary", "epoch": phase.epochs, "re_estimated": True}, ("last",))


def _full_precision_phase(job: Job, phase: Phase, state: Path | None) -> nn.Module:
    """The remaining full-precision epochs (with none, the top-1 of weights whose classifier is theirs); the binary model."""
    if state:
        phase.restore(state)
    phase.train()
    if not job.loaded.new_head and phase.progress.top1("full-precision") is None:
        phase.conclude(phase.evaluate(), {"phase": "full-precision", "epoch": 0}, ("full-precision",))
    full_precision, recipe = phase.evaluated_model, job.recipe
    model = apply_plan(
        copy.deepcopy(full_precision), job.plan, init=recipe.init, selection=recipe.binarizer, seed=recipe.seed
    )
    if recipe.calibration_images:
        images = min(recipe.calibration_images, len(phase.data.train))
        phase.watcher.note(f"re-estimating alpha and BatchNorm on about {images:,} training images")
        fit_thresholds(full_precision, model, _calibration_batches(phase, images))
        fit_scales(full_precision, model, _calibration_batches(phase, images))
        estimate_batch_norm(model, _calibration_batches(phase, images))
    return model


def _calibration_batches(phase: Phase, images: int) -> Iterator[Tensor]:
    """About so many training images, the same in every process, without augmentation; all batches equally large."""
    data, recipe = phase.data, phase.recipe
    size = min(CALIBRATION_BATCH, max(2, recipe.batch_size), len(data.train))
    loader = train_loader(
        data.train, data.eval_transform, batch_size=size, epoch=0, seed=recipe.seed, workers=data.workers
    )
    for batch in itertools.islice(iterate(loader), math.ceil(images / size)):
        phase.stop.check("stopped while re-estimating statistics; what was trained before is saved")
        if len(batch.targets) == size:  # a short last batch would count as much as a whole one
            yield batch.images.to(phase.accelerator.device)


def _result(job: Job, run: Run, progress: Progress) -> Result:
    last_top1 = progress.top1("binary")
    if progress.best_top1 is None or progress.best_epoch is None or last_top1 is None:
        raise InputError(f"{run.folder}: its state holds no binary evaluation; it is damaged, start a new run")
    return Result(
        run=run.folder,
        full_precision_top1=progress.top1("full-precision"),
        best_top1=progress.best_top1,
        best_epoch=progress.best_epoch,
        last_top1=last_top1,
        bytes_before=job.costs.bytes_before,
        bytes_after=job.costs.bytes_after,
        bad_images=len(progress.bad_images),
    )


def _accelerator(recipe: Recipe, device: str) -> Accelerator:
    """A fresh Accelerator for a phase. In one process its shared state is made anew, so that settings can differ."""
    if _processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    target = resolve_device(device)
    precision = {"float16": "fp16", "bfloat16": "bf16"}[recipe.amp_dtype] if recipe.amp else "no"
    if target.index is not None:
        torch.cuda.set_device(target)
    try:
        return Accelerator(cpu=target.type == "cpu", mixed_precision=precision, rng_types=[])
    except ValueError as error:  # this device cannot do that precision
        raise InputError(f"--amp-dtype {recipe.amp_dtype}: {error}; leave out --amp, or use bfloat16") from error


def _processes() -> int:
    """Processes of this training; 1 unless torchrun or accelerate started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))
