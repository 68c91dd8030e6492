"""The main job: a timm model and images in; a trained, evaluated binary network in a run folder out.

    checks (environment, data, plan, export, time)  ->  full-precision epochs  ->  conversion, calibration  ->  binary epochs

Everything is decided and checked before anything is written; from then on the run folder can be resumed at any moment.
"""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from siman_convert import launch
from siman_convert.calibrate import estimate_batch_norm, fit_scales, fit_thresholds
from siman_convert.data import Transform, iterate, train_loader
from siman_convert.environment import describe_environment, siman_version
from siman_convert.errors import InputError, Interrupted
from siman_convert.evaluation import resolve_device
from siman_convert.files import disk_errors, replacing
from siman_convert.guards import Stop, one_line_errors, stopping_on_signals
from siman_convert.models import require_known
from siman_convert.names import require_usable
from siman_convert.objective import Objective
from siman_convert.preparation import Job, check_duration, check_environment, check_export, check_job, check_resumed_job
from siman_convert.recipe import Recipe
from siman_convert.runs import Progress, Run, RunInfo, run_name
from siman_convert.schedule import Span
from siman_convert.subjects import load_run_model
from siman_convert.surgery import apply_plan, binary_layers
from siman_convert.tracking import require_trackers, tracked
from siman_convert.train import Phase, save_weights
from siman_convert.watch import Watcher

CALIBRATION_BATCH = 64  # images; statistics are averaged over batches, so this is not the training batch
LOADERS_END = 15.0  # seconds; what loads images for a killed process holds the run until it notices, after 5
NOTHING_WRITTEN = "stopped before anything was written"


@dataclass(frozen=True)
class Options:
    """What decides where and on what a conversion runs, but not what it computes.

    device: "auto", "cpu", "cuda" or "cuda:1". save_every: minutes between states within an epoch, None for never.
    track: names of `tracking.TRACKERS` that the evaluations are told to as well.
    """

    output: Path = Path("runs")
    experiment: str | None = None  # name of the run folder; None: <model>-<data>-<time>
    device: str = "auto"
    workers: int = 0
    save_every: float | None = None
    dry_run: bool = False
    track: tuple[str, ...] = ()


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

    Processes that a launcher starts anew go on with the run that they began. Only the main process has its `watcher` told.
    """
    recipe, options, watcher = recipe or Recipe(), options or Options(), watcher or Watcher()
    with one_line_errors(recipe.batch_size, recipe.grad_accum_steps), stopping_on_signals() as stop:
        require_known(model)
        require_trackers(options.track)
        require_usable(options.output, options.experiment)
        accelerator = _accelerator(recipe, options.device)
        watcher = watcher if accelerator.is_main_process else Watcher()
        if former := _from_main(launch.former_run() or ""):
            watcher.note(f"started anew by the launcher: going on with {former}")
            return _go_on(Run(Path(former)), accelerator, options, watcher, stop)
        check_environment(accelerator.device, accelerator.num_processes, recipe, watcher)
        job = check_job(model, data, recipe, weights, options.workers, watcher)
        stop.check(NOTHING_WRITTEN)
        check_export(job, watcher)
        stop.check(NOTHING_WRITTEN)
        check_duration(job, accelerator.device, accelerator.num_processes, watcher)
        stop.check(NOTHING_WRITTEN)
        if options.dry_run:
            return None
        run = _create_run(job, options, accelerator)
        with _holding(run, accelerator.is_main_process), tracked(run, options.track, watcher) as watcher:
            return _train(job, run, options, watcher, stop)


def resume(run: Run, *, options: Options | None = None, watcher: Watcher | None = None) -> Result | None:
    """Go on with a run where its newest state left it; the recipe and the data are the run's own. Raises as `convert`."""
    options, watcher = options or Options(), watcher or Watcher()
    recipe = run.recipe()
    with one_line_errors(recipe.batch_size, recipe.grad_accum_steps), stopping_on_signals() as stop:
        require_trackers(options.track)
        accelerator = _accelerator(recipe, options.device)
        return _go_on(run, accelerator, options, watcher if accelerator.is_main_process else Watcher(), stop)


def _go_on(run: Run, accelerator: Accelerator, options: Options, watcher: Watcher, stop: Stop) -> Result | None:
    writes = accelerator.is_main_process and not options.dry_run
    with _holding(run, writes):
        if writes:
            with disk_errors(run.folder):
                run.publish()
        accelerator.wait_for_everyone()
        check_environment(accelerator.device, accelerator.num_processes, run.recipe(), watcher)
        job = check_resumed_job(run, options.workers, watcher)
        stop.check("stopped before training went on")
        if options.dry_run:
            return None
        with tracked(run, options.track, watcher) as watcher:
            return _train(job, run, options, watcher, stop)


