"""The ablation of benchmarks/ablation.py, on a few digits: figures come from runs, and are made once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402

from siman_convert.data import open_source  # noqa: E402
from siman_convert.recipe import load_recipe  # noqa: E402
from siman_convert.runs import Run  # noqa: E402


@pytest.mark.parametrize("row", list(ablation.ROWS))
def test_every_row_is_a_recipe_that_differs_in_its_factor_alone(row: str) -> None:
    what = ablation.ROWS[row]
    usual = load_recipe(what.recipe, ablation.DATA).model_dump()
    recipe = load_recipe(what.recipe, {**ablation.DATA, **what.changes}).model_dump()
    assert {name for name in usual if usual[name] != recipe[name]} == set(what.changes)


@pytest.mark.slow
def test_a_row_is_measured_once(digits: Path, tmp_path: Path) -> None:
    results, output = tmp_path / "figures.jsonl", tmp_path / "runs"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "ablation.py"), "two-step", "--seeds", "4", "--epochs", "1", "--fp-epochs", "1",
        "--images", "64",
        "--data", str(digits), "--output", str(output), "--results", str(results), "--device", "cpu",
    ]  # fmt: skip
    first = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    (record,) = ablation.read(results)
    run = Run(output / "two-step-1-4")
    assert record["re_estimated"] == run.metrics()[-1]["top1"]
    assert record["last_epoch"] == run.metrics()[-2]["top1"]
    assert record["full_precision"] == Run(output / "full-precision-4").progress().top1("full-precision")
    assert f"{record['re_estimated']:.2f} |" in first.stdout
    content = results.read_bytes()
    second = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert (results.read_bytes(), second.stdout, second.stderr) == (content, first.stdout, "")


def test_the_subset_has_the_first_images(digits: Path, tmp_path: Path) -> None:
    part, whole = (open_source(str(folder)) for folder in (ablation.subset(digits, 50, tmp_path), digits))
    assert (len(part.train), len(part.val)) == (50, len(whole.val))
    assert all(np.array_equal(part.train.read(i)[0], whole.train.read(i)[0]) for i in (0, 49))


def test_the_table_gives_mean_and_spread() -> None:
    records = [
        {"row": "sign", "seed": seed, "epochs": 6, "fp_epochs": 13, "images": 20_000, "full_precision": 90.0,
         "converted": 30.0, "last_epoch": 80.0 + seed, "re_estimated": 81.0} for seed in range(3)
    ]  # fmt: skip
    *_, line = ablation.table(json.loads(json.dumps(records))).splitlines()
    assert line.endswith("| 6 | 3 | 90.00 ± 0.00 | 30.00 ± 0.00 | 81.00 ± 1.00 | 81.00 ± 0.00 |")
