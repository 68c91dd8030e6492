"""Disks that are full, refuse large files, or cannot be written: one line, and a run that goes on where there is room."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import Conversion, Outcome, outcome, whole

from siman_convert.cli import run as run_command

KB = 1024


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the conversion comes to where there is room."""
    conversion = Conversion(digits, tmp_path_factory.mktemp("undisturbed"))
    assert run_command(conversion.command) == 0
    return outcome(conversion)


def one_line(conversion: Conversion, **settings: Any) -> str:
    """What the conversion, begun or gone on with, says as it fails for its disk."""
    command = [sys.executable, "-m", "siman_convert", *conversion.command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("siman: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 100 * KB, 2000 * KB], ids=["no file", "no weights", "no optimizer"])
def test_files_that_cannot_grow(limit: int, digits: Path, tmp_path: Path, undisturbed: Outcome) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    conversion = Conversion(digits, tmp_path)
    assert "nothing that was written before is lost" in one_line(conversion, preexec_fn=limited)
    whole(conversion)
    assert run_command(conversion.command) == 0
    assert outcome(conversion) == undisturbed


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
def test_a_full_disk_then_one_that_cannot_be_written(small_disk: Path, digits: Path, undisturbed: Outcome) -> None:
    conversion = Conversion(digits, small_disk)
    line = one_line(conversion)
    assert "no space left on device" in line or "is the disk full?" in line
    assert "nothing that was written before is lost" in line
    whole(conversion)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "read-only file system" in one_line(conversion)
    subprocess.run(["mount", "-o", "remount,rw,size=64m", str(small_disk)], check=True)
    assert run_command(conversion.command) == 0
    assert outcome(conversion) == undisturbed