@contextlib.contextmanager
def _holding(run: Run, wanted: bool) -> Iterator[None]:
    """Hold the run; who is asked to stop meanwhile says which run to go on with."""
    with run.locked(wanted, LOADERS_END if launch.attempt() else 0.0):
        try:
            yield
        except Interrupted as error:
            error.run = run.folder
            raise


def _from_main(text: str) -> str:
    """What the main process says, in every process."""
    values = [text]
    broadcast_object_list(values)
    return values[0]


def _create_run(job: Job, options: Options, accelerator: Accelerator) -> Run:
    """The run folder, made by the main process and known to all. Raises InputError where one of them cannot see it."""
    folder = ""
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
            images=(len(job.source.train), len(job.source.val)),
            data_digest=job.source.digest(),
        )
        name = options.experiment or run_name(job.loaded.name, job.source.name)
        environment = describe_environment(accelerator.device)
        with disk_errors(options.output):
            run = Run.create(options.output, name, info, job.recipe, job.plan, environment)
            if job.teacher:
                with replacing(run.folder / "teacher.safetensors") as temporary:
                    save_weights(job.teacher, temporary)
            folder = str(run.folder)
            launch.remember_run(folder)
    folder = _from_main(folder)
    if not (Path(folder) / "run.json").is_file():
        raise InputError(f"--output {options.output}: process {accelerator.process_index} cannot see {folder}, which process 0 "
                         "made; expected a folder that all machines share")  # fmt: skip
    return Run(Path(folder))


def _train(job: Job, run: Run, options: Options, watcher: Watcher, stop: Stop) -> Result:
    """Both phases, from wherever the run's state is."""
    watcher.start_run(run.folder)
    progress, state = run.progress(), run.state()
    processes = launch.processes()
    if progress.step and progress.processes != processes:
        raise InputError(
            f"{run.folder} was stopped within an epoch of {progress.processes} processes; go on with as many, not {processes}"
        )

    def phase(span: Span, model: nn.Module) -> Phase:
        accelerator = _accelerator(job.recipe, options.device)
        objective = Objective(smoothing=job.recipe.smoothing)
        if span.name != "full-precision":
            objective = _binary_objective(job, run, span.recipe)
        return Phase(span, model, objective, job.data, accelerator, run, progress, watcher, stop, options.save_every)

    if progress.phase == "full-precision":
        full_precision = phase(Span.full_precision(job.recipe), job.loaded.module)
        _train_full_precision(job, full_precision, state)
        binary = phase(Span.binary(job.recipe, 0), _converted(job, full_precision))
    else:
        what = job.recipe.resolved_stages[progress.stage].binarize
        model = apply_plan(job.loaded.module, job.plan, init="copy", selection=job.recipe.binarizer, binarizes=what)
        binary = phase(Span.binary(job.recipe, progress.stage), model)
        if state:
            binary.restore(state)
    _train_stage(binary)
    for stage in range(progress.stage + 1, len(job.recipe.resolved_stages)):
        model = _next_stage(job.recipe, stage, binary)
        progress.stage, progress.epoch = stage, 0
        binary = phase(Span.binary(job.recipe, stage), model)
        _train_stage(binary)
    if not progress.finished(job.recipe):
        _re_estimate(binary)
    return _result(job, run, progress)


def _train_stage(phase: Phase) -> None:
    """The remaining epochs of a stage; a kind of network not met before is evaluated first."""
    phase.progress.phase = phase.name
    if phase.progress.top1(phase.name) is None:
        phase.conclude(phase.evaluate(), {"phase": phase.name, "epoch": phase.span.before})
    phase.train()


def _binary_objective(job: Job, run: Run, recipe: Recipe) -> Objective:
    """What a stage minimises: its recipe's loss, or that of the labels alone where no teacher knows anything."""
    if not (job.distills and recipe.taught):
        return Objective(recipe.label_weight or 1.0, recipe.smoothing)
    teacher = job.teacher or load_run_model(run, "full-precision")
    return Objective(
        recipe.label_weight,
        recipe.smoothing,
        teacher,
        recipe.distill_weight,
        recipe.distill_temperature,
        recipe.feature_weight,
    )


def _re_estimate(phase: Phase) -> None:
    """After the last epoch: new BatchNorm statistics, whose weights become `last` whether or not they are better.

    Of augmented images, as the weights know them: measured with random resized crops of 0.35 to 1 of the image, ResNet-20 on
    Fashion-MNIST at 16x16, once, top-1 85.1 % became 77.8 to 78.8 % with statistics of whole images, 83.6 to 84.4 % with these.
    What it computes depends on the trained weights alone, not on the statistics before: repeated after a kill, it is the same.
    """
    model, images = phase.evaluated_model, phase.recipe.final_calibration_images
    phase.watcher.note(f"re-estimating BatchNorm on about {min(images, len(phase.data.train)):,} training images")
    estimate_batch_norm(model, _calibration_batches(phase, images, phase.data.train_transform))
    phase.conclude(phase.evaluate(), {"phase": "binary", "epoch": phase.span.total, "re_estimated": True})


