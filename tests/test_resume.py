"""Runs that are stopped, or killed where it matters most, end as an uninterrupted run does: bit for bit.

`tests/faults` kills at every other moment. These distil from their own full-precision phase and re-estimate BatchNorm at
the end, as the default recipe does.
"""

import itertools
import json
import os
import pkgutil
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siman_convert.cli import run as run_command
from siman_convert.runs import Run

SIMAN = [sys.executable, "-m", "siman_convert"]
WEIGHTS = ("full-precision", "best", "last")
TIMES = ("train_seconds", "eval_seconds")


def command(output: Path, data: Path, *extra: str) -> list[str]:
    return [
        *SIMAN, "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--fp-epochs", "1", "--epochs", "3", "-b", "32", "--set", "calibration_images=64",
        "--img-size", "32", "--mixup", "0.2", *extra,
    ]  # fmt: skip


def outcome(run: Run) -> tuple[list[bytes], list[dict[str, object]]]:
    """The bytes of all weights, and the metrics without wall times."""
    metrics = [{key: value for key, value in record.items() if key not in TIMES} for record in run.metrics()]
    files = [run.folder / f"{which}.safetensors" for which in WEIGHTS]
    return [file.read_bytes() for file in files if file.exists()], metrics


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("uninterrupted")
    start(command(output, digits))
    return Run(output / "run")


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_names_the_command_that_resumes(
    digits: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    with subprocess.Popen(
        command(tmp_path, digits), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("binary untrained"):
                break
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130
    (line,) = errors.splitlines()
    resume = line.partition("go on with: ")[2]
    assert resume == f"siman convert --resume {shlex.quote(str(tmp_path / 'run'))} --device cpu"
    assert run_command(shlex.split(resume)[1:]) == 0
    assert outcome(Run(tmp_path / "run")) == outcome(uninterrupted)


@pytest.mark.slow
def test_workers_change_nothing(digits: Path, tmp_path: Path, uninterrupted: Run) -> None:
    start(command(tmp_path, digits, "-j", "2"))
    assert outcome(Run(tmp_path / "run")) == outcome(uninterrupted)


@pytest.mark.slow
def test_output_is_one_line_an_epoch_when_not_a_terminal(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(command(tmp_path, digits, "--json"))
    out, err = capfd.readouterr()
    assert json.loads(out)["best_epoch"] in range(4)
    assert "\x1b" not in err
    lines = [line for line in err.splitlines() if line.startswith(("full-precision", "binary"))]
    assert len(lines) == 6


@pytest.mark.slow
def test_a_signal_within_an_evaluation_saves_what_was_trained(
    digits: Path, tmp_path: Path, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of the 4 batches of the third evaluation, that of the first binary epoch."""
    batches = itertools.count(1)

    def evaluated(*_: object) -> None:
        if next(batches) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("siman_convert.cli.terminal.Terminal.evaluated", evaluated)
        assert run_command(command(tmp_path, digits)[len(SIMAN) :]) == 130
    assert next(batches) == 11  # it did not go on
    run = Run(tmp_path / "run")
    progress = run.progress()
    assert (progress.phase, progress.epoch, progress.step, len(run.metrics())) == ("binary", 0, 10, 2)
    resume(run)
    assert outcome(run) == outcome(uninterrupted)


class Killed(BaseException):
    """As if the process were gone."""


def killed_at(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    """The `call`-th call (from 1) of a function does not happen."""
    place, _, name = target.rpartition(".")
    original = getattr(pkgutil.resolve_name(place), name)
    calls = itertools.count(1)

    def dying(*arguments: object, **named: object) -> object:
        if next(calls) == call:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(target, dying)


def start(arguments: list[str]) -> None:
    assert run_command(arguments[len(SIMAN) :]) == 0


def resume(run: Run) -> None:
    start([*SIMAN, "convert", "--resume", str(run.folder), "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All epochs are done; killed before BatchNorm was re-estimated."""
    output = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.conversion._re_estimate", 1)
        start(command(output, digits))
    return Run(output / "run")


@pytest.mark.parametrize(
    ("target", "call", "final"),
    [
        ("siman_convert.conversion.estimate_batch_norm", 1, False),
        ("siman_convert.train.evaluate_model", 1, False),  # with the new statistics in the model
        ("siman_convert.runs.Run.commit", 1, False),  # its state written, not renamed
        ("siman_convert.runs.Run.publish", 2, True),  # committed; the first is that of every resume
    ],
)
def test_killed_while_re_estimating_at_the_end(
    target: str,
    call: int,
    final: bool,
    tmp_path: Path,
    trained: Run,
    uninterrupted: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(trained.folder, run.folder)
    assert not run.progress().finished(run.recipe())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, target, call)
        resume(run)
    progress = run.progress()
    assert (progress.phase, progress.epoch, progress.finished(run.recipe())) == ("binary", 3, final)
    assert len(run.metrics()) == 5
    resume(run)
    assert outcome(run) == outcome(uninterrupted)
    assert run.progress().finished(run.recipe())


@pytest.mark.slow
def test_a_run_with_another_teacher_resumes_without_its_file(
    digits: Path, tmp_path: Path, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within an epoch; the teacher is kept in the run."""
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(uninterrupted.weights("full-precision"), weights)
    flags = ["--teacher", f"test_resnet={weights}", "--fp-epochs", "0", "--epochs", "2", "--label-weight", "0.5"]
    start(command(tmp_path / "whole", digits, *flags))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.train.Phase._step", 14)  # of 10 an epoch
        start(command(tmp_path / "cut", digits, *flags, "--save-every", "0"))
    weights.unlink()
    run = Run(tmp_path / "cut" / "run")
    assert (run.progress().epoch, run.progress().step) == (1, 3)
    resume(run)
    assert outcome(run) == outcome(Run(tmp_path / "whole" / "run"))
