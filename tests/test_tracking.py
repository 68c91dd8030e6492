"""--track: what TensorBoard and W&B are told is metrics.jsonl, whatever was killed meanwhile, and training is as without."""

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from siman_convert.cli import run as siman
from siman_convert.errors import InputError
from siman_convert.runs import Run
from siman_convert.tracking import FOLDER, figures, require_trackers

pytestmark = pytest.mark.slow

SIMAN = [sys.executable, "-m", "siman_convert"]
TIMES = ("train_seconds", "eval_seconds")
TRACK = ["--track", "tensorboard"]


def command(output: Path, data: Path, *extra: str) -> list[str]:
    return [
        "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--fp-epochs", "1", "--epochs", "2", "-b", "32", "--set", "calibration_images=64",
        "--set", "final_calibration_images=64", "--img-size", "32", *extra,
    ]  # fmt: skip


def expected(run: Run) -> dict[tuple[str, int], float]:
    """(tag, step) -> value, as metrics.jsonl has them."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return {
        (f"{record['phase']}/{name}", number): value
        for number, record in enumerate(map(json.loads, lines), start=1)
        for name, value in record.items()
        if isinstance(value, int | float) and name != "re_estimated"
    }


def points(accumulator: EventAccumulator) -> list[tuple[str, int, float]]:
    return [
        (tag, event.step, event.value) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)
    ]


def require_points_of(run: Run, accumulator: EventAccumulator) -> None:
    """Every figure of metrics.jsonl once, in float32."""
    found, wanted = points(accumulator), expected(run)
    assert sorted((tag, step) for tag, step, _ in found) == sorted(wanted)
    for tag, step, value in found:
        assert value == pytest.approx(wanted[tag, step], rel=1e-6)


@pytest.fixture(scope="module")
def tracked(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("tracked")
    assert siman(command(output, digits, *TRACK)) == 0
    return Run(output / "run")


def events(run: Run) -> EventAccumulator:
    return EventAccumulator(str(run.folder / FOLDER)).Reload()


def test_events_are_the_lines_of_metrics(tracked: Run) -> None:
    records = [(record["phase"], record["epoch"]) for record in tracked.metrics()]
    assert records == [("full-precision", 1), ("binary", 0), ("binary", 1), ("binary", 2), ("binary", 2)]
    require_points_of(tracked, events(tracked))


def test_tracking_changes_neither_recipe_nor_training(tracked: Run, digits: Path, tmp_path: Path) -> None:
    assert siman(command(tmp_path, digits)) == 0
    plain = Run(tmp_path / "run")
    assert not (plain.folder / FOLDER).exists()
    assert plain.info().recipe_digest == tracked.info().recipe_digest
    for which in ("best", "last", "full-precision"):
        assert plain.weights(which).read_bytes() == tracked.weights(which).read_bytes()
    without_times = [
        [{key: value for key, value in record.items() if key not in TIMES} for record in run.metrics()]
        for run in (plain, tracked)
    ]
    assert without_times[0] == without_times[1]


def test_killed_and_resumed_no_point_is_doubled_or_lost(digits: Path, tmp_path: Path) -> None:
    """Nor in a TensorBoard that was open all the time. The last point before the kill is taken away: it comes back."""
    run = Run(tmp_path / "run")
    arguments = command(tmp_path, digits, *TRACK)
    with subprocess.Popen([*SIMAN, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("binary 1/2"):
            assert process.poll() is None
        process.kill()
    (file,) = (run.folder / FOLDER).iterdir()
    open_meanwhile = events(run)
    assert len({step for _, step, _ in points(open_meanwhile)}) >= 2
    file.write_bytes(file.read_bytes()[:-10])
    time.sleep(1.1)  # event files are told apart by the second
    assert siman(["convert", "--resume", str(run.folder), "--device", "cpu", *TRACK]) == 0
    assert len(run.metrics()) == 5
    require_points_of(run, events(run))
    assert [path.stat().st_size > 0 for path in sorted((run.folder / FOLDER).iterdir())] == [False, True]
    open_meanwhile.Reload()
    require_points_of(run, open_meanwhile)


def test_resumed_without_tracking_and_with_it_again(digits: Path, tmp_path: Path) -> None:
    """Lines of the time without are told as well."""
    assert siman(command(tmp_path, digits)) == 0
    run = Run(tmp_path / "run")
    assert siman(["convert", "--resume", str(run.folder), "--device", "cpu", *TRACK]) == 0
    require_points_of(run, events(run))


@pytest.mark.slow
def test_of_two_processes_one_writes(digits: Path, tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "siman_convert",
    ]
    arguments = command(tmp_path, digits, "-b", "16", *TRACK)
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    assert len(list((run.folder / FOLDER).iterdir())) == 1
    require_points_of(run, events(run))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorboard", "--track tensorboard: the package tensorboard is not installed; `pip install tensorboard`"),
        ("wandb", "--track wandb: the package wandb is not installed"),
        ("mlflow", "--track 'mlflow': expected tensorboard or wandb"),
    ],
)
def test_a_missing_package_is_one_line_before_anything_is_written(
    name: str,
    message: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("siman_convert.tracking.importlib.util.find_spec", lambda _: None)
    assert siman(command(tmp_path / "runs", digits, "--track", name)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""
    assert not (tmp_path / "runs").exists()


class WandB(types.ModuleType):
    """A stand-in that counts steps as W&B's runs do: a resumed run goes on behind its last step, and drops what is older."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.dropped = self.finished = 0
        self.key: str | None = None
        self.Error = ConnectionError

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        if self.key == "refused":
            raise self.Error("no answer\nfrom the server")
        return self.key is not None

    def init(self, **settings: Any) -> Any:
        self.inits.append(settings)
        lines = self.runs.setdefault(settings["id"], [])
        run = types.SimpleNamespace(step=lines[-1][0] + 1 if lines else 0)

        def log(values: dict[str, float], step: int) -> None:
            if step < run.step:
                self.dropped += 1
            else:
                lines.append((step, values))
                run.step = step

        def finish() -> None:
            self.finished += 1

        run.log, run.finish = log, finish
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> WandB:
    module = WandB()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def test_wandb_is_told_each_line_once(
    wandb: WandB, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: Callable[..., Any] = Run.commit
    commits = []

    def stop_after_three(self: Run, *arguments: Any) -> None:
        saved(self, *arguments)
        commits.append(1)
        if len(commits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", stop_after_three)
    assert siman(command(tmp_path, digits, "--track", "wandb")) == 130
    run = Run(tmp_path / "run")
    assert (len(run.metrics()), [step for step, _ in next(iter(wandb.runs.values()))]) == (3, [1, 2])
    assert siman(["convert", "--resume", str(run.folder), "--device", "cpu", "--track", "wandb"]) == 0
    (lines,) = wandb.runs.values()
    assert [step for step, _ in lines] == [1, 2, 3, 4, 5]
    assert [values for _, values in lines] == [figures(record) for record in run.metrics()]
    assert (wandb.dropped, wandb.finished) == (0, 2)
    assert {init["name"] for init in wandb.inits} == {"run"}
    assert wandb.inits[0]["config"]["epochs"] == 2


def test_wandb_without_a_login_is_one_line(wandb: WandB, monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(InputError, match="nobody is logged in; `wandb login`, or WANDB_MODE=offline"):
        require_trackers(["wandb"])
    wandb.key = "refused"
    with pytest.raises(InputError, match="--track wandb: no answer from the server; WANDB_MODE=offline"):
        require_trackers(["wandb"])
    wandb.key = "secret"
    require_trackers(["wandb"])
