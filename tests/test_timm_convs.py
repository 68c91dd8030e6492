"""timm's own convolutions: the binary layer reads the same map in the same way, with the weight that they convolve with."""

import copy
import itertools

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.frozen import PackedConv2d, freeze
from siman_convert.layers import SiMaNConv2d
from siman_convert.plans import make_plan
from siman_convert.surgery import apply_plan
from siman_convert.timm_convs import effective_weight, is_understood, pads_to_same, same_pads

OWN = [Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)


def make(cls: type[nn.Conv2d], **settings: int) -> nn.Conv2d:
    torch.manual_seed(1)
    conv = cls(6, 8, **{"kernel_size": 3, "stride": 2, "bias": True, "groups": 2} | settings)
    for name, parameter in conv.named_parameters():
        nn.init.normal_(parameter, mean=0.3, std=0.7)
        assert name in ("weight", "bias", "gain")
    return conv


@pytest.mark.parametrize("cls", OWN)
def test_effective_weight_and_padding_give_the_forward_again(cls: type[nn.Conv2d]) -> None:
    conv, x = make(cls), torch.randn(2, 6, 9, 12)
    assert is_understood(conv)
    assert pads_to_same(conv) == (cls in SAME)
    padded = pad_same(x, [3, 3], [2, 2]) if cls in SAME else F.pad(x, (1, 1, 1, 1))
    expected = F.conv2d(padded, effective_weight(conv), conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("cls", OWN)
@pytest.mark.parametrize("size", [(9, 12), (12, 9), (1, 2)])
def test_binary_layer_in_its_place(cls: type[nn.Conv2d], size: tuple[int, int]) -> None:
    """Bits follow the effective weight, alpha is its projection, and zeros are padded behind the sign."""
    conv, x = make(cls), torch.randn(2, 6, *size)
    layer = SiMaNConv2d.from_float(conv).eval()
    effective = effective_weight(conv).flatten(1)
    assert torch.equal(layer.bits().flatten(1), effective > effective.median(dim=1, keepdim=True).values)
    bw = layer.bits().float() * 2 - 1
    torch.testing.assert_close(layer.alpha, (effective * bw.flatten(1)).sum(1) / effective.shape[1])
    mean = x.mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
    signs = torch.where(x >= mean, 1.0, -1.0)
    padded = pad_same(signs, [3, 3], [2, 2]) if cls in SAME else F.pad(signs, (1, 1, 1, 1))
    expected = F.conv2d(padded, bw, None, 2, 0, 1, 2) * layer.alpha.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == conv(x).shape
    packed = PackedConv2d.from_siman(layer)
    assert torch.equal(packed(x), expected)


def test_same_pads_are_timms() -> None:
    sides = itertools.product(range(1, 12), (1, 2, 3, 5), (1, 2, 3, 4), (1, 2))
    for length, kernel, stride, dilation in sides:
        padded = pad_same(torch.ones(1, 1, length, 1), [kernel, 1], [stride, 1], [dilation, 1])
        before, behind = same_pads(length, kernel, stride, dilation)
        assert padded.flatten().tolist() == [0] * before + [1] * length + [0] * behind


@pytest.mark.parametrize("cls", [Conv2dSame, ScaledStdConv2dSame])
def test_gradients_with_padding_of_the_map(cls: type[nn.Conv2d]) -> None:
    """In training the layer is what it is on the map padded by hand, save that the padding is no part of the statistics."""
    layer = SiMaNConv2d.from_float(make(cls)).double().train()
    x = torch.randn(2, 6, 6, 7, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    static = copy.deepcopy(layer)
    static.same_pad, static.padding = False, "static"
    static._reversed_padding_repeated_twice = [1, 1, 0, 1]  # width 7 stride 2: one each side; height 6: one below
    y = x.detach().clone().requires_grad_()
    static.zero_grad()
    static(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.weight.grad, static.weight.grad)
    assert torch.equal(layer.alpha.grad, static.alpha.grad)


@pytest.mark.parametrize("name", ["tf_efficientnetv2_b0", "resnetv2_50x1_bit", "nf_resnet26", "dm_nfnet_f0"])
def test_networks_of_them_are_binarized(name: str) -> None:
    """Plan and surgery, on no memory: none is left for being of timm's own making."""
    with torch.device("meta"):
        model = timm.create_model(name)
        plan = make_plan(model, name=name)
        own = {path for path, m in model.named_modules() if isinstance(m, tuple(OWN))}
        assert own & set(plan.binarized)
        assert not [d.name for d in plan.decisions if "in its own way" in d.reason]
        for layer in (m for m in apply_plan(model, plan, init="copy").modules() if isinstance(m, SiMaNConv2d)):
            assert layer.padding_mode == "zeros"


def test_frozen_network_equals_the_trained_one_on_any_size() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Conv2dSame(8, 8, 3, stride=2), nn.BatchNorm2d(8), StdConv2dSame(8, 8, 4))
    plan = make_plan(model, input_size=(3, 17, 14))
    assert plan.binarized == ["1", "3"]
    apply_plan(model, plan).eval()
    sizes = [(3, 17, 14), (3, 18, 15), (3, 9, 9)]
    images: list[Tensor] = [torch.randn(2, *size) for size in sizes]
    expected = [model(x).detach() for x in images]
    frozen = freeze(model)
    assert all(torch.equal(frozen(x), y) for x, y in zip(images, expected, strict=True))
