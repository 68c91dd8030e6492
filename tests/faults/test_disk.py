"""Disks that are full, refuse large files, or cannot be written: one line, and a run that goes on where there is room."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import SIMAN, command, outcome, start, uninterrupted  # noqa: F401  a fixture

from siman_convert.runs import Run

KB = 1024


def visible_files_are_whole(folder: Path) -> None:
    """Whatever stands under its final name can be read."""
    if (folder / "run").exists():
        run = Run(folder / "run")
        assert run.info().model == "test_resnet"
        assert (run.recipe().epochs, bool(run.plan().binarized)) == (3, True)
        assert isinstance(run.metrics(), list)


def one_line(arguments: list[str], **settings: object) -> str:
    """What a command that has to fail for its disk says."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, **settings)  # type: ignore[call-overload]
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("siman: ")]
    assert "Traceback" not in done.stderr
    return line


def again(output: Path, digits: Path) -> list[str]:
    """The command that begins the run, or goes on with it."""
    if (output / "run").exists():
        return [*SIMAN, "convert", "--resume", str(output / "run"), "--device", "cpu"]
    return command(output, digits)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 100 * KB, 2000 * KB], ids=["no file", "no weights", "no optimizer"])
def test_files_that_cannot_grow(limit: int, digits: Path, tmp_path: Path, uninterrupted: Run) -> None:  # noqa: F811
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = one_line(command(tmp_path, digits), preexec_fn=limited)
    assert "nothing that was written before is lost" in line
    visible_files_are_whole(tmp_path)
    start(again(tmp_path, digits))
    assert outcome(Run(tmp_path / "run")) == outcome(uninterrupted)
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 4 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_then_one_that_cannot_be_written(
    small_disk: Path,
    digits: Path,
    uninterrupted: Run,  # noqa: F811
) -> None:
    line = one_line(command(small_disk, digits))
    assert "no space left on device" in line or "is the disk full?" in line
    assert "nothing that was written before is lost" in line
    visible_files_are_whole(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "read-only file system" in one_line(again(small_disk, digits))
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(small_disk)], check=True)
    start(again(small_disk, digits))
    assert outcome(Run(small_disk / "run")) == outcome(uninterrupted)
