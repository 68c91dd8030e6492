"""Training of two processes, started by the launchers people use: what they compute, write and say, and how they end.

All on the CPU (gloo) but for synchronised BatchNorm, which needs two GPUs.
"""

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import phase_script
import psutil
import pytest
import torch
from PIL import Image

from siman_convert.cli import run as run_command
from siman_convert.conversion import _own_device
from siman_convert.errors import InputError
from siman_convert.preparation import check_environment
from siman_convert.recipe import Recipe
from siman_convert.runs import Run
from siman_convert.watch import Watcher

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIMAN = ["-m", "siman_convert"]
TIMES = ("train_seconds", "eval_seconds")
LIMIT = 600  # seconds; a hang, not slowness, should reach it


def command(output: Path, data: Path, *extra: str) -> list[str]:
    return [
        "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--fp-epochs", "1", "--epochs", "2", "-b", "16", "--set", "calibration_images=64",
        "--set", "final_calibration_images=64", "--img-size", "32", *extra,
    ]  # fmt: skip


def outcome(run: Run) -> tuple[list[bytes], list[dict[str, object]]]:
    """The bytes of all weights, and the metrics without wall times."""
    metrics = [{key: value for key, value in record.items() if key not in TIMES} for record in run.metrics()]
    return [run.weights(which).read_bytes() for which in ("full-precision", "best", "last")], metrics


def ours(stderr: str) -> list[str]:
    """Our lines among the launcher's own."""
    return [line for line in stderr.splitlines() if line.startswith("siman: ")]


def launched(arguments: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT, **settings)


class Training:
    """A launcher at work; what it prints is collected, and it is killed with all its processes in the end."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.errors = ""
        self._readers = [threading.Thread(target=self._read_output), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for child in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                child.kill()
        for reader in self._readers:
            reader.join(LIMIT)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def wait_for(self, reached: Callable[[], bool]) -> None:
        for _ in range(LIMIT * 20):
            if reached():
                return
            assert self.process.poll() is None, self.errors
            time.sleep(0.05)
        raise AssertionError(f"not reached: {self.lines} {self.errors}")

    def kill(self, rank: int) -> None:
        """SIGKILL to the process of that rank, not to the processes that load its images."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                child.kill()
                return
        raise AssertionError(f"no process of rank {rank}")

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line


