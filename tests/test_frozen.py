"""Freezing keeps every bit of the output, and what is left of a layer is its bits, its scale and its bias."""

import copy
from typing import Any

import numpy as np
import packed_models as pm
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import HAND_CLASSES, HAND_SIZE, Size, one_thread  # noqa: F401  a fixture
from torch import Tensor, nn

from siman_convert.bits import pack_weight_bits, unpack_weight_bits
from siman_convert.errors import InputError
from siman_convert.frozen import (
    PackedConv2d,
    empty_packed,
    freeze,
    halved_names,
    integer_conv,
    packed_layers,
    unpack,
)
from siman_convert.layers import Geometry, SiMaNConv2d, geometry_of
from siman_convert.plans import make_plan
from siman_convert.surgery import apply_plan, binary_layers

CASES = [
    ("test_resnet", (3, 64, 64), 10, "half"),
    ("test_resnet", (3, 64, 64), 10, "analytic"),
    ("hand", HAND_SIZE, HAND_CLASSES, "half"),
    ("hand", HAND_SIZE, HAND_CLASSES, "analytic"),
]


def siman_layer(
    selection: str = "half", seed: int = 0, *, same: bool = False, padding: Any = 0, **arguments: Any
) -> SiMaNConv2d:
    """A layer whose alphas and bias are not what they are initialised to."""
    torch.manual_seed(seed)
    layer = SiMaNConv2d(**arguments, padding="same" if same else padding, selection=selection)  # type: ignore[arg-type]
    nn.init.normal_(layer.alpha)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.eval()


@pytest.mark.parametrize(("name", "size", "classes", "selection"), CASES)
def test_a_frozen_model_gives_the_same_bits(name: str, size: Size, classes: int, selection: str) -> None:
    siman, plan = pm.siman_model(name, size, classes, selection)
    x = pm.images(4, *size)
    expected = pm.run_torch(siman, x)
    packed = freeze(siman)
    assert packed is siman
    assert list(packed_layers(packed)) == plan.binarized
    assert not binary_layers(packed)
    assert not any(module.training for module in packed.modules())
    np.testing.assert_array_equal(pm.run_torch(packed, x), expected)


@pytest.mark.parametrize(("name", "size", "classes"), [case[:3] for case in CASES[::2]])
def test_the_bits_of_every_layer_reach_the_logits(name: str, size: Size, classes: int) -> None:
    """Or the parity above would mean nothing. A filter may sit behind a dead ReLU, but not all of a layer's."""
    packed = pm.packed_model(name, size, classes)
    x = pm.images(4, *size)
    before = pm.run_torch(packed, x)
    for layer_name, layer in packed_layers(packed).items():
        assert any(_shows(packed, layer, filter_, x, before) for filter_ in range(9)), layer_name
    np.testing.assert_array_equal(pm.run_torch(packed, x), before)  # every bit was turned back


def test_zero_gammas_would_hide_the_bits() -> None:
    """The trap itself: as timm initialises a model, the last layer of a residual block does nothing."""
    model = timm.create_model("test_resnet", num_classes=10)
    packed = freeze(apply_plan(model, make_plan(model)))
    x = pm.images(2, 3, 64, 64)
    layers = packed_layers(packed)
    before = pm.run_torch(packed, x)
    assert not any(_shows(packed, layers["layer2.0.conv2"], filter_, x, before) for filter_ in range(9))


def _shows(model: nn.Module, layer: PackedConv2d, filter_: int, x: Tensor, before: np.ndarray) -> bool:
    with pm.flipped(layer, filter_):
        return not np.array_equal(pm.run_torch(model, x), before)


@st.composite
def layer_arguments(draw: Any) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    channels = draw(st.sampled_from([1, 3, 7, 8, 9, 16, 17]))
    same = draw(st.booleans())
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return {
        "in_channels": groups * (channels if kernel != (1, 1) else max(2, channels)),  # two weights a filter at least
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": kernel,
        "groups": groups,
        "bias": draw(st.booleans()),
        "dilation": draw(pair),
        "stride": 1 if same else draw(pair),
        "same": same,
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
    }


