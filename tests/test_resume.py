"""Runs that are killed or stopped, in processes of their own, end as an uninterrupted run does: bit for bit."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siman_convert.runs import Run

SIMAN = [sys.executable, "-m", "siman_convert"]
WEIGHTS = ("full-precision", "best", "last")
TIMES = ("train_seconds", "eval_seconds")


def command(output: Path, data: Path, *extra: str) -> list[str]:
    return [
        *SIMAN, "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--fp-epochs", "1", "--epochs", "3", "-b", "32", "--set", "calibration_images=64",
        "--mixup", "0.2", *extra,
    ]  # fmt: skip


def outcome(run: Run) -> tuple[list[bytes], list[dict[str, object]]]:
    """The bytes of all weights, and the metrics without wall times."""
    metrics = [{key: value for key, value in record.items() if key not in TIMES} for record in run.metrics()]
    return [run.weights(which).read_bytes() for which in WEIGHTS], metrics


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(output, digits), check=True, capture_output=True, timeout=300)
    return Run(output / "run")


def visible_files_are_whole(folder: Path) -> None:
    """Whatever stands under its final name can be read."""
    if (folder / "run").exists():
        run = Run(folder / "run")
        assert run.info().model == "test_resnet"
        assert (run.recipe().epochs, bool(run.plan().binarized)) == (3, True)
        assert isinstance(run.metrics(), list)


def kill_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill after so long; returns whether it had ended by itself before."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def test_killed_runs_resume_to_the_same_bits(digits: Path, tmp_path: Path, uninterrupted: Run) -> None:
    seed = int(os.environ.get("SIMAN_KILL_SEED", "1"))
    chance = random.Random(seed)
    run_folder = tmp_path / "run"
    arguments = command(tmp_path, digits, "--save-every", "0")
    kills = 0
    for _ in range(40):
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not run_folder.exists():
                time.sleep(0.01)
            if run_folder.exists() and "--resume" not in arguments:
                arguments = [*SIMAN, "convert", "--resume", str(run_folder), "--device", "cpu", "--save-every", "0"]
            if kills >= 4:
                assert process.wait(timeout=300) == 0, process.stderr.read()  # type: ignore[union-attr]
                break
            starting = 0 if kills == 0 else 4.0  # a resumed process imports torch for a while first
            if kill_within(process, starting + chance.uniform(0, 4)):
                assert process.returncode == 0
                break
            kills += 1
        visible_files_are_whole(tmp_path)
    assert kills >= 1, f"seed {seed}: nothing was killed"
    assert outcome(Run(run_folder)) == outcome(uninterrupted), f"seed {seed}"
    assert [path.name for path in run_folder.rglob(".tmp-*")] == []


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
    subprocess.run([*SIMAN, *shlex.split(resume)[1:]], check=True, capture_output=True, timeout=300)
    assert outcome(Run(tmp_path / "run")) == outcome(uninterrupted)


def test_workers_change_nothing(digits: Path, tmp_path: Path, uninterrupted: Run) -> None:
    subprocess.run(command(tmp_path, digits, "-j", "2"), check=True, capture_output=True, timeout=300)
    assert outcome(Run(tmp_path / "run")) == outcome(uninterrupted)


def test_output_is_one_line_an_epoch_when_not_a_terminal(digits: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, digits, "--json"), check=True, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout)["best_epoch"] in range(4)
    assert "\x1b" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("full-precision", "binary"))]
    assert len(lines) == 5
