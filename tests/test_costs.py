"""The figures of a plan: against hand-derived numbers, and totals that reconcile with the model byte for byte."""

import json

import pytest
import timm
import torch
from torch import nn

from siman_convert.cli.plan_table import inspect_record, si
from siman_convert.costs import EVERYTHING_ELSE, MATRIX_PRODUCTS, plan_costs
from siman_convert.plans import make_plan
from siman_convert.surgery import apply_plan


def stored_bytes(model: nn.Module) -> int:
    return sum(
        t.numel() * t.element_size() for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    )


def test_resnet18_by_hand() -> None:
    """Stage s has channels c = 64 * 2^s on a map of m = 56 / 2^s; c * m is 3584 everywhere, so each 3x3 from c to c
    costs c^2 m^2 * 9 = 3584^2 * 9 MACs; the first of stages 1 to 3 has half the input channels, so half of that."""
    full = 3584**2 * 9
    binary = 13 * full + 3 * full // 2
    assert binary == 1_676_279_808
    stem = 112 * 112 * 64 * 3 * 49
    shortcuts = 3 * 3584**2 // 2
    classifier = 512 * 1000
    # one bit for each weight (all channel counts are multiples of 8), one float a channel
    weights = sum(4 * (64 * 2**s) ** 2 * 9 for s in range(4)) - sum((64 * 2**s) ** 2 * 9 // 2 for s in (1, 2, 3))
    channels = 4 * (64 + 128 + 256 + 512)

    model = timm.create_model("resnet18")
    plan = make_plan(model, name="resnet18")
    costs = plan_costs(model, plan)
    assert len(plan.binarized) == 16
    assert costs.binary_macs == binary
    assert costs.float_macs == stem + shortcuts + classifier
    assert sum(row.bytes_before for row in costs.rows if row.binarize) == 4 * weights
    assert sum(row.bytes_after for row in costs.rows if row.binarize) == weights // 8 + 4 * channels
    assert costs.bytes_before == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert costs.bytes_after == costs.bytes_before - 4 * weights + weights // 8 + 4 * channels
    assert costs.float_macs_share == pytest.approx(0.0760, abs=5e-5)
    assert costs.float_bytes_share == pytest.approx(0.0610, abs=5e-5)


def test_odd_channels_groups_bias_and_repeated_calls() -> None:
    conv = nn.Conv2d(18, 18, 3, padding=1, groups=2)  # 9 channels a group: 2 bytes a tap
    model = nn.Sequential(nn.Conv2d(3, 18, 1), conv, nn.AvgPool2d(2), conv)
    costs = plan_costs(model, make_plan(model, input_size=(3, 8, 8)))
    row = costs.rows[1]
    assert row.binary_macs == 18 * (64 + 16) * 9 * 9
    assert row.bytes_before == 4 * (18 * 9 * 9 + 18)
    assert row.bytes_after == 18 * 9 * 2 + 4 * 18 + 4 * 18
    assert row.output_shape == (18, 8, 8)
    assert costs.rows[-1].bytes_before == 0


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "halonet26t", "resnetv2_50x1_bit"])
def test_totals_reconcile(name: str) -> None:
    model = timm.create_model(name)
    plan = make_plan(model)
    costs = plan_costs(model, plan)
    assert costs.bytes_before == stored_bytes(model)
    assert sum(row.binarize for row in costs.rows) == len(plan.binarized)
    assert [row.name for row in costs.rows if row.type == "conv"] == [d.name for d in plan.decisions]


def test_attention_products_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x.flatten(2).mT).chunk(3, dim=-1)  # (1, 16, 8) each
            return (q @ k.mT).softmax(dim=-1) @ v

    model = Attention()
    costs = plan_costs(model, make_plan(model, input_size=(8, 4, 4)))
    rows = {row.name: row for row in costs.rows}
    assert rows["qkv"].float_macs == 16 * 8 * 24
    assert rows[MATRIX_PRODUCTS].float_macs == 2 * 16 * 16 * 8


def test_shared_tensors_count_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[1].weight
    costs = plan_costs(model, make_plan(model, input_size=(3, 8, 8)))
    assert costs.bytes_before == stored_bytes(model)
    assert costs.rows[2].bytes_before == 16
    assert costs.rows[-1].name == EVERYTHING_ELSE
    assert costs.rows[-1].bytes_before == 4 * 4 * 4 + 8  # num_batches_tracked is an int64


def test_figures_of_a_converted_model_are_the_same() -> None:
    model = timm.create_model("resnet18")
    plan = make_plan(model)
    before = plan_costs(model, plan)
    assert plan_costs(apply_plan(model, plan, init="copy"), plan) == before


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1000, "1.00k"), (9994, "9.99k"), (9996, "10.0k"), (99960, "100k"),
        (147456, "147k"), (999_499, "999k"), (999_500, "1.00M"), (1_676_279_808, "1.68G"),
    ],
)  # fmt: skip
def test_three_digits_and_a_unit(count: int, text: str) -> None:
    assert si(count) == text


def test_record_is_json_with_whole_numbers() -> None:
    model = timm.create_model("resnet18")
    plan = make_plan(model, name="resnet18")
    costs = plan_costs(model, plan)
    record = inspect_record(plan, costs)
    assert json.loads(json.dumps(record)) == record
    assert record["totals"]["binary_macs"] == costs.binary_macs
    assert sum(layer["bytes_after"] for layer in record["layers"]) == costs.bytes_after
    assert (record["convolutions"], record["binarized"]) == (20, 16)
