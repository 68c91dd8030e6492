"""Odd numbers end to end: the same file in torch, stock ONNX Runtime, the reference and every variant of the kernels.

The operators say what becomes of NaN and infinities (runtime/reference.py, onnx_quantized_op.py): a sign at the latest makes
numbers of them, so that what a network answers is finite, and the same everywhere.
"""

from collections.abc import Callable, Iterator

import numpy as np
import packed_models as pm
import pytest
import torch
from packed_models import one_thread  # noqa: F401  a fixture
from torch import Tensor, nn

from siman_convert.backends import OnnxRuntimeModel, ReferenceModel
from siman_convert.description import describe, description_of
from siman_convert.frozen import freeze
from siman_convert.layers import SiMaNConv2d
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_file import Variant, parse_onnx, seal
from siman_convert.onnx_int8 import quantize_rest
from siman_convert.plans import make_plan
from siman_convert.runtime import native
from siman_convert.surgery import apply_plan

pytestmark = pytest.mark.slow

Size = tuple[int, int, int]
Backends = dict[str, Callable[[Tensor], Tensor]]
SIZE: Size = (3, 9, 7)
NAN, INF = float("nan"), float("inf")


class OddNet(nn.Module):
    """A stem, two binary convolutions that read a BatchNorm each, a shortcut, a classifier; takes one pixel too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)) + y
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def odd_network(size: Size, change: Callable[[nn.Module], object]) -> nn.Module:
    """OddNet packed for images of that size, after a change to its trained form."""
    torch.manual_seed(0)
    model = OddNet()
    plan = make_plan(model, name="odd", input_size=SIZE, binarize=["conv1", "conv2"])
    trained = pm.randomize(apply_plan(model, plan), pm.images(8, *SIZE))
    with torch.no_grad():
        change(trained)
    return describe(freeze(trained), pm.description(plan, size, 5))


def nothing(_model: nn.Module) -> None:
    pass


def dead_channels(model: nn.Module) -> None:
    """BatchNorm channels whose variance was 0 in training, one with an alpha of 0 before it."""
    model.norm1.running_var[2] = 0.0
    model.norm2.running_var[3] = 0.0
    model.conv2.alpha[3] = 0.0


def alphas_of_0(model: nn.Module) -> None:
    model.conv1.alpha.zero_()
    model.conv2.alpha[::2] = -0.0


def negative_alphas(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, SiMaNConv2d):
            layer.alpha.copy_(-layer.alpha.abs())


def gammas_of_0(model: nn.Module) -> None:
    model.norm1.weight.zero_()
    model.norm2.weight[0] = 0.0


CHANGES = {change.__name__: change for change in (nothing, dead_channels, alphas_of_0, negative_alphas, gammas_of_0)}


def odd_images(size: Size) -> dict[str, Tensor]:
    """Name -> one image (1, C, H, W) and, with a stranger in the middle, another."""
    plain = pm.images(1, *size, seed=1)
    found = {f"constant {value:g}": torch.full_like(plain, value) for value in (0.0, -0.0, 0.7, -3.0, 1e30)}
    found |= {"denormal": torch.full_like(plain, 1e-40), "denormal noise": plain * 1e-40, "huge noise": plain * 1e37}
    for value in (NAN, INF, -INF):
        one = plain.clone()
        one[0, 1, size[1] // 2, size[2] // 2] = value
        found |= {f"one pixel {value}": one, f"all {value}": torch.full_like(plain, value)}
    both = plain.clone()
    both[0, 0, 0, 0], both[0, 2, -1, -1] = INF, -INF
    return found | {"both infinities": both}


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, bool], Backends]:
    """What runs a packed model: all there is here; with int8 all but torch."""

    def opened(packed: nn.Module, int8: bool = False) -> Backends:
        model, _ = build_onnx(packed)
        if int8:
            size = description_of(packed).preprocess.input_size
            model, _ = quantize_rest(model, [pm.images(8, *size).numpy()])
        file = parse_onnx(seal(model, description_of(packed), Variant(int8=int8)))
        found: Backends = {"reference": ReferenceModel(file.model), "onnxruntime": OnnxRuntimeModel(file.data)}
        for name, supported in native.variants().items():
            if supported:
                monkeypatch.setenv(native.ISA, name)
                found[name] = OnnxRuntimeModel(file.data, use_kernels=True)
        monkeypatch.delenv(native.ISA, raising=False)
        return found if int8 else {"torch": packed, **found}

    return opened


@pytest.fixture(autouse=True)
def numpy_is_quiet() -> Iterator[None]:
    """The reference evaluator's own operators warn of what is meant here."""
    with np.errstate(all="ignore"):
        yield


@torch.no_grad()
def answers(backends: Backends, images: Tensor) -> Tensor:
    """(N, classes) of the first, after all have been compared with it."""
    found = {name: run(images.clone()) for name, run in backends.items()}
    first, expected = next(iter(found.items()))
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{name} and {first}")
    return expected


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_odd_images_in_odd_networks(change: str, int8: bool, backends: Callable[..., Backends]) -> None:
    """Every image alone, and all in one batch: none may touch the others."""
    opened, images = backends(odd_network(SIZE, CHANGES[change]), int8), odd_images(SIZE)
    alone = {name: answers(opened, image) for name, image in images.items()}
    together = answers(opened, torch.cat(list(images.values())))
    torch.testing.assert_close(torch.cat(list(alone.values())), together, rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()
    if change == "nothing":
        assert not torch.equal(alone["constant 0.7"], alone["huge noise"])
        assert len({tuple(logits.flatten().tolist()) for logits in alone.values()}) > 5


def test_nan_and_all_infinities_are_the_image_of_minus_ones(backends: Callable[..., Backends]) -> None:
    """One NaN makes the mean NaN, and every comparison with it false: the first binary layer sees -1 everywhere."""
    opened, images = backends(pm.hand_export().packed), odd_images(pm.HAND_SIZE)
    expected = answers(opened, images["all nan"])
    for name in ("one pixel nan", "all inf", "all -inf"):
        torch.testing.assert_close(answers(opened, images[name]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers(opened, images["one pixel inf"]), expected)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_one_pixel_and_a_batch_of_none(int8: bool, backends: Callable[..., Backends]) -> None:
    size = (3, 1, 1)
    opened, images = backends(odd_network(size, nothing), int8), odd_images(size)
    together = answers(opened, torch.cat([*images.values(), pm.images(20, *size)]))
    assert together.isfinite().all()
    for run in opened.values():
        assert run(torch.zeros(0, *size)).shape == (0, 5)
