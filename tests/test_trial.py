"""The trial export before training: what it says of a network that works, and who is to blame for one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from siman_convert import preparation
from siman_convert.cli import run as siman
from siman_convert.data import Preprocess
from siman_convert.errors import InputError
from siman_convert.plans import make_plan
from siman_convert.trial import trial_export

SIZE = (3, 32, 32)
PREPROCESS = Preprocess(SIZE, "bicubic", (0.5,) * 3, (0.5,) * 3, 1.0, "center")
CLASSES = tuple("abcd")


class Choosy(nn.Module):
    """Cannot be captured: what it computes depends on the values it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Rotating(nn.Module):
    """Is captured, but has no form in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linalg.svd(x.mean((2, 3))[:, None, :2].expand(-1, 2, -1)).S.sum()


class Folded(nn.Module):
    """A convolution for each image, as timm's CondConv2d makes them: as many groups as images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weights = self.weight.repeat(n, 1, 1, 1)
        return nn.functional.conv2d(x.reshape(1, n * c, h, w), weights, groups=n).view(n, c, h, w)


def network(odd: nn.Module) -> nn.Sequential:
    blocks = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Sequential(nn.Identity(), odd))
    return nn.Sequential(nn.Conv2d(3, 8, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_what_it_gives() -> None:
    model = timm.create_model("test_resnet", num_classes=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, name="test_resnet")
    trial = trial_export(model, plan, PREPROCESS, CLASSES)
    assert trial.binary == len(plan.binarized)
    assert trial.operators > trial.binary
    floats = sum(t.numel() for name, t in before.items() if name.removesuffix(".weight") not in plan.binarized)
    assert trial.bytes > floats * 2
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("odd", [Choosy(), Rotating(), Folded()], ids=lambda odd: type(odd).__name__)
def test_what_cannot_be_exported_is_named(odd: nn.Module) -> None:
    model = network(odd)
    plan = make_plan(network(nn.Identity()), name="odd", input_size=SIZE)
    assert plan.binarized == ["1.0"]
    with pytest.raises(InputError) as caught:
        trial_export(model, plan, PREPROCESS, CLASSES)
    message = str(caught.value)
    assert message.startswith("odd: 1.2.1: torch's ONNX exporter failed: ")
    assert message.endswith("this network cannot be exported, choose another")
    assert "\n" not in message


def test_answer_of_another_shape() -> None:
    model = network(nn.Identity())
    plan = make_plan(model, name="net", input_size=SIZE)
    with pytest.raises(InputError, match=r"answers one image with shape \(1, 4\), expected \(1, 5\)"):
        trial_export(model, plan, PREPROCESS, ("a", "b", "c", "d", "e"))


@register_model
def odd_net(pretrained: bool = False, num_classes: int = 4, **_: object) -> nn.Module:
    """A network as timm's, for the command line."""
    assert not pretrained
    model = network(Folded())
    model[4] = nn.Linear(8, num_classes)
    model.pretrained_cfg = {"input_size": SIZE, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    return model


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_convert_refuses_it_before_anything_is_written(
    dry: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "odd_net", "--data", str(digits), "--weights", "none", "--device", "cpu"]
    assert siman([*command, "--output", str(tmp_path / "runs"), *dry]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("siman: odd_net: 1.2.1: torch's ONNX exporter failed: ")
    assert len(captured.err.splitlines()) == 1
    assert [line[:3] for line in captured.out.splitlines() if "/5 " in line] == ["1/5", "2/5", "3/5"]
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_what_the_file_would_be(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparation, "trial_export", trial_export)  # not what another test was told
    command = ["convert", "test_resnet", "--data", str(digits), "--weights", "none", "--device", "cpu", "-b", "8"]
    assert siman([*command, "--output", str(tmp_path / "runs"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4/5 export" in out
    assert "11 binary and " in out
    assert "5/5 time" in out
    assert not (tmp_path / "runs").exists()
