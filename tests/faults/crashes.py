"""Kills conversions and resumes them: at random moments, and at every moment that anything is written, renamed or removed.

A trial is a process forked from one that has imported everything, so that it takes as long as its few training steps. It ends by
SIGKILL: nothing is flushed, no handler runs. Whatever then stands under a final name has to be whole; the run is resumed, with
more kills, until it ends, and has to end as one that nobody killed: same bytes of weights, same metrics, nothing left over.
Only the trial export is left out, which writes nothing and takes longer than all the rest.

Changes are Python's audit events for opening a file to write, renaming, removing and making folders, inside the output folder.
What libraries write in between is cut by the random kills.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

import siman_convert.cli.terminal
import siman_convert.conversion  # what every child would import for itself
import siman_convert.preparation
from siman_convert.cli import run as run_command
from siman_convert.runs import Run, all_runs, find_run
from siman_convert.trial import Trial, trial_export

WEIGHTS = ("full-precision", "best", "last")
TIMES = ("train_seconds", "eval_seconds")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
MOST = 25  # kills of one run
LIMIT = 600.0  # seconds; a trial that takes longer hangs

Outcome = tuple[dict[str, bytes], list[dict[str, Any]]]


@dataclass(frozen=True)
class Conversion:
    """A conversion of one small run: what to type, and where it writes."""

    data: Path
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / "run"

    @property
    def command(self) -> list[str]:
        """The command that begins the run, or goes on with it."""
        machine = ["--device", "cpu", "--save-every", "0"]
        if self.folder.exists():
            return ["convert", "--resume", str(self.folder), *machine]
        return [
            "convert", "test_resnet", "--data", str(self.data), "--weights", "none", "--output", str(self.output),
            "--experiment", "run", "--fp-epochs", "1", "--epochs", "2", "-b", "16", "--set", "calibration_images=32",
            "--set", "final_calibration_images=32", "--set", "img_size=32", *machine,
        ]  # fmt: skip


def forked(action: Callable[[], int]) -> int:
    """The process id of a child that does `action` and ends with its result; silent but for tracebacks."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = action()
    finally:
        os._exit(code)


def ended(child: int, after: float | None = None) -> int | None:
    """The exit code of a child, None if it was killed; with `after`, it is killed so many seconds from now."""
    deadline = time.monotonic() + (LIMIT if after is None else after)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if after is None:
        raise AssertionError(f"a conversion did not end within {LIMIT:.0f} s")
    return None


