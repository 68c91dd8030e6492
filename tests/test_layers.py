"""SiMaNConv2d against plain loops and autograd, in every mode, and on a device that has no values."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert import pieces
from siman_convert.bits import unpack_weight_bits
from siman_convert.errors import InputError
from siman_convert.frozen import freeze
from siman_convert.layers import BinarizeWeight, SiMaNConv2d


def slow_forward(layer: SiMaNConv2d, x: Tensor) -> Tensor:
    """Steps 2 to 6 of the method, in plain autograd operations."""
    w = layer.weight
    mean, var = w.mean(dim=(1, 2, 3), keepdim=True), w.var(dim=(1, 2, 3), keepdim=True)
    z = (w - mean) / torch.sqrt(var + 1e-5)
    z = z if layer.selection == "sign" else z.abs()
    median = torch.zeros(()) if layer.selection == "sign" else z.flatten(1).median(dim=1).values.view(-1, 1, 1, 1)
    bw = torch.where(z > median, 1.0, -1.0).to(w.dtype) + z - z.detach()
    a = (x - x.mean(dim=(1, 2, 3), keepdim=True)) / torch.sqrt(x.var(dim=(1, 2, 3), keepdim=True) + 1e-5)
    surrogate = torch.where(a.abs() < 1, 2 * a - a * a.abs(), a.sign())  # its derivative is max(0, 2 - 2|a|)
    ba = torch.where(a >= 0, 1.0, -1.0).to(x.dtype) + surrogate - surrogate.detach()
    padding = layer._reversed_padding_repeated_twice
    y = F.conv2d(F.pad(ba, padding), bw, None, layer.stride, 0, layer.dilation, layer.groups)
    y = y * layer.alpha.view(-1, 1, 1)
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


@st.composite
def shapes(draw):  # type: ignore[no-untyped-def]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    same = draw(st.booleans())
    return {
        "in_channels": groups * draw(st.integers(3, 5)),
        "out_channels": groups * draw(st.integers(1, 4)),
        "kernel_size": kernel,
        "stride": 1 if same else (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": "same" if same else (draw(st.integers(0, 2)), draw(st.integers(0, 3))),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "selection": draw(st.sampled_from(["half", "half", "sign"])),
    }


@given(shape=shapes(), seed=st.integers(0, 2**31), batch=st.integers(1, 3), channels_last=st.booleans())
@settings(max_examples=80, deadline=None)
def test_forward_and_gradients_over_shapes(shape, seed, batch, channels_last) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    layer = SiMaNConv2d(**shape, dtype=torch.float64)
    nn.init.normal_(layer.alpha)
    x = torch.randn(batch, shape["in_channels"], 9, 8, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = slow_forward(layer, x)
    actual = layer(x)
    assert torch.allclose(actual, expected, atol=1e-12)
    wanted = [x, *layer.parameters()]
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-9 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("selection", ["half", "analytic", "sign"])
def test_eval_is_the_integer_convolution(selection: str) -> None:
    torch.manual_seed(0)
    layer = SiMaNConv2d(6, 5, 3, padding=1, stride=2, bias=False, selection=selection).eval()
    x = torch.randn(3, 6, 11, 10)
    before = layer.weight.detach().clone()
    mean = np.array([np.float32(sample.mean(dtype=np.float64)) for sample in x.numpy()])
    signs = torch.from_numpy(np.where(x.numpy() >= mean[:, None, None, None], 1, -1)).double()
    weights = layer.bits().double() * 2 - 1
    expected = F.conv2d(signs, weights, stride=2, padding=1).float() * layer.alpha.view(-1, 1, 1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.weight, before)  # never clipped by a forward


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding", [1, "same"])
def test_a_batch_in_pieces_is_the_batch(
    layout: torch.memory_format, padding: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output bit for bit; gradients up to the order of sums. Seven samples in pieces of two, a last one of one."""
    torch.manual_seed(5)
    layer = SiMaNConv2d(6, 4, (3, 4) if padding == "same" else 3, padding=padding)
    x = torch.randn(7, 6, 9, 8).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(layer(x))

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)]

    whole = step()
    monkeypatch.setattr(pieces, "PIECE", 2 * 6 * 9 * 8)
    assert len(list(pieces.pieces(x))) == 4
    parts = step()
    assert torch.equal(parts[0], whole[0])
    assert parts[0].stride() == whole[0].stride()
    for ours, theirs in zip(parts[1:], whole[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_torch_compile_gives_the_same_loss_and_gradients() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SiMaNConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))
    x = torch.randn(4, 3, 12, 12)

    def step(forward) -> list[Tensor]:  # type: ignore[no-untyped-def]
        loss = forward(x).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    torch._dynamo.reset()
    for ours, theirs in zip(step(torch.compile(model, backend="aot_eager")), step(model), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_eval_of_one_sample_does_not_depend_on_its_batch() -> None:
    layer = SiMaNConv2d(8, 8, 3, padding=1).eval()
    x = torch.randn(5, 8, 9, 9)
    assert torch.equal(torch.cat([layer(sample[None]) for sample in x]), layer(x))
    assert layer(x[:0]).shape == (0, 8, 9, 9)


@pytest.mark.parametrize(
    ("value", "sign"), [(0.0, 1.0), (-0.0, 1.0), (3.5, 1.0), (float("nan"), -1.0)], ids=["0", "-0", "constant", "nan"]
)
def test_signs_at_the_threshold(value: float, sign: float) -> None:
    """A constant image equals its mean everywhere and becomes +1; a comparison with NaN does not hold."""
    layer = SiMaNConv2d(3, 1, 1, bias=False).eval()
    nn.init.constant_(layer.alpha, 1.0)
    weights = layer.bits().float() * 2 - 1
    assert layer(torch.full((1, 3, 3, 3), value)).flatten().tolist() == [sign * weights.sum().item()] * 9


@pytest.mark.parametrize("selection", ["half", "analytic", "sign"])
def test_nothing_reads_values_back_to_the_host(selection: str) -> None:
    """A meta tensor has no values: reading one raises. So no percentile, bit or statistic waits for the device."""
    layer = SiMaNConv2d(4, 6, 3, padding="same", groups=2, device="meta", selection=selection)
    x = torch.empty(2, 4, 8, 8, device="meta", requires_grad=True)
    layer.clip_weights_(7.5)
    y = layer.train()(x)
    y.backward(torch.empty_like(y))
    assert y.shape == (2, 6, 8, 8)
    assert layer.eval()(x).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_bits_nor_signs(dtype: torch.dtype) -> None:
    """Statistics stay in float32: with alpha = 1 the output is the same integer, exact in half precision."""
    torch.manual_seed(1)
    layer = SiMaNConv2d(16, 8, 3, padding=1)
    nn.init.constant_(layer.alpha, 1.0)
    nn.init.zeros_(layer.bias)
    x = torch.randn(2, 16, 12, 12, requires_grad=True)
    plain = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        mixed = layer(x)
    assert mixed.dtype == dtype
    assert torch.equal(mixed.float(), plain)
    mixed.float().square().mean().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().max() > 0


def test_small_weights_in_float16_keep_their_scale() -> None:
    """Their squares are 0 in float16; the scale of the latents is the weights' all the same."""
    torch.manual_seed(2)
    conv = nn.Conv2d(16, 8, 3).half()
    nn.init.normal_(conv.weight, std=1e-4)
    layer = SiMaNConv2d.from_float(conv)
    expected = SiMaNConv2d.from_float(copy.deepcopy(conv).float())
    torch.testing.assert_close(layer.weight, expected.weight.half(), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(layer.alpha, expected.alpha.half(), rtol=1e-2, atol=1e-7)
    assert torch.equal(layer.eval().bits(), expected.bits())


def test_the_conv_function_keeps_its_input_and_nothing_of_its_size() -> None:
    """Memory: what the backward pass holds of activation size is x, as for a full-precision convolution."""
    layer = SiMaNConv2d(8, 8, 3, padding=1)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert x.untyped_storage().data_ptr() in kept
    assert sum(numel >= x.numel() for numel in kept.values()) == 1


def pretrained_conv() -> nn.Conv2d:
    torch.manual_seed(2)
    return nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=4, bias=True)


def test_from_float_remap() -> None:
    conv = pretrained_conv().eval()
    conv.weight.requires_grad_(False)
    layer = SiMaNConv2d.from_float(conv)
    w = conv.weight.flatten(1)
    assert torch.equal(layer.bits().flatten(1), w > w.median(dim=1, keepdim=True).values)
    signs = 2.0 * layer.bits().flatten(1) - 1
    assert torch.allclose(layer.alpha, (w * signs).sum(dim=1) / w.shape[1])
    assert torch.equal(layer.bias, conv.bias)
    assert (layer.stride, layer.padding, layer.groups, layer.training) == ((2, 1), (1, 2), 4, False)
    assert not layer.weight.requires_grad
    x = torch.randn(2, 8, 9, 9)
    assert layer(x).shape == conv(x).shape


def test_from_float_copy() -> None:
    conv = pretrained_conv()
    layer = SiMaNConv2d.from_float(conv, init="copy", selection="analytic")
    assert torch.equal(layer.weight, conv.weight)
    assert torch.allclose(layer.alpha, conv.weight.abs().mean(dim=(1, 2, 3)))
    assert layer.selection == "analytic"


@pytest.mark.parametrize("init", ["remap", "copy"])
def test_from_float_by_sign_keeps_the_weights(init: str) -> None:
    """Their signs are the bits that a remap is after; only alpha differs."""
    conv = pretrained_conv()
    layer = SiMaNConv2d.from_float(conv, init=init, selection="sign")
    w = conv.weight.detach().flatten(1)
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.bits().flatten(1), w >= w.mean(dim=1, keepdim=True))
    signs = 2.0 * layer.bits().flatten(1) - 1
    assert torch.allclose(layer.alpha, ((w * signs) if init == "remap" else w.abs()).mean(dim=1))


