"""What holds for every command, a new one too: --json, --help, -q and -v, exit codes, colours, completion."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from exported_run import Life, copied, graphs_once, life, printed  # noqa: F401  fixtures
from packed_models import one_thread  # noqa: F401  a fixture
from PIL import Image

from siman_convert.cli import make_app
from siman_convert.cli import run as siman
from siman_convert.cli.common import print_json
from siman_convert.model_table import read_table

PYTHON = [sys.executable, "-c"]
HEAVY = (
    "torch",
    "timm",
    "numpy",
    "onnx",
    "onnxruntime",
    "huggingface_hub",
    "accelerate",
)  # typer takes pydantic itself
FAST = [
    "--epochs", "1", "--img-size", "32", "--set", "calibration_images=64", "--set", "final_calibration_images=0",
    "--device", "cpu",
]  # fmt: skip
ARGUMENTS = {  # of every command that there is; RUN, ONNX, IMAGE, DATA and NEW stand for paths
    "convert": ["test_resnet", "--data", "DATA", "--weights", "none", "--output", "NEW", *FAST],
    "eval": ["ONNX"],
    "export": ["RUN", "--format", "safetensors", "--output", "NEW", "--images", "4"],
    "predict": ["ONNX", "IMAGE"],
    "verify": ["ONNX", "--images", "4"],
    "bench": ["ONNX", "--seconds", "0.001", "--threads", "1"],
    "inspect": ["RUN"],
    "models": ["resnet18"],
    "runs": [],
    "doctor": [],
    "report": ["RUN", "--html", "NEW.html"],
    "recipes ls": [],
    "recipes show": ["quick"],
    "recipes cp": ["quick", "NEW.yaml"],
}


def commands() -> Iterator[str]:
    """All of them, those of groups with their group's name."""

    def below(command: Any, name: str) -> Iterator[str]:
        if hasattr(command, "commands"):
            for inner, child in command.commands.items():
                yield from below(child, f"{name} {inner}".strip())
        else:
            yield name

    return below(typer.main.get_command(make_app()), "")


