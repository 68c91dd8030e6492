"""The API reference builds without a warning, and the examples in it run as they stand there."""

import doctest
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "docs" / "build.py"
PUBLIC = ["siman_convert", *(f"siman_convert.{name}" for name in runpy.run_path(str(BUILD))["MODULES"])]
EXAMPLES = {"siman_convert": 8, "siman_convert.binarize": 5, "siman_convert.bits": 4, "siman_convert.inspection": 2,
            "siman_convert.layers": 3, "siman_convert.recipe": 2}  # fmt: skip


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", BUILD, tmp_path], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "siman_convert" / "layers.html").read_text()
    assert "SiMaNConv2d" in page
    assert len(list(tmp_path.rglob("*.html"))) >= len(PUBLIC)


@pytest.mark.parametrize("name", [pytest.param(PUBLIC[0], marks=pytest.mark.slow), *PUBLIC[1:]])  # the first trains
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted >= EXAMPLES.get(name, 0), "examples that nobody runs are not examples"
