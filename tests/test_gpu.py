"""What differs on a GPU, where there is one: layers as on the CPU, mixed precision, compiled steps, whole commands."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from siman_convert.cli import run as run_command
from siman_convert.frozen import freeze
from siman_convert.layers import SiMaNConv2d
from siman_convert.models import create
from siman_convert.objective import Objective
from siman_convert.plans import make_plan
from siman_convert.runs import Run
from siman_convert.surgery import apply_plan
from siman_convert.train import TrainingStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [
    {"in_channels": 24, "out_channels": 40, "kernel_size": 3, "stride": 2, "padding": 1},
    {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1, "bias": False},
    {"in_channels": 12, "out_channels": 18, "kernel_size": (1, 4), "padding": "same", "groups": 3},
    {"in_channels": 7, "out_channels": 5, "kernel_size": 5, "padding": (0, 2), "dilation": 2, "selection": "analytic"},
    {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, "selection": "sign"},
]


def layer_and_input(shape: dict[str, Any], channels_last: bool) -> tuple[SiMaNConv2d, Tensor]:
    """In float64, whose signs no other order of summation turns."""
    torch.manual_seed(0)
    layer = SiMaNConv2d(**shape, dtype=torch.float64)
    nn.init.normal_(layer.alpha)
    x = torch.randn(3, shape["in_channels"], 14, 11, dtype=torch.float64)
    return layer, x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def gradients(layer: SiMaNConv2d, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters, on the CPU."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    return [value.cpu() for value in found if value is not None]


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_train_as_on_the_cpu(shape: dict[str, Any], channels_last: bool) -> None:
    layer, x = layer_and_input(shape, channels_last)
    here, there = gradients(copy.deepcopy(layer), x), gradients(layer.cuda(), x.cuda())
    assert len(here) == len(there) >= 4
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_clip_is_as_on_the_cpu(shape: dict[str, Any]) -> None:
    layer, _ = layer_and_input(shape, channels_last=False)
    there = copy.deepcopy(layer).cuda()
    for network in (layer, there):
        network.clip_weights_(15.0)
    torch.testing.assert_close(there.weight.cpu(), layer.weight)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions_are_the_same_integers(shape: dict[str, Any]) -> None:
    """In float32 too, whatever algorithm and precision the GPU's library takes: both operands and all sums are integers."""
    layer, x = layer_and_input(shape, channels_last=False)
    layer, x = layer.float().eval(), x.float()
    ours = layer.unscaled(x)
    assert torch.equal(layer.cuda().unscaled(x.cuda()).cpu(), ours)
    assert torch.equal(ours, ours.round())
    assert ours.abs().max() > 2
    frozen = freeze(layer.cpu()).cuda()
    torch.testing.assert_close(frozen(x.cuda()).cpu(), layer(x))


def compiled_and_eager(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Loss, logits and gradients of one step of a small network in float64, compiled and not."""
    torch.manual_seed(0)
    model = create("test_resnet", 10)
    step = TrainingStep(apply_plan(model, make_plan(model)), Objective()).double().train()
    step = step.to(device, memory_format=torch.channels_last)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last)
    found = []
    for run in (torch.compile(copy.deepcopy(step), fullgraph=True), step):
        loss, logits = run(images, torch.arange(4, device=device))
        loss.backward()
        parameters = run.named_parameters()
        found.append([loss.detach(), logits, *(p.grad for _, p in sorted(parameters, key=lambda item: item[0]))])
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_torch_compile_takes_the_whole_step(device: str) -> None:
    compiled, eager = compiled_and_eager(device)
    assert len(eager) > 10
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@needs_gpu
def test_commands_end_to_end(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixed precision, channels last, EMA, a teacher; the weights that come out are read on the CPU with the same answers."""
    start = ["convert", "test_resnet", "--weights", "none", "--data", str(digits), "--output", str(tmp_path)]
    flags = "--experiment run --img-size 32 -b 64 --fp-epochs 2 --epochs 2 --lr 0.05 --workers 0 --device cuda"
    flags += " --amp --channels-last --model-ema --set distill_weight=1"
    assert run_command([*start, *flags.split()]) == 0
    run = Run(tmp_path / "run")
    assert [record["epoch"] for record in run.metrics() if record["phase"] == "binary"] == [0, 1, 2, 2]
    answers = []
    for device in ("cuda", "cpu"):
        capsys.readouterr()
        assert run_command(["eval", str(run.folder), "--device", device, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["top1"])
    assert abs(answers[0] - answers[1]) <= 100 / 97  # of 97 images one may lie on the fence of float32