def test_every_command_is_tried_here() -> None:
    assert sorted(commands()) == sorted(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_json_is_one_document_and_nothing_else_is_on_stdout(
    name: str, copied: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On the file descriptor, so that libraries are heard too."""
    monkeypatch.setattr("siman_convert.hub.answers", lambda _: True)
    monkeypatch.chdir(copied.folder)
    image = tmp_path / "image.png"
    Image.new("L", (9, 9), 100).save(image)
    places = {"RUN": copied.run.folder, "ONNX": copied.onnx, "IMAGE": image, "DATA": copied.run.info().data}
    places |= {"NEW": tmp_path / "new", "NEW.yaml": tmp_path / "new.yaml", "NEW.html": tmp_path / "new.html"}
    arguments = [str(places.get(argument, argument)) for argument in ARGUMENTS[name]]
    capfd.readouterr()
    assert siman([*name.split(), *arguments, "--json"]) == 0
    document = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert next(iter(document)) == "schema_version"
    assert document["schema_version"] == 1
    assert len(document) > 1


def test_json_of_a_failure_leaves_stdout_empty(capfd: pytest.CaptureFixture[str]) -> None:
    assert siman(["eval", "gone", "--json"]) == 2
    captured = capfd.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)


def test_what_json_has_no_word_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [1.5, (float("inf"), {"c": -float("inf")})]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "schema_version": 1, "a": None, "b": [1.5, [None, {"c": None}]],
    }  # fmt: skip


def test_help_of_every_command_is_light() -> None:
    """All in one process, which has imported nothing heavy in the end."""
    code = (
        "import sys; from siman_convert.cli import run\n"
        f"for name in {[[], ['recipes'], *(name.split() for name in commands())]}:\n"
        "    assert run([*name, '--help']) == 0\n"
        f"sys.exit([module for module in {HEAVY} if module in sys.modules] or 0)"
    )
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: siman") == len(ARGUMENTS) + 2
    assert done.stdout.count("--json") >= len(ARGUMENTS)


def test_help_is_plain_text_under_the_options_headings(capsys: pytest.CaptureFixture[str]) -> None:
    for name in commands():
        assert siman([*name.split(), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"Usage: siman {name} [OPTIONS]")
        assert lines[-1].startswith("  ")
        assert all(line.isascii() and line == line.rstrip() for line in lines)
        headings = [line for line in lines[1:] if line.endswith(":") and not line.startswith(" ")]
        assert headings[-1] == "Options:"
        assert len(headings) == len(set(headings))
        if name == "convert":
            panels = ["What to convert", "Training (part of the recipe)", "Images (part of the recipe)", "Machine"]
            assert headings == [f"{heading}:" for heading in ("Arguments", *panels, "Options")]


def test_the_overview_fits_a_screen_with_three_examples() -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "siman_convert", "--help"], capture_output=True, text=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 36
    assert sum(line.startswith("    siman ") for line in lines) == 3
    assert not any("..." in line.partition("]...")[2] for line in lines)  # no summary is cut off
    assert "Exit codes: 0 done" in done.stdout


# -q, -v


def test_quiet_prints_results_only(life: Life, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = ["export", str(life.run.folder), "--format", "safetensors", "--output", str(tmp_path), "--images", "4"]
    capfd.readouterr()
    assert siman([*export, "-q"]) == 0
    quiet = capfd.readouterr()
    assert quiet.err == ""
    assert "writing the graph" not in quiet.out
    assert "In Python" not in quiet.out
    assert f"wrote     {tmp_path / 'model.safetensors'}" in quiet.out
    assert siman(["--quiet", *export, "--json"]) == 0
    captured = capfd.readouterr()
    assert (captured.err, json.loads(captured.out)["schema_version"]) == ("", 1)
    assert siman(export) == 0
    assert "writing the graph" in capfd.readouterr().out  # it was for that line alone


def test_quiet_conversion(life: Life, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = life.run.info().data
    capfd.readouterr()
    assert (
        siman(["convert", "test_resnet", "--data", data, "--weights", "none", "--output", str(tmp_path), *FAST, "-q"])
        == 0
    )
    out = capfd.readouterr().out.split("\n\n")
    assert (out[0], len(out)) == (out[-1], 1)
    assert out[0].split()[:3] == ["full", "precision", "top-1"]


def test_quiet_errors_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["-q", "eval", "gone"]) == 2
    assert "no run at gone" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-v", "--verbose", "--debug"])
@pytest.mark.parametrize("place", [0, 2])
def test_verbose_shows_the_traceback_and_keeps_the_exit_code(
    flag: str, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "gone"]
    arguments.insert(place, flag)
    assert siman(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("siman: no run at gone")
    assert siman(["eval", "gone"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_ours_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("siman_convert.model_table.read_table", lambda: 1 / 0)
    assert siman(["models"]) == 1
    assert capsys.readouterr().err == "siman: ZeroDivisionError: division by zero; -v shows where\n"


# Colours


def on_a_terminal(arguments: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    settings = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    settings |= {"TERM": "xterm-256color", "COLUMNS": "80", **environment}
    command = [sys.executable, "-m", "siman_convert", *arguments]
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=settings) as process:
        os.close(follower)
        parts = []
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # closed at the other end
                break
            if not part:
                break
            parts.append(part)
        assert process.wait() == 0
    os.close(leader)
    return b"".join(parts).decode()


COLOURS = ("\x1b[3", "\x1b[9", "\x1b[1;3", "\x1b[2;3")


@pytest.mark.slow
def test_no_color_takes_colours_away() -> None:
    arguments = ["inspect", "test_resnet"]
    assert any(colour in on_a_terminal(arguments) for colour in COLOURS)
    assert not any(colour in on_a_terminal(arguments, NO_COLOR="1") for colour in COLOURS)


@pytest.mark.slow
def test_force_color_colours_a_pipe_but_draws_no_bars(life: Life, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "siman_convert", "inspect", "test_resnet"]
    plain, forced = (
        subprocess.run(command, capture_output=True, text=True, env={**os.environ, **extra}).stdout
        for extra in ({}, {"FORCE_COLOR": "1"})
    )
    assert "\x1b" not in plain
    assert any(colour in forced for colour in COLOURS)
    bench = [sys.executable, "-m", "siman_convert", "bench", str(life.onnx), "--seconds", "0.001", "--threads", "1"]
    done = subprocess.run(bench, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# Completion


def completed(folder: Path, *words: str) -> list[str]:
    """What bash is offered for the last word; asked as its script asks."""
    code = (
        "import sys; sys.argv = ['siman']; from siman_convert.cli import main\n"
        "try: main()\n"
        f"finally: print([module for module in {HEAVY} if module in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "_SIMAN_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["siman", *words])}
    environment["COMP_CWORD"] = str(len(words))
    done = subprocess.run([*PYTHON, code], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.stderr == "[]\n"
    return done.stdout.split()


def test_commands_models_and_recipes_are_completed(tmp_path: Path) -> None:
    assert completed(tmp_path, "e") == ["eval", "export"]
    assert completed(tmp_path, "recipes", "s") == ["show"]
    assert completed(tmp_path, "convert", "resnet18") == [
        row["name"] for row in read_table() if row["name"].startswith("resnet18")
    ]
    assert completed(tmp_path, "convert", "resnet18", "--recipe", "qu") == ["quick"]
    assert completed(tmp_path, "recipes", "show", "paper-") == ["paper-cifar10", "paper-imagenet"]
    assert "--distill-weight" in completed(tmp_path, "convert", "--dist")


def test_runs_are_completed_newest_first(life: Life, tmp_path: Path) -> None:
    name = life.run.name
    assert completed(life.folder, "eval", "test_") == [name]
    assert completed(life.folder, "convert", "--resume", "") == ["last", name]
    assert set(completed(life.folder, "inspect", "test_resn")) == {name, "test_resnet"}
    assert completed(tmp_path, "eval", "") == []
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere" / "a" / "run.json").touch()
    assert completed(tmp_path, "eval", "--output", "elsewhere", "") == ["a"]


@pytest.mark.parametrize(
    ("shell", "part"), [("bash", "complete -o default"), ("zsh", "#compdef siman"), ("fish", "complete --command")]
)
def test_scripts_are_those_of_the_shell_that_was_named(shell: str, part: str) -> None:
    command = [sys.executable, "-m", "siman_convert", "--show-completion", shell]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert part in done.stdout


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["--show-completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_after_sourcing_what_is_installed(tmp_path: Path) -> None:
    """--install-completion in a home of the test's own; bash runs the function it installed."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    script = binaries / "siman"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m siman_convert "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{binaries}:{os.environ['PATH']}"}
    subprocess.run([script, "--install-completion", "bash"], check=True, env=environment, capture_output=True)
    ask = "source ~/.bashrc; COMP_WORDS=(siman recipes show fi); COMP_CWORD=3; _siman_completion siman; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("finetune\n", "")
