"""Showing a run in TensorBoard or Weights & Biases while it trains, through accelerate's trackers.

metrics.jsonl is the source of truth: point n is its line n, under `<phase>/<figure>`. When a run is resumed all lines it has
are told again under the same numbers, so that a point lost in a kill comes back and none appears twice: TensorBoard's former
files are emptied, and W&B, which keeps what it has, is spared the lines it knows. Nothing here is part of the recipe or draws
random numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from siman_convert import launch
from siman_convert.errors import InputError, one_line
from siman_convert.files import disk_errors
from siman_convert.runs import Record, Run
from siman_convert.watch import Watcher

TRACKERS = ("tensorboard", "wandb")
FOLDER = "tensorboard"  # in the run's folder
PROJECT = "siman"  # at Weights & Biases


def require_trackers(names: Sequence[str]) -> None:
    """Raise InputError for an unknown tracker, one that is not installed, and W&B without an account to log in to."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name!r}: expected {' or '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--track {name}: the package {name} is not installed; `pip install {name}`, or leave --track out"
            )
    if "wandb" in names and launch.is_main():
        _require_login()


@contextlib.contextmanager
def tracked(run: Run, names: Sequence[str], watcher: Watcher) -> Iterator[Watcher]:
    """The watcher, with every evaluation told to the trackers too; to the main process's alone. Raises SimanError (disk)."""
    trackers: list[GeneralTracker] = []
    if not names or not launch.is_main():
        yield watcher
        return
    try:
        with disk_errors(run.folder):
            trackers += [_start(name, run) for name in dict.fromkeys(names)]
            yield _Tracked(watcher, trackers, run.progress().history)
    finally:
        for tracker in trackers:
            tracker.finish()


class _Tracked(Watcher):
    """Hands on all that it is told, and tells the trackers of every evaluation."""

    def __init__(self, watcher: Watcher, trackers: Sequence[GeneralTracker], history: Sequence[Record]) -> None:
        self._watcher, self._trackers, self._lines = watcher, trackers, 0
        for record in history:
            self._log(record)

    def stage(self, number: int, title: str, text: str) -> None:
        self._watcher.stage(number, title, text)

    def start_run(self, folder: Path) -> None:
        self._watcher.start_run(folder)

    def start_epoch(self, phase: str, epoch: int, epochs: int, steps: int, done: int) -> None:
        self._watcher.start_epoch(phase, epoch, epochs, steps, done)

    def step(self, done: int, loss: float, top1: float, lr: float) -> None:
        self._watcher.step(done, loss, top1, lr)

    def start_evaluation(self, images: int) -> None:
        self._watcher.start_evaluation(images)

    def evaluated(self, images: int) -> None:
        self._watcher.evaluated(images)

    def say(self, text: str) -> None:
        self._watcher.say(text)

    def note(self, text: str) -> None:
        self._watcher.note(text)

    def end_epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._log(record)
        self._watcher.end_epoch(record, epochs)

    def _log(self, record: Record) -> None:
        self._lines += 1
        for tracker in self._trackers:
            if isinstance(tracker, WandBTracker) and self._lines < tracker.run.step:  # it knows this line
                continue
            tracker.log(figures(record), step=self._lines)


def figures(record: Record) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, each under `<phase>/<name>`; those of the last re-estimation are binary's."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    return {f"{record['phase']}/{name}": float(value) for name, value in numbers.items() if name != "re_estimated"}


def _start(name: str, run: Run) -> GeneralTracker:
    if name == "tensorboard":
        for path in (run.folder / FOLDER).glob("events.out.tfevents.*"):
            path.write_bytes(b"")  # not removed: a TensorBoard that has it open would read nothing any more
        # purge_step: it drops what it read from the former files
        tracker: GeneralTracker = TensorBoardTracker(FOLDER, run.folder, purge_step=1)
    else:
        info = run.info()
        identity = hashlib.sha256(f"{run.name} {info.created} {info.recipe_digest}".encode()).hexdigest()[:16]
        tracker = WandBTracker(
            PROJECT, name=run.name, id=identity, resume="allow", dir=str(run.folder), config=run.recipe().model_dump()
        )
    tracker.start()
    return tracker


def _require_login() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        raise InputError(
            f"--track wandb: {one_line(str(error))}; WANDB_MODE=offline keeps all here to upload later"
        ) from error
    if not known:
        raise InputError("--track wandb: nobody is logged in; `wandb login`, or WANDB_MODE=offline to upload later")
