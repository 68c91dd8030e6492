"""What the native library does of a training step, against the same in torch in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from siman_convert import binarize, training_kernels
from siman_convert.binarize import EPS
from siman_convert.errors import InputError
from siman_convert.layers import SiMaNConv2d, batch_mean, sign_backward, signs_of
from siman_convert.shared_library import find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built here")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradient(grad: Tensor, x: Tensor, mean: Tensor, centred: bool) -> Tensor:
    out = torch.empty_like(x)
    sign_backward(grad, x, mean, out, centred=centred)
    return out


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    centred=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_gradients_are_those_of_float64(
    shape: tuple[int, ...], seed: int, centred: bool, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(2))
    mean = batch_mean(x) if centred else x.new_zeros(len(x), 1, 1, 1)
    assert training_kernels.are_for(x, mean, grad)
    expected = gradient(grad.double(), x.double(), mean.double(), centred)
    ours = gradient(grad, x, mean, centred)
    assert ours.stride() == x.stride()
    # std - |x - mean| and the centring may leave little but roundings: they are judged by what is taken away from.
    squares = (x.double() - mean).square().flatten(1).sum(dim=1) / max(1, x[0].numel() - 1)
    largest = 2 * grad.abs().amax() / (squares + EPS).sqrt().amin()
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6 * largest.item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_signs_are_those_of_torch(layout: torch.memory_format) -> None:
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), float("nan"), 3.0])
    x = odd[torch.randint(8, (3, 5, 7, 11), generator=torch.Generator().manual_seed(0))]
    x = x.contiguous(memory_format=layout)
    means = torch.tensor([0.0, -float("inf"), 3.0]).view(3, 1, 1, 1)
    signs = training_kernels.signs(x, means)
    assert torch.equal(signs, signs_of(x.double(), means.double(), torch.float64).float())
    assert signs.stride() == x.stride()


@given(
    filters=st.integers(1, 5),
    count=st.one_of(st.integers(1, 100), st.integers(4000, 9000)),
    seed=st.integers(0, 1000),
    percent=st.floats(0, 49.9),
    ties=st.booleans(),
)
def test_latent_weights_are_those_of_float64(filters: int, count: int, seed: int, percent: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, grad = (torch.randn(filters, count, generator=generator) for _ in range(2))
    rows = rows.round() if ties else rows
    exact = rows.double()
    assert training_kernels.are_for(rows, grad)
    magnitudes = binarize.standardize(exact)[0].abs()
    near = (magnitudes - binarize.lower_medians(magnitudes)).abs() < 1e-5  # there rounding decides
    bits, exact_bits = (binarize.binary_rows(each, "half") for each in (rows, exact))
    assert bits.dtype == torch.float32
    assert torch.equal(bits[~near], exact_bits[~near].float())
    if ((magnitudes > 1e-5) | (count == 1)).all():  # else it decides the sign of z
        ours, expected = (
            binarize.binary_rows_backward(g, w, "half") for g, w in ((grad, rows), (grad.double(), exact))
        )
        scale = binarize.standardize(exact)[1].max().item() * grad.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=5e-5 * scale)
    clipped = rows.clone()
    for weights in (clipped, exact):
        binarize.clip_magnitudes_(weights, percent)
    clear = exact.abs() > 1e-5
    torch.testing.assert_close(clipped.double()[clear], exact[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 64, 333])
def test_what_ties_with_the_median_is_no_one(count: int) -> None:
    """Of whole numbers and their negatives the mean is exactly 0: what ties before the standardisation ties behind it."""
    half = torch.randint(-4, 5, (20, count), generator=torch.Generator().manual_seed(count)).float()
    rows = torch.cat([half, -half], dim=1)
    assert torch.equal(binarize.binary_rows(rows, "half") > 0, binarize.half_bits(rows.abs()))
    for constant in (torch.full((2, count), 0.3), torch.zeros(2, count)):
        assert torch.equal(binarize.binary_rows(constant, "half"), -torch.ones(2, count))


def test_the_clip_finds_percentiles_that_its_sample_does_not_show() -> None:
    """Of 40,000 weights it looks at every second one first: here all of these are small."""
    rows = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0))
    rows[:, ::2] *= 1e-3
    rows = torch.stack([rows, -rows], dim=2).view(4, 2, 10_000).transpose(1, 2).reshape(4, 20_000).contiguous()
    expected = rows.double()
    for weights in (rows, expected):
        binarize.clip_magnitudes_(weights, 15.0)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the library, by torch
def test_a_clip_between_forward_and_backward_is_noticed(dtype: torch.dtype) -> None:
    layer = SiMaNConv2d(4, 4, 3).to(dtype)
    loss = layer(torch.randn(1, 4, 5, 5, dtype=dtype)).sum()
    layer.clip_weights_(15.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bits_do_not_depend_on_the_variant_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(300, 2305, generator=torch.Generator().manual_seed(0))
    grad, threads, found = rows.flip(1), torch.get_num_threads(), []
    try:
        for count, variant in ((1, None), (3, None), (1, "scalar")):
            torch.set_num_threads(count)
            if variant:
                monkeypatch.setenv("SIMAN_ISA", variant)
            clipped = rows.clone()
            binarize.clip_magnitudes_(clipped, 15.0)
            found.append(
                [binarize.binary_rows(rows, "half"), binarize.binary_rows_backward(grad, rows, "half"), clipped]
            )
    finally:
        torch.set_num_threads(threads)
    assert rows.numel() > 2 * training_kernels.LEAST
    assert all(torch.equal(one, other) for other in found[1:] for one, other in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stay_so(value: float) -> None:
    """The trainer looks for them before it saves; filters beside them are what they are."""
    rows = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    rows[1, 5] = value
    bits = binarize.binary_rows(rows, "half")
    assert torch.equal(bits[[0, 2]], binarize.binary_rows(rows[[0, 2]], "half"))
    assert set(bits.flatten().tolist()) == {1.0, -1.0}
    binarize.clip_magnitudes_(rows, 15.0)
    assert not rows[1].isfinite().all()
    assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_has_no_gradient(value: float) -> None:
    """It is NaN, of that sample alone, as in torch: the trainer sees a loss that is not finite."""
    x, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    x[1, 0, 0, 0] = value
    ours = gradient(grad, x, batch_mean(x), True)
    assert ours[0].isfinite().all()
    assert ours[1].isnan().all()


def test_threads_change_nothing() -> None:
    x, grad = torch.randn(7, 16, 96, 96), torch.randn(7, 16, 96, 96)
    mean, threads, found = batch_mean(x), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append((training_kernels.signs(x, mean), gradient(grad, x, mean, True)))
    finally:
        torch.set_num_threads(threads)
    assert x.numel() > 3 * training_kernels.LEAST
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_the_kernels_cannot_take_goes_to_torch() -> None:
    x = torch.randn(2, 4, 6, 6)
    means = batch_mean(x)
    assert training_kernels.are_for(x, means, x.contiguous(memory_format=torch.channels_last))
    for other in (x.double(), x.bfloat16(), x.to("meta"), x[:, :, ::2], x.transpose(0, 1)):
        assert not training_kernels.are_for(x, means, other)
    assert not training_kernels.are_for(x, means[:1].expand(2, 1, 1, 1))
    for one in (means[:1], means[:1].expand(2, 1, 1, 1), means.double()):
        assert torch.equal(signs_of(x, one, torch.float32), torch.where(x >= one, 1.0, -1.0))
    empty = x[:0]
    assert training_kernels.signs(empty, batch_mean(empty)).shape == empty.shape
    assert signs_of(x, batch_mean(x), torch.bfloat16).dtype == torch.bfloat16


def test_a_layer_is_the_same_with_and_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = SiMaNConv2d(6, 8, 3, padding=1, stride=2), torch.randn(4, 6, 9, 9)
    found = []
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setattr(training_kernels, "_library", lambda: None)
        trained, images = copy.deepcopy(layer), x.clone().requires_grad_()
        y = trained(images)
        y.square().sum().backward()
        found.append([y.detach(), images.grad, trained.weight.grad, trained.alpha.grad])
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_variant_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMAN_ISA", "sse9")
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(InputError, match=r"SIMAN_ISA.*unknown name"):
        training_kernels.signs(x, batch_mean(x))