@given(
    arguments=layer_arguments(),
    selection=st.sampled_from(["half", "analytic"]),
    seed=st.integers(0, 2**31),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    batch=st.integers(0, 2),
    constant=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_layer_gives_the_same_bits(
    arguments: dict[str, Any], selection: str, seed: int, extra: tuple[int, int], batch: int, constant: bool
) -> None:
    layer = siman_layer(selection, seed, **arguments)
    size = [d * (k - 1) + 1 + e for d, k, e in zip(layer.dilation, layer.kernel_size, extra, strict=True)]
    x = torch.randn(batch, layer.in_channels, *size, generator=torch.Generator().manual_seed(seed))
    if constant:  # every value is the mean, if it is computed as it should be
        x = torch.full_like(x, 0.1 + seed % 100)
    packed = PackedConv2d.from_siman(layer, "l")
    with torch.no_grad():
        got, expected = packed(x), layer(x)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
        # as a function, unscaled, and on another memory layout
        assert torch.equal(integer_conv(x, packed.weight_bits, packed.channels, packed.geometry), layer.unscaled(x))
        by_channel = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(packed(by_channel), layer(by_channel))
    assert np.array_equal(unpack_weight_bits(packed.weight_bits.numpy(), packed.channels), layer.bits().numpy())


def test_what_a_packed_layer_holds() -> None:
    layer = siman_layer(in_channels=18, out_channels=4, kernel_size=(3, 2), groups=2, same=True)
    packed = PackedConv2d.from_siman(layer, "block.conv")
    assert packed.name == "block.conv"
    assert packed.channels == 9
    assert packed.geometry == geometry_of(layer) == Geometry((1, 1), (0, 1, 1, 1), (1, 1), 2)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.state_dict().items()} == {
        "weight_bits": (torch.uint8, (4, 3, 2, 2)),
        "scale": (torch.float32, (4,)),
        "bias": (torch.float32, (4,)),
    }
    assert not list(packed.parameters())
    assert (
        "bias"
        not in PackedConv2d.from_siman(
            siman_layer(in_channels=4, out_channels=2, kernel_size=2, bias=False)
        ).state_dict()
    )
    assert repr(packed) == (
        "PackedConv2d(18, 4, kernel_size=(3, 2), stride=(1, 1), pads=(0, 1, 1, 1), dilation=(1, 1), groups=2, "
        "bias=True, center=True)"
    )


