"""A page in headless Chromium: what its DOM is once its scripts have run, and what they said on the console."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "SIMAN_REQUIRE_CHROMIUM"  # set where it has to be there


def browser() -> str:
    """Its path; the test is skipped where there is none, or fails where there has to be one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and none of {', '.join(NAMES)} is installed")
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    return found


def opened(page: Path, profile: Path, width: int = 1280) -> tuple[str, list[str]]:
    """(DOM as HTML, lines of the console). The page's clock runs fast: it has 20 seconds of its own time. No host resolves."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr", "--v=0"]
    flags += [f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=20000"]
    command = [browser(), *flags, "--host-resolver-rules=MAP * ~NOTFOUND", page.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, re.findall(r"CONSOLE[:(]\d*\)?\]? ?(.*)", done.stderr)
