"""Several processes at one output folder or one run: none mixes with another, and readers never meet anything half-done."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import SIMAN, outcome

import siman_convert
from siman_convert import subjects
from siman_convert.cli import run as run_command
from siman_convert.description import description_of
from siman_convert.errors import InputError
from siman_convert.packed import load
from siman_convert.runs import Run, find_run
from siman_convert.subjects import packed_run

LIMIT = 600


def command(output: Path, data: Path, epochs: int, *extra: str) -> list[str]:
    return [
        *SIMAN, "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--fp-epochs", "0", "--epochs", str(epochs), "-b", "32", "--set", "calibration_images=32",
        "--set", "final_calibration_images=32", "--img-size", "32", *extra,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_conversions_into_one_name_get_a_folder_each(digits: Path, tmp_path: Path) -> None:
    """They compute the same, so that any mixture of the two would show in one of them."""
    started = [
        subprocess.Popen(command(tmp_path, digits, 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=LIMIT) for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert {line for out, _ in texts for line in out.splitlines() if line.startswith("run ") and "  " not in line} == {
        f"run {tmp_path / name}" for name in ("run", "run-2")
    }
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "last", "run", "run-2"}
    assert outcome(Run(tmp_path / "run")) == outcome(Run(tmp_path / "run-2"))
    assert find_run(None, tmp_path).name in ("run", "run-2")


@pytest.fixture(scope="module")
def training(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Run]]:
    """A process that trains until it is stopped, and its run, where two epochs are done."""
    output = tmp_path_factory.mktemp("training")
    arguments = command(output, digits, 10_000, "--save-every", "0")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("binary 2/"):
                break
        yield process, Run(output / "run")
        if process.poll() is None:
            process.kill()


def resume(run: Run) -> list[str]:
    return ["convert", "--resume", str(run.folder), "--device", "cpu"]


@pytest.mark.slow
def test_a_run_in_training_can_be_read_and_not_resumed(
    training: tuple[subprocess.Popen[str], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    process, run = training
    for _ in range(300):  # a state every step: each read may meet its replacement
        assert run.progress().phase == "binary"
        assert len(run.metrics()) >= 2
    assert run_command(resume(run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"siman: {run.folder} is being trained by another process; wait for it, or stop it first"
    assert run_command(["runs", "--output", str(run.folder.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["phase"] == "binary"
    assert run_command(["eval", str(run.folder), "--last", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 97
    for which in ([], ["--last"]):
        assert run_command(["export", str(run.folder), "--format", "all", "--images", "16", *which]) == 0
        file = run.folder / "model.safetensors"
        accuracy = description_of(load(file)).accuracy
        assert accuracy is not None
        assert siman_convert.evaluate(file, data=run.info().data).top1 == pytest.approx(accuracy.top1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    assert [path.name for path in run.folder.rglob(".tmp-*")] == []


@pytest.mark.slow
def test_two_exports_at_once_write_the_file_that_one_writes(
    training: tuple[subprocess.Popen[str], Run], tmp_path: Path
) -> None:
    """Of the run that the test before has stopped; into the same files."""
    process, run = training
    if process.poll() is None:
        process.kill()
        process.wait()
    files = [tmp_path / name for name in ("model.onnx", "model.safetensors")]
    arguments = [*SIMAN, "export", str(run.folder), "--format", "all", "--images", "16", "--output", str(tmp_path)]
    contents = []
    for count in (2, 1):
        exports = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(count)]
        errors = [export.communicate(timeout=LIMIT)[1] for export in exports]
        assert [export.returncode for export in exports] == [0] * count, errors
        assert {path for path in tmp_path.iterdir() if path.is_file()} == {*files, tmp_path / "README.md"}
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_weights_are_exported_with_the_metrics_of_their_epoch(
    training: tuple[subprocess.Popen[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the next epoch were published while the weights are read, and as if it was killed before its metrics were."""
    process, run = training
    if process.poll() is None:
        process.kill()
        process.wait()
    metrics = run.folder / "metrics.jsonl"
    whole = metrics.read_text()
    monkeypatch.setattr(subjects, "READINGS", 3)
    monkeypatch.setattr(subjects.time, "sleep", lambda _seconds: metrics.write_text(whole))
    before = "".join(whole.splitlines(keepends=True)[:-1])
    metrics.write_text(before)
    accuracy = description_of(packed_run(run, "last")).accuracy
    assert accuracy is not None
    assert accuracy.top1 == run.progress().top1("binary")
    monkeypatch.setattr(subjects.time, "sleep", lambda _seconds: None)
    metrics.write_text(before)
    with pytest.raises(InputError, match=r"weights and metrics are not of one epoch: .*`siman convert --resume .*run`"):
        packed_run(run, "last")
    metrics.write_text(whole)
