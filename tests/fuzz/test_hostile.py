"""Hostile files given to the commands: one line that says what is wrong, the documented exit code, nothing executed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import DATA, ONNX, PACKED, RECIPES, RUNS, SHARDS, TRACE, WEIGHTS, write_run
from readers import READERS, SCRATCH

from siman_convert.cli import run as siman

Refused = Callable[..., str]
SEEDS = Path(__file__).parent / "seeds"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in an empty folder; gives the one line on stderr."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: str | Path, code: int = 2) -> str:
        capsys.readouterr()
        found = siman([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert (found, len(lines)) == (code, 1), lines
        assert lines[0].startswith("siman: ")
        assert lines[0].isprintable()
        assert len(lines[0]) < 1200
        assert not (here / TRACE).exists(), "the file was executed"
        return lines[0]

    return run


@pytest.mark.parametrize("name", PACKED)
def test_packed_files(name: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(PACKED[name]())
    for command in (("eval", path, "--data", "digits"), ("verify", path, "--data", "digits"), ("bench", path)):
        assert str(path) in refused(*command)


@pytest.mark.parametrize("name", ONNX)
def test_onnx_files(name: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(ONNX[name]())
    for command in (("eval", path, "--data", "digits"), ("verify", path, "--data", "digits"), ("bench", path)):
        refused(*command)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(RECIPES[name]())
    assert "mine.yaml" in refused("convert", "test_resnet", "--weights", "none", "--recipe", path)
    assert "mine.yaml" in refused("recipes", "show", path, "--all")


def files_outside(folder: Path, root: Path) -> dict[Path, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and folder not in path.parents)
    return {path: path.read_bytes() for path in found}


@pytest.mark.parametrize("name", RUNS)
def test_run_folders(name: str, refused: Refused, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "one")
    RUNS[name](folder)
    elsewhere = files_outside(folder, tmp_path)
    refused("convert", "--resume", folder)
    refused("eval", folder)
    assert files_outside(folder, tmp_path) == elsewhere
    assert siman(["runs", "--output", str(folder.parent)]) == 0
    assert siman(["runs", "--output", str(folder.parent), "--json"]) == 0


@pytest.mark.parametrize("name", [*DATA, *SHARDS])
def test_data(name: str, refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (DATA | SHARDS)[name](folder)
    spec = f"wds/{folder}" if name in SHARDS else str(folder)
    line = refused("convert", "test_resnet", "--weights", "none", "--data", spec)
    assert ("outside the folder" if name in ("shards elsewhere", "shards at the root") else "data") in line


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights(name: str, ending: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    path.write_bytes(WEIGHTS[name]())
    assert "weights." in refused("convert", "test_resnet", "--data", "digits", "--weights", path)


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_fuzzed_readers_take_their_seeds(path: Path) -> None:
    """As they are, and with bytes changed: what atheris does for hours, without it."""
    read, data = READERS[path.parent.name], path.read_bytes()
    read(data)
    for at in range(0, len(data), max(1, len(data) // 20)):
        read(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        read(data[:at])
    assert SCRATCH.exists()
