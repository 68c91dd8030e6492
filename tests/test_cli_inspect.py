"""siman inspect: runs, files and models at the size that they run at, plans of earlier versions, and lines of any width."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import timm
from exported_run import Life, copied, graphs_once, life, printed  # noqa: F401  fixtures

from siman_convert.cli import run as siman
from siman_convert.cli.lines import folded, table_lines
from siman_convert.cli.plan_table import plan_lines
from siman_convert.costs import Costs, plan_costs
from siman_convert.onnx_file import read_onnx
from siman_convert.plans import Plan, make_plan

MODEL = ["test_resnet", "--num-classes", "10"]


def record(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed("inspect", *arguments, "--json"))
    return found


def test_a_run_its_files_and_its_model_agree_at_the_runs_size(life: Life) -> None:
    of_run = record(str(life.run.folder))
    assert of_run["input_size"] == list(life.run.plan().input_size) == [3, 32, 32]
    assert record(str(life.onnx)) == record(str(life.safetensors)) == of_run
    assert record(*MODEL, "--img-size", "32") == of_run
    first = life.run.plan().decisions[0]
    assert (first.input_shape, first.output_shape) == ((3, 32, 32), (16, 16, 16))
    assert read_onnx(life.onnx).description.plan == life.run.plan()


def test_a_model_is_shown_at_its_own_size_unless_another_is_asked_for() -> None:
    native, twice = record("test_resnet"), record("test_resnet", "--img-size", "320")
    assert (native["input_size"], twice["input_size"]) == ([3, 160, 160], [3, 320, 320])
    assert twice["totals"]["binary_macs"] == 4 * native["totals"]["binary_macs"]  # sides of 320 to 10, all even
    assert twice["totals"]["bytes_after"] == native["totals"]["bytes_after"]


def planned_at_the_native_size(life: Life) -> Plan:
    """What earlier versions stored; one decision is another than a new plan's would be."""
    plan = make_plan(timm.create_model("test_resnet", num_classes=10), name="test_resnet")
    first = replace(plan.decisions[1], binarize=False, reason="decided long ago")
    plan = replace(plan, decisions=(plan.decisions[0], first, *plan.decisions[2:]))
    (life.run.folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    return plan


def test_an_older_run_keeps_its_decisions_and_shows_its_own_work(copied: Life) -> None:
    stored = planned_at_the_native_size(copied)
    new, old = record(*MODEL, "--img-size", "32", "--keep", "conv1.3"), record(str(copied.run.folder))
    assert {row["name"]: row["reason"] for row in old["layers"]}["conv1.3"] == "decided long ago"
    for document in (new, old):
        for row in document["layers"]:
            row["reason"] = None
    assert new == old
    resumed = printed("convert", "--resume", str(copied.run.folder), "--dry-run", "--device", "cpu")
    share = 100 * (1 - old["totals"]["float_macs_share"])
    assert f"test_resnet: 10 of 15 convolutions become binary, {share:.1f} % of the work;" in resumed
    assert copied.run.plan() == stored


def test_an_older_run_is_exported_with_the_plan_it_has(copied: Life) -> None:
    plan = make_plan(timm.create_model("test_resnet", num_classes=10), name="test_resnet")
    (copied.run.folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    printed("export", str(copied.run.folder), "--images", "4")
    assert read_onnx(copied.onnx).description.plan == plan
    share = 100 * (1 - record(str(copied.onnx))["totals"]["float_macs_share"])
    assert record(str(copied.onnx))["input_size"] == [3, 32, 32]
    assert f"They are {share:.1f} % of the multiply-accumulates." in (copied.run.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_resnet", "--img-size", "0"], "--img-size 0: expected a number of pixels"),
        (["test_resnet", "--img-size", "-32"], "--img-size -32: expected a number of pixels"),
        (["test_resnet", "--img-size", "20000"], "sides of 1 to 16384 pixels"),
        (["test_resnet", "--img-size", "large"], "'--img-size'"),
        (["test_vit", "--img-size", "30"], "cannot run on an image of 3x30x30"),
    ],
)
def test_sizes_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["inspect", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_runs_and_files_have_their_size(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    for subject in (life.run.folder, life.onnx):
        assert siman(["inspect", str(subject), "--img-size", "32"]) == 2
        assert (
            "has its plan already; --keep, --img-size and the other options are for models" in capsys.readouterr().err
        )


def test_no_size_that_leaves_nothing_binary_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """What convert refuses, inspect shows at the same size."""
    convert = ["convert", "test_resnet", "--data", "digits", "--weights", "none", "--img-size", "48", "--keep", "*"]
    assert siman(convert) == 2
    assert "`siman inspect test_resnet --img-size 48` gives the reason of each" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- lines


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, Costs]:
    """Names of up to 25 letters, kernels of all kinds, six reasons."""
    model = timm.create_model("mobilenetv3_small_050")
    plan = make_plan(model, name="mobilenetv3_small_050", keep=["blocks.[12].*.conv_pw"])
    return plan, plan_costs(model, plan)


@pytest.mark.parametrize("width", [72, 80, 100, 140, None])
def test_lines_fit_and_say_everything(planned: tuple[Plan, Costs], width: int | None) -> None:
    plan, costs = planned
    lines = "\n".join(text.plain for text in plan_lines(plan, costs, width)).split("\n")
    table, blank, notes = lines[: lines.index("")], lines.index(""), lines[lines.index("") + 1 :]
    assert blank == len(table)
    assert width is None or max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]
    assert lines[0] == "mobilenetv3_small_050 on an image of 3x224x224"
    for row in costs.rows:  # whole names, each once
        assert sum(line.split()[:1] == row.name.split()[:1] for line in table) == 1
    assert sum(" 1-bit " in line for line in table[3:]) == len(plan.binarized)
    told = " ".join(" ".join(notes).split())
    for reason in {row.reason for row in costs.rows if not row.binarize}:
        names = [row.name for row in costs.rows if row.reason == reason and not row.binarize]
        assert told.count(f"{len(names)} {reason}: {', '.join(names)}") == 1
    assert "you asked to keep blocks.[12].*.conv_pw" in told  # a glob is not taken for markup


def test_a_pipe_gets_the_words_that_a_terminal_gets(planned: tuple[Plan, Costs]) -> None:
    plain, narrow = (" ".join(text.plain for text in plan_lines(*planned, width)).split() for width in (None, 60))
    assert plain == narrow


def test_a_pipe_is_not_cut_whatever_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = printed("inspect", "test_resnet").splitlines()
    assert (
        "float          3  1x1 residual shortcut: layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.downsample.1"
        in lines
    )
    assert re.fullmatch(r"layer2\.0\.downsample\.1  float  1x1     48x20x20 +- +614k +6\.14k +6\.14k", lines[10])
    assert not [line for line in lines if line != line.rstrip()]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, "name                    a     b\na.long.name.of.its.own  1-x  22\nshort                   x"),
        (31, "name                    a     b\na.long.name.of.its.own  1-x  22\nshort                   x"),
        (30, "name                   a    b\na.long.name.of.its.own 1-x 22\nshort                  x"),
        (25, "name               a    b\na.long.name.of.its.own\n                   1-x 22\nshort              x"),
        (9, "name         a    b\na.long.name.of.its.own\n             1-x 22\nshort        x"),
    ],
)
def test_a_table_narrows_its_gaps_and_then_its_first_column(width: int | None, expected: str) -> None:
    rows = [("name", "a", "b"), ("a.long.name.of.its.own", "1-x", "22"), ("short", "x", "")]
    assert "\n".join(table_lines(rows, width, right=[2])) == expected


def test_folding_breaks_between_words_only() -> None:
    assert folded("one two  three-and-four", None, 2) == "one two  three-and-four"
    assert folded("one two three-and-four", 8, 2) == "one two\n  three-and-four"
    assert folded("", 80) == ""