def test_the_packed_layer_owns_its_tensors() -> None:
    layer = siman_layer(in_channels=4, out_channels=2, kernel_size=2)
    packed = PackedConv2d.from_siman(layer)
    before = copy.deepcopy(packed.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.neg_()
    assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_training_flag_stays_and_freeze_ends_it() -> None:
    layer = siman_layer(in_channels=4, out_channels=2, kernel_size=2)
    assert PackedConv2d.from_siman(layer.train()).training
    assert not PackedConv2d.from_siman(layer.eval()).training
    assert not freeze(nn.Sequential(layer.train(), nn.BatchNorm2d(2)).train())[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_only_float32_can_be_packed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Identity(), siman_layer(in_channels=4, out_channels=2, kernel_size=2)).to(dtype)
    with pytest.raises(InputError, match=rf"^1: packing needs float32 weights, got {dtype}$"):
        freeze(model)
    assert isinstance(model[1], SiMaNConv2d)  # nothing was swapped


def test_a_shared_layer_is_swapped_under_all_its_names() -> None:
    layer = siman_layer(in_channels=4, out_channels=4, kernel_size=3, padding=1)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    x = torch.randn(2, 4, 6, 6)
    expected = pm.run_torch(model, x)
    freeze(model)
    assert model[0] is model[1][1]
    assert list(packed_layers(model)) == ["0"]
    np.testing.assert_array_equal(pm.run_torch(model, x), expected)


def test_a_model_that_is_one_layer() -> None:
    layer = siman_layer(in_channels=5, out_channels=3, kernel_size=(2, 3), stride=2)
    x = torch.randn(2, 5, 6, 6)
    packed = freeze(layer)
    assert isinstance(packed, PackedConv2d)
    np.testing.assert_array_equal(pm.run_torch(packed, x), pm.run_torch(layer, x))


def test_a_model_without_binary_layers_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    assert freeze(model) is model
    assert type(model[0]) is nn.Conv2d
    assert not model.training


def test_empty_packed_has_the_shapes_of_the_frozen_model() -> None:
    """Filled with the tensors of a frozen model it is that model."""
    for name, size, classes, _ in CASES[::2]:
        siman, plan = pm.siman_model(name, size, classes)
        frozen = freeze(siman)
        bare = pm.HandNet() if name == "hand" else timm.create_model(name, num_classes=classes)
        empty = empty_packed(bare, plan)
        assert not empty.training
        assert not any(tensor.any() for layer in packed_layers(empty).values() for tensor in layer.buffers())
        empty.load_state_dict(frozen.state_dict(), strict=True)
        x = pm.images(2, *size)
        np.testing.assert_array_equal(pm.run_torch(empty, x), pm.run_torch(frozen, x))


def test_halved_names_are_the_full_precision_weights() -> None:
    packed = pm.packed_model("hand", HAND_SIZE, HAND_CLASSES)
    assert halved_names(packed) == {"stem.weight", "head.weight"}
    resnet = pm.packed_model("test_resnet", (3, 64, 64), 10)
    convs = {f"{name}.weight" for name, module in resnet.named_modules() if type(module) is nn.Conv2d}
    assert halved_names(resnet) == convs | {"fc.weight"}
    assert len(convs) == 4  # stem and three shortcuts


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 64, 65])
def test_unpack(channels: int, kernel: tuple[int, int]) -> None:
    """Against `bits`, and of ordinary strides: a convolution with others answers channels-last."""
    bits = np.random.default_rng(channels).random((5, channels, *kernel)) < 0.5
    weight = unpack(torch.from_numpy(pack_weight_bits(bits)), channels)
    assert weight.dtype == torch.float32
    assert weight.stride() == torch.empty(weight.shape).stride()
    np.testing.assert_array_equal(weight.numpy(), np.where(bits, 1, -1))
    if (channels, kernel) == (9, (1, 1)):
        y = integer_conv(
            torch.randn(2, 9, 4, 4), torch.from_numpy(pack_weight_bits(bits)), 9, Geometry((1, 1), (0,) * 4, (1, 1), 1)
        )
        assert y.is_contiguous()


def test_integer_conv_without_center_compares_with_zero() -> None:
    """One 1x1 filter of weight +1 on values that all lie above zero, half of them below their mean."""
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    plus_one, geometry = torch.ones(1, 1, 1, 1, dtype=torch.uint8), Geometry((1, 1), (0,) * 4, (1, 1), 1)
    assert integer_conv(x, plus_one, 1, geometry).flatten().tolist() == [-1, -1, 1, 1]
    assert integer_conv(x, plus_one, 1, geometry, center=False).flatten().tolist() == [1, 1, 1, 1]


class Positions(nn.Module):
    """As timm's PositionalEncodingFourier: a table goes through the convolution, made where the weight is and as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.projection = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, like = self.stem(x), self.projection.weight
        table = (
            torch.arange(4.0, device=like.device)
            .to(like.dtype)
            .view(1, 4, 1, 1)
            .expand(-1, like.shape[1], *x.shape[2:])
        )
        return x + self.projection(table + x[:, :4])


def test_a_network_may_ask_a_packed_layer_for_the_kind_of_its_weight() -> None:
    model = Positions()
    plan = make_plan(model, input_size=(3, 9, 9))
    assert plan.binarized == ["projection"]
    model, x = apply_plan(model, plan).eval(), torch.randn(2, 3, 9, 9)
    expected = model(x)
    packed = freeze(model)
    assert torch.equal(packed(x), expected)
    layer = packed.projection
    assert (layer.weight.shape, layer.weight.dtype) == ((8, 4, 1, 1), torch.float32)
    assert "projection.weight" not in packed.state_dict()
