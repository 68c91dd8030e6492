"""The script that measures a training step, end to end; of what it reports, the memory is the same on every machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training_step.py"


def measure(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_step_holds_no_more_activations_than_in_full_precision() -> None:
    done = measure("--case", "siman_resnet20:32:4", "--pairs", "2", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["cases"]
    full, siman = row["full_precision_memory"], row["siman_memory"]
    stem = 4 * 4 * (3 + 16) * 32 * 32  # bytes of the image and of what the stem's convolution writes, for four images
    assert full["activations"] > 10 * stem
    assert row["activation_ratio"] == siman["activations"] / full["activations"] <= 1.05
    weights = 4 * (6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 9 * 32 * 64 + 5 * 9 * 64 * 64)
    assert siman["constant"] - full["constant"] == pytest.approx(weights, rel=0.02)  # the weights made binary
    for times in (row["clock"], row["processor"]):
        assert 0 < times["low"] <= times["ratio"] <= times["high"]


@pytest.mark.slow
def test_the_table_and_a_bad_case() -> None:
    done = measure("--case", "test_resnet:32:2", "--pairs", "1")
    assert done.stdout.startswith("test_resnet, 32x32, batch 2\n"), done.stderr
    assert "ratio" in done.stdout
    bad = measure("--case", "test_resnet:32")
    assert bad.returncode == 2
    assert "expected MODEL:SIDE:BATCH" in bad.stderr