@pytest.fixture(scope="module")
def scenarios(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the scenarios of `phase_script` that a CPU can do."""
    output = tmp_path_factory.mktemp("scenarios")
    done = launched([*TORCHRUN, phase_script.__file__, str(digits), str(output), "cpu"])
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def together(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, subprocess.CompletedProcess[str]]:
    """A whole conversion by two processes, and what it printed."""
    output = tmp_path_factory.mktemp("together")
    done = launched([*TORCHRUN, *SIMAN, *command(output, digits)])
    assert done.returncode == 0, done.stderr
    return Run(output / "run"), done


def results(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{scenario}-{rank}.pt") for rank in (0, 1)]


def assert_two_equal_one(two: dict[str, Any], one: dict[str, Any]) -> None:
    """The same to rounding: float64, in another order of summation."""
    assert len(one["losses"]) == len(two["losses"]) == 20
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert one["losses"][0] != pytest.approx(one["losses"][-1], rel=1e-3)  # it did train
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-8, atol=1e-10)
    assert two["metrics"] == one["metrics"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)  # of float32 logits
    for key in ("correct", "steps", "images"):
        assert two["sums"][key] == one["sums"][key]
    assert two["sums"]["images"] == 320


@pytest.mark.parametrize("scenario", ["frozen", "features"])
def test_two_processes_equal_one_at_the_same_global_batch(scenario: str, digits: Path, scenarios: Path) -> None:
    two, _ = results(scenarios, scenario)
    assert_two_equal_one(two, phase_script.train(scenario, str(digits), "cpu"))
    assert two["metrics"]["images"] == 97  # 49 and 48, in batches of 8


@pytest.mark.parametrize("scenario", ["frozen", "features", "real"])
def test_all_processes_hold_the_same_bits(scenario: str, scenarios: Path) -> None:
    first, second = results(scenarios, scenario)
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    for key in ("losses", "metrics", "loss"):
        assert first[key] == second[key]
    assert math.isfinite(first["loss"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_synchronised_batch_norm_equals_one_process(digits: Path, tmp_path: Path) -> None:
    done = launched([*TORCHRUN, phase_script.__file__, str(digits), str(tmp_path), "cuda"])
    assert done.returncode == 0, done.stderr
    assert_two_equal_one(results(tmp_path, "sync")[0], phase_script.train("sync", str(digits), "cuda:0"))


@pytest.mark.slow
def test_one_process_speaks_and_writes(
    together: tuple[Run, subprocess.CompletedProcess[str]], digits: Path, tmp_path: Path
) -> None:
    run, done = together
    assert run_command(command(tmp_path, digits)) == 0
    alone = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path.relative_to(run.folder.parent) for path in run.folder.parent.rglob("*")} - alone == {
        Path("run/state/000005/random_states_1.pkl")  # each process resumes with its own
    }
    assert [(record["phase"], record["epoch"]) for record in run.metrics()] == [
        ("full-precision", 1), ("binary", 0), ("binary", 1), ("binary", 2), ("binary", 2),
    ]  # fmt: skip
    assert {record["images"] for record in run.metrics()} == {97}
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == len(set(lines))
    beginnings = [line.split("  ")[0] for line in lines]
    for beginning in (
        "1/5 environment cpu, 1 thread, 2 processes",
        f"run {run.folder}",
        "full precision",
        "next: siman",
    ):
        assert sum(line.startswith(beginning) for line in lines) == 1, beginning
    assert beginnings.count("binary re-estimated") == 1
    assert ours(done.stderr) == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["last", "best", "full-precision"])
def test_eval_repeats_what_two_processes_measured(
    which: str, together: tuple[Run, subprocess.CompletedProcess[str]]
) -> None:
    from siman_convert.evaluation import evaluate

    run, _ = together
    records = [
        record for record in run.metrics() if (record["phase"] == "full-precision") == (which == "full-precision")
    ]
    record = max(records, key=lambda record: record["top1"]) if which == "best" else records[-1]
    metrics = evaluate(run, which=which, device="cpu")
    assert (metrics.top1, metrics.top5, metrics.images) == (record["top1"], record["top5"], record["images"])
    assert metrics.loss == pytest.approx(record["loss"], rel=1e-5)  # summed in another order


@pytest.mark.slow
def test_killed_processes_are_started_anew_and_end_the_same(
    together: tuple[Run, subprocess.CompletedProcess[str]], digits: Path, tmp_path: Path
) -> None:
    """First one that does not write, before anything was saved; then the one that does, while its loading process lives on.

    A launch begins no second run and takes none of another launch: what has the name asked for is not its own.
    """
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run-2")
    arguments = [*TORCHRUN, "--max-restarts", "2", *SIMAN, *command(tmp_path, digits, "-j", "1")]
    with Training(arguments) as training:
        training.wait_for(lambda: f"run {run.folder}" in training.lines)
        assert run.state() is None
        training.kill(1)
        training.wait_for(lambda: len(run.metrics()) >= 3)
        training.kill(0)
        assert training.process.wait(LIMIT) == 0
    assert training.lines.count(f"note started anew by the launcher: going on with {run.folder}") == 2
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "last", "run", "run-2"}
    assert outcome(run) == outcome(together[0])
    assert len(ours(training.errors)) <= 2
    for line in ours(training.errors):  # of the process that was not killed
        assert line.startswith(("siman: another process of this training ended", "siman: stopped "))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_named_command_goes_on(
    together: tuple[Run, subprocess.CompletedProcess[str]], digits: Path, tmp_path: Path
) -> None:
    with Training([*TORCHRUN, *SIMAN, *command(tmp_path, digits)]) as training:
        training.wait_for(lambda: any(line.startswith("binary 1/2") for line in training.lines))
        training.process.send_signal(signal.SIGINT)
        assert training.process.wait(LIMIT) != 0
    (line,) = ours(training.errors)
    assert "; all saved; go on, under the same launcher, with: " in line
    again = line.partition(" with: ")[2]
    assert again == f"-m siman_convert convert --resume {tmp_path / 'run'} --device cpu"
    done = launched([*TORCHRUN, *again.split()])
    assert done.returncode == 0, done.stderr
    assert outcome(Run(tmp_path / "run")) == outcome(together[0])


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_line(tmp_path: Path) -> None:
    """An unreadable image, which one of two processes meets."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number in range(count):
            folder = tmp_path / "images" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    broken = tmp_path / "images" / "train" / "a" / "6.png"
    broken.write_bytes(broken.read_bytes()[:60])  # its header is whole
    arguments = command(tmp_path, tmp_path / "images", "-b", "3", "--set", "max_bad_images=0")
    done = launched([*TORCHRUN, *SIMAN, *arguments])
    assert done.returncode == 1
    (line,) = ours(done.stderr)
    assert line.startswith("siman: 1 of 16 images cannot be read, more than max_bad_images = 0 allows")
    assert f"; first: {broken}: " in line


def test_what_all_processes_find_wrong_is_said_once() -> None:
    done = launched([*TORCHRUN, *SIMAN, "convert", "test_resnet", "--set", "nonsense=1"])
    assert done.returncode == 1
    (line,) = ours(done.stderr)
    assert line.startswith("siman: recipe finetune: unknown field 'nonsense'")


def test_synchronised_batch_norm_is_refused_where_torch_has_none() -> None:
    device, recipe = torch.device("cpu"), Recipe(sync_bn=True)
    with pytest.raises(
        InputError, match="--sync-bn: torch synchronises BatchNorm on GPUs only, and this is cpu; leave it"
    ):
        check_environment(device, 2, recipe, Watcher())
    check_environment(device, 1, recipe, Watcher())


def test_every_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which device is asked for; whether it works shows where there are GPUs."""
    asked: list[str] = []
    monkeypatch.setattr("siman_convert.conversion.resolve_device", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in ("0", "1"):
        for key, value in (("WORLD_SIZE", "3"), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(key, value)
        for device in ("auto", "cuda", "cpu"):
            _own_device(device)
    assert asked == ["cuda:0", "cuda:0", "cpu", "cuda:1", "cuda:1", "cpu"]
    with pytest.raises(
        InputError, match="--device cuda:1: not with 3 processes; expected cuda, where each takes a GPU"
    ):
        _own_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="--device auto: no GPU for process 3 on a machine of 2; start as many"):
        _own_device("auto")
