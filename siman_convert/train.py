"""The one training loop, for the full-precision phase and the binary phase alike; the only owner of an optimizer.

What a step computes depends on weights, recipe and position (phase, epoch, step, process) alone, so that a resumed run goes
on bit for bit as an uninterrupted one would: data order, augmentation and all other generators are seeded from the position.

Several processes are torch's DistributedDataParallel through accelerate: each takes equally many images a step, so that the mean
of their gradients is that of all images. BatchNorm's running statistics are those of process 0, unless it is synchronised.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
from PIL import Image
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torchvision.transforms import v2

from siman_convert.binarize import clip_percent
from siman_convert.data import AnySplit, BadRecord, Batch, Transform, eval_loader, iterate, train_loader
from siman_convert.errors import InputError, Interrupted, SimanError, one_line
from siman_convert.files import disk_errors
from siman_convert.flips import Flips
from siman_convert.guards import Stop
from siman_convert.metrics import Metrics, evaluate_model
from siman_convert.objective import Objective
from siman_convert.recipe import Recipe
from siman_convert.runs import EVALUATED, PhaseName, Progress, Published, Record, Run
from siman_convert.schedule import Span, make_optimizer, make_schedule
from siman_convert.surgery import binary_layers
from siman_convert.watch import Meter, Watcher

EMA = "ema.safetensors"  # in a state
BITS = "bits.safetensors"  # in a state saved within an epoch: the bits that it began with
CHECK_STEPS = 20  # on an accelerator the loss is read this often: every reading waits for the device


@dataclass(frozen=True)
class Data:
    """The two splits with their transforms, and how they are read."""

    train: AnySplit
    val: AnySplit
    train_transform: Transform
    eval_transform: Transform
    classes: int
    workers: int


class TrainingStep(nn.Module):
    """Images and targets to (loss, logits). Autocast wraps this module's forward, so that `model` itself stays plain."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective(self.model, images, targets)


