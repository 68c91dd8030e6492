"""A few of the kills of `python tests/faults`, which is the long form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")
def test_killed_conversions_resume_to_the_same_bits() -> None:
    """In a process of its own: a fork of this one would inherit threads."""
    seed = os.environ.get("SIMAN_KILL_SEED", "1")
    command = [sys.executable, str(Path(__file__).parent), "--kills", str(KILLS), "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, last = done.stdout.splitlines()
    assert int(last.split()[0]) >= KILLS
