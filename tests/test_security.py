"""What the README's Security section says: nothing in a file is executed, and nothing asks the network unasked."""

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import yaml
from test_resume import Killed, killed_at

import siman_convert
from siman_convert.cli import run as run_command
from siman_convert.recipe import _Loader
from siman_convert.runs import Run

PACKAGE = Path(siman_convert.__file__).parent
EXECUTING = {"eval", "exec", "compile", "__import__"}
LOADING = {
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "os.system",
    "marshal.loads",
    "numpy.load",
    "np.load",
}


class Evil:
    """Unpickled by whoever trusts it, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.proof),)


def plain(value: object, file: BinaryIO) -> None:
    """As torch wrote its files once; of a newer protocol it warns before it refuses."""
    pickle.dump(value, file, protocol=2)


def test_evil_does_what_it_says(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()


def called(path: Path) -> set[str]:
    """Names of what a file calls, as far as they are written out: `f` and `module.f`."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {ast.unparse(function) for function in calls if isinstance(function, ast.Name | ast.Attribute)}


def test_no_code_of_ours_executes_or_unpickles_what_it_reads() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    found = {(path.name, name) for path in files for name in called(path) & (EXECUTING | LOADING)}
    assert found == {("recipe.py", "yaml.load")}
    assert issubclass(_Loader, yaml.SafeLoader)  # stricter: no aliases, no long numbers
    unpicklers = {path.name for path in files if "Unpickler(" in path.read_text(encoding="utf-8")}
    assert unpicklers == {"cifar.py"}  # its own, which admits five names


def command(output: Path, data: Path, *extra: str) -> list[str]:
    return [
        "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--epochs", "1", "-b", "32", "--set", "calibration_images=32",
        "--set", "final_calibration_images=32", "--img-size", "32", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cut(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was killed within its epoch."""
    output = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.train.Phase._step", 3)
        run_command(command(output, digits, "--save-every", "0"))
    return Run(output / "run")


@pytest.mark.parametrize("write", [plain, torch.save])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_strangers_state_executes_nothing(
    write: Callable[[object, BinaryIO], None], name: str, cut: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = cut.state()
    assert state is not None
    whole, proof = (state / name).read_bytes(), tmp_path / "proof"
    with (state / name).open("wb") as file:
        write(Evil(proof), file)
    try:
        code = run_command(["convert", "--resume", str(cut.folder), "--device", "cpu", "--dry-run"])
        assert code == 0  # the state is read when training begins
        if name != "random_states_0.pkl":  # which cannot be read, and is not needed: every step's generators are seeded
            assert run_command(["convert", "--resume", str(cut.folder), "--device", "cpu"]) == 2
            assert "damaged, it cannot be resumed" in capsys.readouterr().err
        else:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                killed_at(patch, "siman_convert.train.Phase._step", 1)
                run_command(["convert", "--resume", str(cut.folder), "--device", "cpu"])
    finally:
        (state / name).write_bytes(whole)
    assert not proof.exists()


@pytest.mark.parametrize("write", [plain, torch.save])
def test_a_strangers_checkpoint_executes_nothing(
    write: Callable[[object, BinaryIO], None], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, proof = tmp_path / "weights.pth", tmp_path / "proof"
    with file.open("wb") as opened:
        write({"state_dict": Evil(proof)}, opened)
    assert run_command([*command(tmp_path, digits), "--weights", str(file)]) == 2
    assert "not a weights file that can be read safely" in capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize("model", ["hf-hub:someone/model", "local-dir:/tmp", "timm/resnet18"])
def test_a_strangers_run_names_no_model_from_elsewhere(
    model: str, cut: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cut.folder / "run.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"model": model}))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it asked the network"))
    try:
        assert run_command(["convert", "--resume", str(cut.folder), "--device", "cpu"]) == 2
    finally:
        path.write_text(whole)
    assert f"unknown model '{model}'" in capsys.readouterr().err


AUDITED = """
import json, sys
seen = set()
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "urllib.Request", "os.system"):
        seen.add(f"{event} {arguments[:3]}")
import siman_convert.conversion, siman_convert.exporting, siman_convert.evaluation  # what libraries do at import is theirs
from siman_convert.cli import run
sys.addaudithook(hook)
codes = [run(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted(seen)]), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_conversion_from_start_to_end_asks_no_network_and_unpickles_no_object(digits: Path, tmp_path: Path) -> None:
    run, model = str(tmp_path / "run"), str(tmp_path / "run" / "model")
    commands = [
        command(tmp_path, digits),
        ["convert", "--resume", run, "--device", "cpu"],
        ["export", run, "--format", "all", "--images", "16"],
        ["eval", run],
        ["eval", f"{model}.onnx", "--data", str(digits)],
        ["eval", f"{model}.safetensors", "--data", str(digits)],
        ["inspect", "test_resnet"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, json.dumps(commands)], capture_output=True, text=True, timeout=600
    )
    codes, seen = json.loads(done.stderr.splitlines()[-1])
    assert codes == [0] * len(commands), done.stderr
    assert seen == []