def test_from_float_scratch() -> None:
    conv = pretrained_conv().double()
    layers = [SiMaNConv2d.from_float(conv, "scratch", "half", torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[2].weight)
    assert layers[0].weight.dtype == torch.float64
    bound = 1 / (2 * 3 * 5) ** 0.5  # two channels a group, 3 x 5 taps
    assert 0.95 * bound < layers[0].weight.abs().max().item() <= bound
    assert torch.allclose(layers[0].alpha, layers[0].weight.abs().mean(dim=(1, 2, 3)))
    assert torch.equal(layers[0].bias, conv.bias)
    assert SiMaNConv2d.from_float(conv.to("meta"), "scratch").weight.is_meta


@pytest.mark.parametrize(
    ("selection", "bits", "grads"),
    [
        ("sign", [-1, 1, 1], [[1 / 6, -1 / 3, 1 / 6], [-1 / 3, 2 / 3, -1 / 3], [1 / 6, -1 / 3, 1 / 6]]),
        ("analytic", [1, -1, 1], [[-1 / 6, 1 / 3, -1 / 6], [0, 0, 0], [1 / 6, -1 / 3, 1 / 6]]),
    ],
)
def test_weights_and_their_gradients_by_hand(selection: str, bits: list[int], grads: list[list[float]]) -> None:
    """w = (-1, 0, 1) is its own z, up to EPS. Row i of `grads` is dL/dw of dL/d(2b - 1) = e_i:

    g - mean(g) - z * <g, z> / 2, where g is e_i of sign, e_i * sign(z) of magnitudes.
    """
    for i, expected in enumerate(grads):
        rows = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
        bw = BinarizeWeight.apply(rows, selection)
        bw.backward(torch.eye(3, dtype=torch.float64)[i][None])
        assert bw.tolist() == [bits]
        assert rows.grad[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_bits_by_sign_pack_as_any_others() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(SiMaNConv2d(9, 6, 3, padding=1, selection="sign")).eval()
    x = torch.randn(2, 9, 7, 7)
    expected, bits = model(x), model[0].bits()
    freeze(model)
    assert torch.equal(model(x), expected)
    assert np.array_equal(unpack_weight_bits(model[0].weight_bits.numpy(), 9), bits.numpy())


def test_bits_by_sign_are_never_clipped() -> None:
    layer = SiMaNConv2d(4, 4, 3, selection="sign")
    before = layer.weight.detach().clone()
    layer.clip_weights_(15.0)
    assert torch.equal(layer.weight, before)


def test_from_float_keeps_device_and_dtype() -> None:
    assert SiMaNConv2d.from_float(pretrained_conv().double()).alpha.dtype == torch.float64
    assert SiMaNConv2d.from_float(pretrained_conv().to("meta")).weight.is_meta


def test_bad_arguments_are_one_line() -> None:
    conv = pretrained_conv()
    with pytest.raises(InputError, match=r"unknown initialisation 'xavier'; known: remap, copy, scratch"):
        SiMaNConv2d.from_float(conv, init="xavier")
    with pytest.raises(InputError, match=r"unknown bit selection 'mean'; known: half, analytic, sign"):
        SiMaNConv2d.from_float(conv, selection="mean")
    conv.forward = lambda x: x
    with pytest.raises(InputError, match="not a Conv2d, which convolves in its own way"):
        SiMaNConv2d.from_float(conv)
    with pytest.raises(InputError, match="not a Linear"):
        SiMaNConv2d.from_float(nn.Linear(2, 2))
    with pytest.raises(InputError, match="pads with zeros only"):
        SiMaNConv2d.from_float(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))


def test_clip_writes_the_weights_and_no_gradient() -> None:
    layer = SiMaNConv2d(4, 4, 3)
    layer.clip_weights_(15.0)
    magnitudes = layer.weight.detach().abs()
    assert (magnitudes == magnitudes.max()).sum() >= 0.1 * magnitudes.numel()
    assert layer.weight.requires_grad
    assert layer.weight.grad_fn is None
