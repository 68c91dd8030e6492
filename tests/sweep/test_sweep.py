"""The fast part of the sweep, what the sweep does with networks that fail or die, and the table that it left.

torch's exporter takes most of a model's time, so here only a few networks of different build go through it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import sweep_stages
import torch
from onnx import numpy_helper
from sweep_families import NAMED, representatives
from sweep_stages import sweep_model
from torch import nn

from siman_convert.model_table import STAGES, family_of, read_coverage, read_table
from siman_convert.onnx_export import binary_nodes
from siman_convert.onnx_fold import Folding

ALL_THE_WAY = (
    "regnety_002",
    "mobilenetv3_small_050",
    "repvgg_a0",
    "nf_regnet_b0",
)  # gates, hard-swish, branches, no BatchNorm
QUICK = ("resnet18", "mobilenetv3_small_050")  # of NAMED, what `make test` has time for


def few(names: Iterable[str]) -> list[Any]:
    """Parameters: the quick ones always, the others with those that take long."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", few(NAMED))
def test_network_to_its_file_and_back(name: str) -> None:
    row = sweep_model(name, 64, "safetensors")
    assert row["stages"] == dict.fromkeys(STAGES[: STAGES.index("safetensors") + 1], "passed")
    assert row["outcome"] == "passed"
    shipped = read_coverage()[name]
    compared = ("family", "convolutions", "binarized", "kept", "binary_macs")
    assert {key: row[key] for key in compared} == {key: shipped[key] for key in compared}


@pytest.mark.parametrize("name", few(ALL_THE_WAY))
def test_network_all_the_way(name: str) -> None:
    row = sweep_model(name, 64)
    assert row["stages"] == dict.fromkeys(STAGES, "passed")
    assert row["outputs_compared"] > 10_000


def test_nothing_to_binarize() -> None:
    row = sweep_model("test_vit")
    assert (row["outcome"], row["stages"], row["binarized"]) == ("nothing to binarize", {"plan": "passed"}, 0)


def test_a_wrong_weight_in_the_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def tampered(model: nn.Module) -> tuple[onnx.ModelProto, Folding]:
        graph, folding = build(model)
        weight = binary_nodes(graph)[0].input[1]
        (tensor,) = (tensor for tensor in graph.graph.initializer if tensor.name == weight)
        array = numpy_helper.to_array(tensor).copy()
        array[0] ^= np.uint8(1)
        tensor.CopyFrom(numpy_helper.from_array(array, weight))
        return graph, folding

    build = sweep_stages.build_onnx
    monkeypatch.setattr(sweep_stages, "build_onnx", tampered)
    row = sweep_model("test_resnet")
    assert row["outcome"] == "failed"
    assert list(row["stages"]) == list(STAGES)
    assert "torch and onnxruntime" in row["stages"]["network"]


def test_a_frozen_network_that_answers_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        packed = freeze(model)
        next(module for name, module in packed.named_modules() if name == "layer2.0.conv1").scale.neg_()
        return packed

    freeze = sweep_stages.freeze
    monkeypatch.setattr(sweep_stages, "freeze", wrong)
    row = sweep_model("test_resnet", last="freeze")
    assert row["stages"]["freeze"] == "the packed network answers otherwise than the trained one"
    assert row["outcome"] == "failed"


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/sweep/__main__.py, with five models that need no work."""
    spec = importlib.util.spec_from_file_location("sweep_command", Path(__file__).with_name("__main__.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "sweep_command", module)
    spec.loader.exec_module(module)

    def model(name: str) -> dict[str, Any]:
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while name == "hangs":
            pass
        if name == "eats":
            bytearray(module.MEMORY + 1)
        return {"name": name, "family": "f", "stages": {"plan": "passed"}, "outcome": "passed", "seconds": time.time()}

    monkeypatch.setattr(module, "sweep_model", model)
    monkeypatch.setattr(module, "representatives", lambda _: dict.fromkeys(["b", "dies", "hangs", "eats", "a"], "f"))
    return module


def test_a_model_that_dies_or_hangs_is_a_row(command: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    assert command.main(["--output", str(target), "--seconds", "1"]) == 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["a", "b", "dies", "eats", "hangs"]
    assert [row["outcome"] for row in rows] == ["passed", "passed", "failed", "failed", "failed"]
    assert [row["stages"].get("process") for row in rows] == [None, None, "died (-9)", "died (1)", "took more than 1 s"]


def test_it_goes_on_where_it_was_stopped(command: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    kept = {"name": "b", "family": "f", "stages": {"plan": "passed"}, "outcome": "passed", "seconds": 1.0}
    others = [{**kept, "name": name} for name in ("dies", "hangs", "eats", "no longer in timm")]
    target.write_text("".join(json.dumps(row) + "\n" for row in [kept, *others]))
    assert command.main(["--output", str(target)]) == 0
    rows = {row["name"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert list(rows) == ["a", "b", "dies", "eats", "hangs"]
    assert rows["b"] == kept
    assert command.main(["b", "--output", str(target)]) == 0
    assert {row["name"]: row for row in map(json.loads, target.read_text().splitlines())}["b"] != kept


# The table


def test_the_table_is_of_the_families_there_are() -> None:
    chosen, coverage = representatives(read_table()), read_coverage()
    assert {name: row["family"] for name, row in coverage.items()} == {name: chosen[name] for name in coverage}
    assert all(coverage[name]["outcome"] == "passed" for name in NAMED)
    plans = {row["name"]: (row["convolutions"], row["binarized"]) for row in read_table()}
    assert all((row["convolutions"], row["binarized"]) == plans[name] for name, row in coverage.items())


def test_of_the_eligible_families_99_percent_pass() -> None:
    eligible = [row for row in read_coverage().values() if row["outcome"] != "nothing to binarize"]
    failed = [row["name"] for row in eligible if row["outcome"] == "failed"]
    assert len(failed) <= 0.01 * len(eligible), failed


def test_a_family_is_a_word_of_a_module() -> None:
    names = {"resnet18": "resnet", "resnet200d": "resnet", "seresnext26t_32x4d": "seresnext", "regnetx_002": "regnetx",
             "wide_resnet50_2": "wide_resnet", "resnetv2_50x1_bit": "resnetv2", "densenet121": "densenet",
             "tf_efficientnetv2_b0": "tf_efficientnetv2", "legacy_seresnet18": "legacy_seresnet", "dla34": "dla"}  # fmt: skip
    assert {name: family_of(name).partition("/")[2] for name in names} == names