def changes(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is about to change something inside `folder`."""
    if not arguments or not isinstance(arguments[0], str | os.PathLike):
        return False
    opening = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
    return (opening or event in CHANGES) and os.path.abspath(os.fspath(arguments[0])).startswith(folder)  # noqa: PTH100


def watched(conversion: Conversion, at: int | None, report: int | None = None) -> int:
    """Run the conversion; die just before change number `at` (from 1). `report`: a descriptor that gets the number of all,
    and what the trial export answered."""
    count, folder = 0, str(conversion.output.absolute())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes(event, arguments, folder):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    answers: list[Trial] = []
    seconds = 0.0

    def tried(*arguments: Any) -> Trial:
        nonlocal seconds
        seconds = -time.monotonic()
        answers.append(trial_export(*arguments))
        seconds += time.monotonic()
        return answers[0]

    if report is not None:
        siman_convert.preparation.trial_export = tried  # type: ignore[attr-defined]
    sys.addaudithook(hook)
    started = time.monotonic()
    code = run_command(conversion.command)
    if report is not None:
        rest = time.monotonic() - started - seconds
        os.write(report, json.dumps([count, rest, *dataclasses.astuple(answers[0])]).encode())
    return code


def boundaries(conversion: Conversion) -> tuple[int, float]:
    """Run to the end: the changes on the way, and its seconds without the trial export.

    All conversions after it get the same answer from the trial export.
    """
    reader, writer = os.pipe()
    code = ended(forked(lambda: watched(conversion, None, writer)))
    assert code == 0, f"the conversion ended with {code}"
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count, seconds, *answer = json.loads(pipe.read())
    siman_convert.preparation.trial_export = lambda *_: Trial(*answer)  # type: ignore[attr-defined]
    return count, seconds


def whole(conversion: Conversion) -> None:
    """Assert that everything under a final name can be read, and that `last` names a run."""
    for run in all_runs(conversion.output):
        assert run.info().model == "test_resnet"
        assert run.plan().binarized
        assert run.recipe().epochs == 2
        run.progress()
        for record in run.metrics():
            assert {"phase", "epoch", "top1"} <= record.keys()
        for path in run.folder.glob("*.safetensors"):
            assert safetensors.torch.load_file(path)
    if conversion.folder.exists():
        assert find_run(None, conversion.output).folder == conversion.folder


def outcome(conversion: Conversion) -> Outcome:
    """The bytes of all weights, and the metrics without wall times; nothing temporary may be left."""
    run = Run(conversion.folder)
    left = [path.name for path in conversion.output.rglob(".tmp-*")]
    assert not left, f"left behind: {left}"
    assert run.progress().finished(run.recipe())
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    records = [{key: value for key, value in record.items() if key not in TIMES} for record in metrics]
    return {which: (run.folder / f"{which}.safetensors").read_bytes() for which in WEIGHTS}, records


def killed_at_change(conversion: Conversion, at: int) -> int:
    """Kill before change number `at`, then go on to the end; returns the kills."""
    killed = stopped_at(conversion, at) is None
    whole(conversion)
    finish(conversion)
    return int(killed)


def killed_again_and_again(conversion: Conversion, most: int, attempt: Callable[[Conversion], int | None]) -> int:
    """Kill up to `most` times, mostly while it goes on after the kill before, then go on to the end; returns the kills."""
    kills = 0
    while kills < most and (code := attempt(conversion)) != 0:
        assert code is None, f"a resumed conversion ended with {code}"
        whole(conversion)
        kills += 1
    finish(conversion)
    return kills


def finish(conversion: Conversion) -> None:
    """Go on to the end."""
    code = ended(forked(lambda: run_command(conversion.command)))
    assert code == 0, f"a resumed conversion ended with {code}"


def trials(data: Path, place: Path, kills: int, seed: int) -> Iterator[tuple[str, int]]:
    """Trials until so many kills: what each was, and its kills so far.

    A quarter of the kills is one a run, before changes at equal distances. Then runs are killed again and again, in turn before
    changes and at moments drawn at random.

    Raises AssertionError with the trial's name where a run did not end as the one that nobody killed.
    """
    chance, done = random.Random(seed), 0
    reference = Conversion(data, place / "reference")
    count, seconds = boundaries(reference)
    expected = outcome(reference)
    singles = max(1, kills // 4)
    for number in range(1_000_000):
        if done >= kills:
            return
        conversion, most = Conversion(data, place / f"trial-{number}"), min(MOST, kills - done)
        try:
            if number < singles:
                at = 1 + round(number * (count - 1) / max(1, singles - 1))
                name = f"before change {at} of {count}"
                done += killed_at_change(conversion, at)
            elif (number - singles) % 2 == 0:
                name = f"seed {seed}, trial {number}: before changes"
                done += killed_again_and_again(conversion, most, lambda run: stopped_at(run, chance.randint(1, 40)))
            else:
                name = f"seed {seed}, trial {number}: at moments"
                done += killed_again_and_again(
                    conversion, most, lambda run: stopped_after(run, chance.uniform(0, seconds / 3))
                )
            assert outcome(conversion) == expected, "it ended otherwise than the run that nobody killed"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        shutil.rmtree(conversion.output)
        yield name, done


def stopped_at(conversion: Conversion, at: int) -> int | None:
    """Begin or go on, and die before change number `at`; the exit code where it ended before that, else None."""
    return ended(forked(lambda: watched(conversion, at)))


def stopped_after(conversion: Conversion, seconds: float) -> int | None:
    """Begin or go on for so long; the exit code where it ended before that, else None."""
    return ended(forked(lambda: run_command(conversion.command)), after=seconds)
