"""siman doctor: what it finds on a sound machine, on broken ones, and what it never tells."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siman_convert import doctor
from siman_convert.cli import run as siman
from siman_convert.doctor import Problem, Report, anonymous, bug_report, examine
from siman_convert.environment import version_of
from siman_convert.runtime import native, reference


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siman_convert.hub.answers", lambda _: True)


def test_a_sound_machine_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("siman can be used here.\n")
    block = out.split("```text\n")[1].split("\n```")[0].splitlines()
    facts = dict(line.split(None, 1) for line in block)
    assert facts["siman"].strip() == version_of("siman-convert")
    assert f"torch {version_of('torch')}," in facts["packages"]
    expected = "stock: equal; with our kernels: equal" if native.variant() else "stock: equal"
    assert f"ONNX Runtime   {expected}" in block
    assert facts["kernels"].startswith(f"{native.variant()}, of ") or native.variant() is None


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["usable"]) == (1, True)
    assert document["facts"]["ONNX Runtime"].startswith("stock: equal")


@pytest.mark.slow
def test_nothing_private_is_told(tmp_path: Path) -> None:
    """A user called jane, with secrets in her environment, a run folder and a cache in her home."""
    home = tmp_path / "home" / "jane-doe"
    home.mkdir(parents=True)
    secrets = {"HF_TOKEN": "hf_verysecret", "WANDB_API_KEY": "wandbsecret", "HF_ENDPOINT": "http://jane:pw@127.0.0.1:9"}
    environment = {**os.environ, **secrets, "HOME": str(home), "HF_HOME": str(home / "hf"), "USER": "jane-doe"}
    command = [sys.executable, "-m", "siman_convert", "doctor", "--output", str(home / "runs")]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for private in ("jane", "verysecret", "wandbsecret", ":pw@"):
        assert private not in done.stdout + done.stderr
    assert "in ~/hf/hub" in done.stdout
    assert "HF_TOKEN is set, HF_ENDPOINT is set, HF_HOME is set, WANDB_API_KEY is set" in done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane/x.so: bad", "~/x.so: bad"),
        ("in /Users/jane", "in ~"),
        ("/root/.cache/a", "~/.cache/a"),
        ("C:\\Users\\jane\\a", "~\\a"),
        ("a\nb\x1b[31m", "a b [31m"),
        ("/homes/of", "/homes/of"),
        ("/rooted", "/rooted"),
    ],
)
def test_home_folders_have_no_name(text: str, shown: str) -> None:
    assert anonymous(text) == shown


def broken(code: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a process where something is broken first."""
    command = f"import sys\n{code}\nfrom siman_convert.cli import run\nsys.exit(run(['doctor', '--json']))"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("torch", "torch cannot be imported"),
        ("torchvision", "torch cannot be imported"),
        ("onnxruntime", "ONNX Runtime cannot be imported"),
    ],
)
def test_a_package_that_cannot_be_imported(module: str, what: str) -> None:
    done = broken(f"sys.modules[{module!r}] = None")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    (problem,) = [problem for problem in document["problems"] if problem["serious"]]
    assert problem["what"].startswith(what)
    assert "pip install --force-reinstall" in problem["mend"]
    assert document["facts"]["packages"]  # the other checks ran


def no_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(native, "find_library", lambda: None)


def damaged_library(patch: pytest.MonkeyPatch) -> None:
    path = Path(os.environ["PYTEST_DOCTOR_LIBRARY"])
    path.write_bytes(b"not a library")
    patch.setattr(native, "find_library", lambda: path)


def wrong_variant(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("SIMAN_ISA", "mmx")


def other_bits(patch: pytest.MonkeyPatch) -> None:
    real = reference.evaluator

    class Wrong:
        def __init__(self, model: Any) -> None:
            self.inner = real(model)

        def run(self, *arguments: Any) -> list[np.ndarray]:
            return [np.nextafter(value, np.float32(np.inf)) for value in self.inner.run(*arguments)]

    patch.setattr(reference, "evaluator", Wrong)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")
    patch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20, total=64 << 20))


def no_package(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(doctor, "version_of", lambda name: "unknown" if name == "timm" else "1.0")


@pytest.mark.parametrize(
    ("damage", "usable", "what", "mend"),
    [
        (no_library, True, "the native kernels are not installed", "install a compiler, then"),
        (damaged_library, False, "the kernel library cannot be loaded", "pip install --force-reinstall --no-deps siman-convert"),
        (wrong_variant, False, "SIMAN_ISA=mmx: there is no such variant", "unset SIMAN_ISA"),
        (other_bits, False, "stock: other values than the reference's", "pip install --force-reinstall onnxruntime"),
        (full_disk, True, "only 0.0 GiB are free for runs", "make room"),
        (full_disk, True, "only 64 MiB of shared memory", "--shm-size"),
        (no_package, False, "timm is not installed", "pip install timm"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do(
    damage: Callable[[pytest.MonkeyPatch], None],
    usable: bool,
    what: str,
    mend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTEST_DOCTOR_LIBRARY", str(tmp_path / "libsiman_native.so"))
    damage(monkeypatch)
    assert siman(["doctor"]) == (0 if usable else 1)
    out = capsys.readouterr().out
    assert f"{'note' if usable else 'PROBLEM':<8} " in out
    assert what in out
    assert mend in " ".join(out.split())
    assert f"siman {'can' if usable else 'cannot'} be used here." in out


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert any("cannot be written to" in problem.what for problem in examine(tmp_path / "a" / "b").problems)


def test_quiet_leaves_the_block_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["doctor", "-q"]) == 0
    assert "```" not in capsys.readouterr().out


def test_the_block_is_plain_lines() -> None:
    lines = list(bug_report(Report({"a": "1", "long": "2"}, [Problem("bad", "mend")])))
    assert lines == ["a     1", "long  2", "problem  bad"]