def _train_full_precision(job: Job, phase: Phase, state: Path | None) -> None:
    """The remaining full-precision epochs; with none, the top-1 of weights whose classifier is theirs."""
    if state:
        phase.restore(state)
    phase.train()
    if not job.loaded.new_head and phase.progress.top1("full-precision") is None:
        phase.conclude(phase.evaluate(), {"phase": "full-precision", "epoch": 0})
    phase.progress.epoch = 0


def _converted(job: Job, phase: Phase) -> nn.Module:
    """The full-precision network as the first stage of the binary training starts with it."""
    recipe = job.recipe
    model = apply_plan(
        copy.deepcopy(phase.evaluated_model),
        job.plan,
        init=recipe.init,
        selection=recipe.binarizer,
        seed=recipe.seed,
        binarizes=recipe.resolved_stages[0].binarize,
    )
    if recipe.calibration_images:
        images = min(recipe.calibration_images, len(phase.data.train))
        fit_thresholds(phase.evaluated_model, model, _calibration_batches(phase, images, phase.data.eval_transform))
    return _calibrated(model, phase, recipe)


def _next_stage(recipe: Recipe, stage: int, phase: Phase) -> nn.Module:
    """The network that a stage trained, as the next one starts with it."""
    before, after = (recipe.resolved_stages[index].binarize for index in (stage - 1, stage))
    model = copy.deepcopy(phase.evaluated_model)
    if before == after:
        return model
    for layer in binary_layers(model).values():
        layer.binarize_all_("copy" if recipe.init == "copy" else "remap")  # new random latents would undo the stage
    return _calibrated(model, phase, recipe)


def _calibrated(model: nn.Module, before: Phase, recipe: Recipe) -> nn.Module:
    """A model after conversion, with alpha fitted to the network before it and BatchNorm re-estimated.

    Of images as validation has them: nothing was trained yet that knows augmented ones in binary. Measured in the demo, three
    draws of images, top-1 before training: 78.3 to 81.6 % so, 76.0 to 76.3 % with augmented ones.
    """
    if recipe.calibration_images:
        images = min(recipe.calibration_images, len(before.data.train))
        before.watcher.note(f"re-estimating alpha and BatchNorm on about {images:,} training images")
        whole = before.data.eval_transform
        fit_scales(before.evaluated_model, model, _calibration_batches(before, images, whole))
        estimate_batch_norm(model, _calibration_batches(before, images, whole))
    return model


def _calibration_batches(phase: Phase, images: int, transform: Transform) -> Iterator[Tensor]:
    """About so many training images, the same in every process; all batches equally large."""
    data, recipe = phase.data, phase.recipe
    size = min(CALIBRATION_BATCH, max(2, recipe.batch_size), len(data.train))
    loader = train_loader(data.train, transform, batch_size=size, epoch=0, seed=recipe.seed, workers=data.workers)
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
    if launch.processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    target = _own_device(device)
    precision = {"float16": "fp16", "bfloat16": "bf16"}[recipe.amp_dtype] if recipe.amp else "no"
    if target.index is not None:
        torch.cuda.set_device(target)
    if launch.processes() > 1:
        launch.rejoin("nccl" if target.type == "cuda" else "gloo")
    try:
        return Accelerator(cpu=target.type == "cpu", mixed_precision=precision, rng_types=[])
    except ValueError as error:  # this device cannot do that precision
        raise InputError(f"--amp-dtype {recipe.amp_dtype}: {error}; leave out --amp, or use bfloat16") from error


def _own_device(device: str) -> torch.device:
    """The device of this process: of several on one machine with GPUs, each has one of its own. Raises InputError."""
    if launch.processes() == 1 or device == "cpu":
        return resolve_device(device)
    if device not in ("auto", "cuda"):
        raise InputError(
            f"--device {device}: not with {launch.processes()} processes; expected cuda, where each takes a GPU, or cpu"
        )
    gpus, rank = torch.cuda.device_count(), launch.local_rank()
    if gpus == 0:
        return resolve_device(device)
    if rank >= gpus:
        raise InputError(f"--device {device}: no GPU for process {rank + 1} on a machine of {gpus}; start as many processes "
                         "as GPUs, or add --device cpu")  # fmt: skip
    return resolve_device(f"cuda:{rank}")