@dataclass
class Phase:
    """One phase of training: a model with its optimizer and schedule, moved along by `train`."""

    span: Span
    model: nn.Module
    objective: Objective
    data: Data
    accelerator: Accelerator
    run: Run
    progress: Progress
    watcher: Watcher
    stop: Stop
    save_every: float | None = None  # minutes; besides every epoch

    def __post_init__(self) -> None:
        recipe, accelerator = self.span.recipe, self.accelerator
        self.name, self.recipe, self.epochs = self.span.name, recipe, self.span.epochs
        if accelerator.num_processes > 1:
            _freeze_unused(self.model, self.data.eval_transform(Image.new("RGB", (32, 32))))
        if recipe.sync_bn and accelerator.num_processes > 1:  # timm's: torch's drops activations fused into a BatchNorm
            self.model = convert_sync_batchnorm(self.model)
        for network in filter(None, (self.model, self.objective.teacher)):
            if recipe.channels_last:
                network.to(memory_format=torch.channels_last)
            network.to(accelerator.device)
        layers = binary_layers(self.model)
        self.layers, self.flips = list(layers.values()), Flips(layers)
        self.mix = _mixing(recipe, self.data.classes)
        optimizer = make_optimizer(self.model, recipe, lr=self.span.lr)
        self.batches = _trainable_batches(len(self.data.train), recipe.batch_size, accelerator.num_processes)
        self.steps = math.ceil(self.batches / recipe.grad_accum_steps)
        self.schedule = make_schedule(optimizer, recipe, self.epochs, self.steps)
        # Where no logits are in the loss, what comes behind the last stage compared gets no gradient.
        unused = not self.objective.reads_logits
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        step = TrainingStep(self.model, self.objective)
        self.module, self.optimizer = accelerator.prepare(step, optimizer)
        self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay) if recipe.model_ema else None
        self.progress.processes = accelerator.num_processes
        self.saved_at = time.monotonic()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose metrics are reported and whose weights are kept."""
        return cast(nn.Module, self.ema.module) if self.ema else self.model

    def restore(self, state: Path) -> None:
        """Bring model, optimizer, loss scale and EMA back to a committed state; nothing in it can run code."""
        try:
            self.accelerator.load_state(str(state))
            if self.ema:
                self.ema.module.load_state_dict(safetensors.torch.load_file(state / EMA))
            self.flips.load(state / BITS)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, SafetensorError,
                UnpicklingError) as error:  # fmt: skip
            reason = one_line(" ".join(str(error).split()))[:160]
            raise InputError(
                f"{state}: damaged, it cannot be resumed ({reason}); the published weights are intact"
            ) from error

    def train(self) -> None:
        """Train, evaluate and commit epoch after epoch until the phase is complete."""
        while self.progress.epoch < self.epochs:
            self._train_epoch()
            self._finish_epoch()

    def evaluate(self) -> Metrics:
        """Metrics of `evaluated_model` on the validation split, exact over all processes. Raises Interrupted.

        All processes evaluate the BatchNorm statistics of process 0, which are those that `commit` saves.
        """
        accelerator, recipe = self.accelerator, self.recipe
        if accelerator.num_processes > 1:
            distribute_bn(self.evaluated_model, accelerator.num_processes, reduce=False)
        loader = eval_loader(
            self.data.val,
            self.data.eval_transform,
            batch_size=recipe.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.data.workers,
        )
        self.watcher.start_evaluation(len(self.data.val))
        metrics = evaluate_model(
            self.evaluated_model,
            self._until_stopped(iterate(loader)),
            accelerator.device,
            channels_last=recipe.channels_last,
            reduce=self._sum_over_processes,
            each=self.watcher.evaluated,
        )
        self.stop_if_asked()
        self._note_bad(gather_object([*self.progress.bad_images.items(), *metrics.bad]))
        return metrics

    def commit(self, publish: Iterable[Published] = ()) -> None:
        """Save everything a resume needs; `publish` names the weights files that get the evaluated model.

        Never weights that the last update has ruined, which a binary layer's outputs need not show.
        """
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise SimanError(f"the weights are not finite after {self.name} epoch {self._epoch}, step "
                             f"{self.progress.step}; {self._last_good()}")  # fmt: skip
        draft = self.run.draft_state()
        self.progress.publish = list(publish)
        with disk_errors(self.run.folder):
            self.accelerator.save_state(str(draft))
            self.accelerator.wait_for_everyone()  # every process has written its generators' state
            if self.accelerator.is_main_process:
                if self.ema:
                    save_weights(self.ema.module, draft / EMA)
                if self.progress.step:
                    self.flips.save(draft / BITS)
                if self.progress.publish:
                    save_weights(self.evaluated_model, draft / EVALUATED)
                self.run.commit(draft, self.progress)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def conclude(self, metrics: Metrics, record: Record) -> None:
        """Append the metrics to the history, commit and publish; the best binary weights as `best` too.

        Stages that are binary in part publish nothing: no command could use it.
        """
        progress = self.progress
        published: dict[str, tuple[Published, ...]] = {"full-precision": ("full-precision",), "binary": ("last",)}
        publish = published.get(self.name, ())
        if not math.isfinite(metrics.loss):
            raise SimanError(f"the validation loss is {metrics.loss} after {record['phase']} epoch {record['epoch']}; "
                             f"{self._last_good()}")  # fmt: skip
        values = {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss, "images": metrics.images}
        progress.history.append({**record, **values, "eval_seconds": round(metrics.seconds, 3)})
        if self.name == "binary" and (progress.best_top1 is None or metrics.top1 > progress.best_top1):
            progress.best_top1, progress.best_epoch = metrics.top1, record["epoch"]
            publish = (*publish, "best")
        self.commit(publish)
        self.watcher.end_epoch(progress.history[-1], self.span.total)

    def stop_if_asked(self) -> None:
        """Save and raise Interrupted when a signal asked for it."""
        if self._agreed(self.stop.requested):
            self.commit()
            raise Interrupted(
                f"stopped in {self.name} epoch {min(self._epoch + 1, self.span.total)}, step {self.progress.step}; all saved"
            )

    @property
    def _epoch(self) -> int:
        """Complete epochs of this phase and of those counted with it."""
        return self.span.before + self.progress.epoch

    def _train_epoch(self) -> None:
        progress, accelerator = self.progress, self.accelerator
        if progress.step == 0:
            progress.sums = {"loss": 0.0, "correct": 0.0, "images": 0.0, "steps": 0.0, "seconds": 0.0}
            self.flips.start()
        meter = Meter(progress.sums, self._sum_over_processes, accelerator.num_processes)
        self.module.train()
        self.watcher.start_epoch(self.name, self._epoch, self.span.total, self.steps, progress.step)
        micro_batches = self._batches()
        while group := list(itertools.islice(micro_batches, self.recipe.grad_accum_steps)):
            set_seed(_position_seed(self.recipe.seed, self.name, self._epoch, progress.step, accelerator.process_index))
            self._step(group, meter)
            progress.step += 1
            if accelerator.device.type == "cpu" or progress.step % CHECK_STEPS == 0 or progress.step == self.steps:
                self._check(meter)

    def _check(self, meter: "Meter") -> None:
        """Read the losses since the last check, report, and save or stop where that is due."""
        progress = self.progress
        bad_step = meter.flush()
        if bad_step is not None:
            raise SimanError(f"the loss is not finite at step {bad_step + 1} of {self.name} epoch {self._epoch + 1}; "
                             f"{self._last_good()}")  # fmt: skip
        self.watcher.step(progress.step, meter.loss, meter.top1, self.optimizer.param_groups[0]["lr"])
        self.stop_if_asked()
        if self.save_every is not None and self._agreed(time.monotonic() - self.saved_at > 60 * self.save_every):
            self.commit()

    def _batches(self) -> Iterator[Batch]:
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        start = min(progress.step * recipe.grad_accum_steps, self.batches)
        loader = train_loader(
            self.data.train,
            self.data.train_transform,
            batch_size=recipe.batch_size,
            epoch=self._epoch + (0 if self.name == "full-precision" else recipe.fp_epochs),
            seed=recipe.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.data.workers,
            start_batch=start,
            pin_memory=accelerator.device.type == "cuda",
        )
        for batch in itertools.islice(iterate(loader), self.batches - start):
            self._note_bad(batch.bad)
            yield batch

    def _step(self, group: list[Batch], meter: "Meter") -> None:
        """One optimizer step over the micro-batches of `group`, each weighted by its share of the images."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        update = progress.epoch * self.steps + progress.step
        if recipe.sched_on_updates:
            self.schedule.step_update(update)
        else:
            self.schedule.step(progress.epoch)
        if self.layers and self.span.clipped:  # 0 where no epoch of the run trains binary weights
            percent = clip_percent(self.span.clipped_before + progress.epoch, self.span.clipped, recipe.clip_percent)
            for layer in self.layers:
                layer.clip_weights_(percent)
        total = sum(len(batch.targets) for batch in group)
        for i, batch in enumerate(group):
            images, targets = self._to_device(batch)
            share = len(targets) / total
            syncing = contextlib.nullcontext() if i + 1 == len(group) else accelerator.no_sync(self.module)
            with syncing:
                loss, logits = self.module(*(self.mix(images, targets) if self.mix else (images, targets)))
                accelerator.backward(loss * share)
            meter.add(loss.detach() * share, logits, targets, new_step=i == 0)
        if recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(self.module.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model, step=update)

    def _finish_epoch(self) -> None:
        progress, sums = self.progress, self.progress.sums
        if not sums["steps"]:
            raise InputError(f"{self.name} epoch {self._epoch + 1} had no training image; check the data")
        metrics = self.evaluate()
        record = {
            "phase": self.name,
            "epoch": self._epoch + 1,
            "train_loss": sums["loss"] / sums["steps"],
            "train_top1": 100 * sums["correct"] / sums["images"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_seconds": round(sums["seconds"], 3),
        }
        if rates := self.flips.rates():
            record["flip_rate"] = rates
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        self.conclude(metrics, record)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        images, targets = batch.images.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
        return (images.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else images), targets

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Processes have different numbers of batches in an evaluation: each ends its own, then all look who asked to stop."""
        for batch in batches:
            yield batch
            if self.stop.requested:
                return

    def _note_bad(self, records: Iterable[BadRecord | tuple[str, str]]) -> None:
        """Count and name unreadable images; more than the recipe's share of them is an error."""
        known = self.progress.bad_images
        for path, why in records:
            if path not in known:
                known[path] = why
                self.watcher.note(f"skipped an unreadable image: {path}: {why}")
        images, share = len(self.data.train) + len(self.data.val), self.recipe.max_bad_images
        if len(known) > (max(1, share * images) if share else 0):
            first = ": ".join(next(iter(known.items())))
            raise InputError(f"{len(known)} of {images} images cannot be read, more than max_bad_images = "
                f"{share:g} allows (--set max_bad_images=0.2 would skip more); first: {first}")  # fmt: skip

    def _agreed(self, flag: bool) -> bool:
        """Whether any process says so: all have to act alike."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self._sum_over_processes(torch.tensor(float(flag))).item() > 0)

    def _sum_over_processes(self, total: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum")).cpu()

    def _last_good(self) -> str:
        return f"the weights saved before are kept in {self.run.folder}; try a lower --lr, or --warmup-epochs"


def save_weights(model: nn.Module, path: Path) -> None:
    """The state_dict as safetensors; tensors that share memory are stored each."""
    safetensors.torch.save_file({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}, path)


def _freeze_unused(model: nn.Module, image: Tensor) -> None:
    """Freeze parameters that the output does not depend on, which get no gradient anyway: DistributedDataParallel would wait for
    theirs for ever, and ends the training. `image`: (C, H, W) as the model takes it.
    """
    probe = copy.deepcopy(model).train()  # its BatchNorm statistics and generators are nobody's
    named = {name: p for name, p in probe.named_parameters() if p.requires_grad}
    images = torch.stack([image, image]).to(next(iter(named.values())).device)
    with torch.random.fork_rng():
        gradients = torch.autograd.grad(probe(images).sum(), list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is None:
            model.get_parameter(name).requires_grad_(False)


def _trainable_batches(images: int, batch_size: int, world: int) -> int:
    """Batches an epoch. A last batch of one image is left out: BatchNorm cannot normalise a single 1x1 map."""
    per_process = math.ceil(images / world)
    batches = math.ceil(per_process / batch_size)
    return batches - 1 if batches > 1 and per_process % batch_size == 1 else batches


def _mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    kinds: list[Any] = []
    if recipe.mixup > 0:
        kinds.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix > 0:
        kinds.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    return v2.RandomChoice(kinds) if kinds else None


def _position_seed(seed: int, phase: PhaseName, epoch: int, step: int, rank: int) -> int:
    """32 bits that differ for every (seed, phase, epoch, step, rank)."""
    text = f"{seed} {phase} {epoch} {step} {rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
