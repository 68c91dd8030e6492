"""Following a training run: what is told to whoever watches, and the running totals of an epoch."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siman_convert.metrics import Reduce


class Watcher:
    """What hears of a run's progress. This one ignores it all; the command line's prints it."""

    def stage(self, number: int, title: str, text: str) -> None: ...
    def start_run(self, folder: Path) -> None: ...
    def start_epoch(self, phase: str, epoch: int, epochs: int, steps: int, done: int) -> None: ...
    def step(self, done: int, loss: float, top1: float, lr: float) -> None: ...
    def start_evaluation(self, images: int) -> None: ...
    def evaluated(self, images: int) -> None: ...
    def end_epoch(self, record: dict[str, Any], epochs: int) -> None: ...
    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


class Meter:
    """Running totals of an epoch's training over all processes, kept on the device until `flush` reads them.

    `reduce` sums a tensor over the `processes`, which take equally many images a step.
    """

    def __init__(self, sums: dict[str, float], reduce: Reduce = lambda total: total, processes: int = 1) -> None:
        self._sums, self._reduce, self._processes = sums, reduce, processes
        self._pending: list[tuple[Tensor, Tensor, int]] = []  # loss, correct, images of each step
        self._since = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, *, new_step: bool) -> None:
        """Add a micro-batch; `loss` is already weighted by its share of the step."""
        entry = (loss, (logits.argmax(dim=1) == targets).sum(), len(targets))
        if not new_step:
            before = self._pending.pop()
            entry = (before[0] + entry[0], before[1] + entry[1], before[2] + entry[2])
        self._pending.append(entry)

    def flush(self) -> int | None:
        """Read what is pending; returns the number (from 0) of the first step whose loss is not finite in some process."""
        sums = self._sums
        losses, corrects, images = zip(*self._pending, strict=True)
        totals = [torch.stack(losses).double(), torch.stack(corrects).double(), torch.tensor(images).double()]
        for loss, correct, count in self._reduce(torch.stack([total.cpu() for total in totals])).T.tolist():
            if not math.isfinite(loss):
                return int(sums["steps"])
            for key, amount in (
                ("loss", loss / self._processes),
                ("correct", correct),
                ("images", count),
                ("steps", 1),
            ):
                sums[key] += amount
        self._pending.clear()
        now = time.perf_counter()
        sums["seconds"] += now - self._since
        self._since = now
        return None

    @property
    def loss(self) -> float:
        """Mean loss of the epoch so far."""
        return self._sums["loss"] / max(1.0, self._sums["steps"])

    @property
    def top1(self) -> float:
        """Training top-1 of the epoch so far, percent."""
        return 100 * self._sums["correct"] / max(1.0, self._sums["images"])
