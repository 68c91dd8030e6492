"""The mathematics of SiMaN against slow, obvious references."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siman_convert import binarize, pieces

RNG_SEEDS = st.integers(0, 2**32 - 1)


def random_rows(seed: int, filters: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((filters, count)))


@pytest.mark.parametrize(
    ("magnitudes", "bits"),
    [
        ([3.0, 1.0, 2.0, 4.0], [1, 0, 0, 1]),  # even: exactly half
        ([3.0, 1.0, 2.0], [1, 0, 0]),  # odd: (n - 1) / 2
        ([1.0, 1.0, 1.0, 2.0], [0, 0, 0, 1]),  # ties with the median are all 0
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
        ([5.0], [0]),
    ],
)
def test_half_bits(magnitudes: list[float], bits: list[int]) -> None:
    assert binarize.half_bits(torch.tensor([magnitudes])).int().tolist() == [bits]


@given(seed=RNG_SEEDS, count=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_analytic_bits_are_the_best_of_all(seed: int, count: int) -> None:
    magnitudes = random_rows(seed, 1, count).abs()
    chosen = binarize.analytic_bits(magnitudes)[0].double()

    def cosine(bits: torch.Tensor) -> float:
        return float(bits @ magnitudes[0] / (bits.norm() * magnitudes[0].norm()))

    candidates = [torch.tensor(c, dtype=torch.float64) for c in itertools.product([0, 1], repeat=count) if any(c)]
    assert cosine(chosen) == pytest.approx(max(map(cosine, candidates)), abs=1e-12)


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (lambda rng: rng.laplace(size=400_000), 1 / math.e),
        (lambda rng: rng.uniform(-1, 1, size=400_000), 2 / 3),
        (lambda rng: rng.standard_normal(400_000), 0.54),
    ],
    ids=["laplacian", "uniform", "gaussian"],
)
def test_share_of_ones_of_the_analytic_bits(draw, share) -> None:  # type: ignore[no-untyped-def]
    magnitudes = torch.from_numpy(draw(np.random.default_rng(0))).abs()[None]
    assert binarize.analytic_bits(magnitudes).double().mean().item() == pytest.approx(share, abs=0.005)


@given(
    seed=RNG_SEEDS,
    count=st.integers(1, 300),
    percent=st.one_of(st.sampled_from([0.0, 7.5, 15.0, 25.0]), st.floats(0, 49.9)),
    distinct=st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_percentiles_are_numpys(seed: int, count: int, percent: float, distinct: int) -> None:
    values = np.random.default_rng(seed).integers(0, distinct, count).astype(np.float64)  # few distinct: many ties
    low, high = binarize.percentiles(torch.from_numpy(values), (percent, 100 - percent))
    assert low.item() == pytest.approx(np.percentile(values, percent), rel=1e-12, abs=1e-9)
    assert high.item() == pytest.approx(np.percentile(values, 100 - percent), rel=1e-12, abs=1e-9)


@given(
    seed=RNG_SEEDS,
    count=st.integers(1, 200_000),
    rank=st.floats(0, 1),
    kind=st.sampled_from(["normal", "ties", "sorted"]),
)
@settings(max_examples=60, deadline=None)
def test_selection_equals_sorting(seed: int, count: int, rank: float, kind: str) -> None:
    values = random_rows(seed, 1, count)[0]
    values = {"normal": values, "ties": values.round(), "sorted": values.sort().values}[kind]
    position = int(rank * (count - 1))
    before = values.clone()
    assert binarize._select_in_numpy(values, [position, count - 1]) == binarize._select_by_sorting(
        values, [position, count - 1]
    )
    assert torch.equal(values, before)


@given(
    seed=RNG_SEEDS,
    filters=st.integers(1, 6),
    count=st.integers(1, 600),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["normal", "ties", "constant", "sorted"]),
)
@settings(max_examples=150, deadline=None)
def test_lower_medians_are_torchs(seed: int, filters: int, count: int, dtype: torch.dtype, kind: str) -> None:
    """On another path than a CPU's it is torch's own median: the bits must be the same."""
    rows = random_rows(seed, filters, count).to(dtype).abs()
    rows = {
        "normal": rows,
        "ties": rows.round(),
        "constant": rows[:, :1].repeat(1, count),
        "sorted": rows.sort().values,
    }[kind]
    before = rows.clone()
    assert torch.equal(binarize.lower_medians(rows), rows.median(dim=1, keepdim=True).values)
    assert torch.equal(binarize.half_bits(rows), rows > rows.sort().values[:, [(count - 1) // 2]])
    assert torch.equal(rows, before)


@given(
    seed=RNG_SEEDS,
    filters=st.integers(1, 9),
    count=st.integers(1, 40),
    piece=st.integers(1, 400),
    selection=st.sampled_from(binarize.SELECTIONS),
)
@settings(max_examples=80, deadline=None)
def test_binary_rows_and_their_gradient_do_not_depend_on_pieces(
    seed: int, filters: int, count: int, piece: int, selection: binarize.Selection
) -> None:
    rows, grad = random_rows(seed, filters, count), random_rows(seed + 1, filters, count)
    z, rstd = binarize.standardize(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        bw = binarize.binary_rows(rows, selection)
        grad_rows = binarize.binary_rows_backward(grad, rows, selection)
    clear = z.abs() > 1e-6  # of the sign; of a magnitude the rounding of a row's sum decides among near ties only
    if selection == "sign":
        assert torch.equal(bw[clear] > 0, (z >= 0)[clear])
    elif count > 2:  # two centred weights always tie
        assert torch.equal(bw > 0, binarize.select_bits(z, selection))
    straight = grad if selection == "sign" else grad * z.sign()
    expected = (straight - straight.mean(1, True) - z * (straight * z).sum(1, True) / max(1, count - 1)) * rstd
    assert torch.allclose(grad_rows, expected, atol=1e-9 * float(max(1, rstd.max())))


def test_percentiles_of_more_than_16_million_elements() -> None:
    count = 2**24 + 3  # torch.quantile refuses this
    values = torch.arange(count, dtype=torch.float64)
    low, high = binarize.percentiles(values, (15.0, 85.0))
    assert low.item() == pytest.approx(0.15 * (count - 1))
    assert high.item() == pytest.approx(0.85 * (count - 1))


@given(seed=RNG_SEEDS, filters=st.integers(1, 5), count=st.integers(2, 60), percent=st.floats(0, 49.9))
@settings(max_examples=60, deadline=None)
def test_clip_keeps_signs_and_bounds_magnitudes(seed: int, filters: int, count: int, percent: float) -> None:
    rows = random_rows(seed, filters, count).numpy()
    centred = rows - rows.mean(axis=1, keepdims=True)
    low, high = np.percentile(np.abs(centred), [percent, 100 - percent])
    expected = np.sign(centred) * np.clip(np.abs(centred), low, high)
    binarize.clip_magnitudes_(torch.from_numpy(rows), percent)
    assert np.allclose(rows, expected, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_are_taken_as_they_are(device: str) -> None:
    """No caller has to detach what it trains; none of these has a gradient of autograd's."""
    rows = torch.nn.Parameter(random_rows(8, 3, 20).to(device))
    results = [
        binarize.half_bits(rows.abs()),
        binarize.analytic_bits(rows.abs()),
        binarize.binary_rows(rows, "half"),
    ]
    assert all(result.shape == rows.shape and not result.requires_grad for result in results)
    binarize.clip_magnitudes_(rows, 15.0)
    assert rows.is_leaf


@pytest.mark.parametrize("percent", [-1.0, 50.0, math.nan])
def test_clip_refuses_a_percentage_out_of_range(percent: float) -> None:
    with pytest.raises(ValueError, match="percent must be in"):
        binarize.clip_magnitudes_(torch.zeros(1, 4), percent)


@given(seed=RNG_SEEDS, filters=st.integers(1, 6), count=st.integers(3, 700))  # two centred weights always tie
@settings(max_examples=60, deadline=None)
def test_remap_turns_large_weights_into_ones(seed: int, filters: int, count: int) -> None:
    rows = random_rows(seed, filters, count).float()
    z, _ = binarize.standardize(binarize.remap_rows(rows))
    assert torch.equal(binarize.half_bits(z.abs()), rows > rows.median(dim=1, keepdim=True).values)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_remap_keeps_the_direction_and_the_scale(scale: float) -> None:
    rows = scale * random_rows(0, 64, 576).float()
    latents = binarize.remap_rows(rows)
    z, _ = binarize.standardize(latents)
    signs = 2.0 * binarize.half_bits(z.abs()) - 1
    cosine = torch.nn.functional.cosine_similarity(rows, signs, dim=1)
    assert cosine.mean().item() == pytest.approx(0.79, abs=0.01)
    if scale > binarize.EPS:
        assert latents.square().mean().sqrt().item() == pytest.approx(scale, rel=0.02)


def test_remap_of_constant_filters_has_half_ones() -> None:
    z, _ = binarize.standardize(binarize.remap_rows(torch.zeros(2, 64)))
    assert binarize.half_bits(z.abs()).sum(dim=1).tolist() == [32, 32]


@pytest.mark.parametrize(
    ("selection", "bits"), [("sign", [0, 1, 1, 1]), ("half", [1, 0, 0, 1]), ("analytic", [1, 0, 0, 1])]
)
def test_bits_of_standardized_weights(selection: binarize.Selection, bits: list[int]) -> None:
    """-0 is a zero; without magnitudes in between, half and analytic agree."""
    z = torch.tensor([[-1.0, 0.0, -0.0, 1.0]])
    assert binarize.select_bits(z, selection).int().tolist() == [bits]


@pytest.mark.parametrize(("selection", "expected"), [("sign", [2.0, 3.0, 5.0]), ("half", [-2.0, 0.0, 5.0])])
def test_straight_through(selection: binarize.Selection, expected: list[float]) -> None:
    """Of sign the gradient passes as it is, also at 0 and beyond 1; of magnitudes it turns with the sign of z."""
    z, grad = torch.tensor([[-1.0, 0.0, 7.0]]), torch.tensor([[2.0, 3.0, 5.0]])
    assert binarize.select_backward(grad, z, selection).tolist() == [expected]


def test_scratch_draws_as_conv2d_does() -> None:
    torch.manual_seed(11)
    expected = torch.nn.Conv2d(6, 4, 3, groups=2, bias=False).weight.flatten(1)
    assert torch.equal(binarize.scratch_rows(expected.shape, torch.Generator().manual_seed(11)), expected)


def test_standardize_backward_is_its_gradient() -> None:
    rows = random_rows(5, 3, 17).requires_grad_()
    grad = random_rows(6, 3, 17)
    z, rstd = binarize.standardize(rows)
    (expected,) = torch.autograd.grad(z, rows, grad)
    assert torch.allclose(binarize.standardize_backward(grad, z, rstd), expected, atol=1e-12)


def test_projection_scale_is_least_squares() -> None:
    rows = random_rows(7, 4, 50)
    bits = rows > 0.1
    signs = 2.0 * bits.double() - 1
    expected = [torch.linalg.lstsq(s[:, None], w[:, None]).solution.item() for s, w in zip(signs, rows, strict=True)]
    assert binarize.projection_scale(rows, bits).tolist() == pytest.approx(expected)


def test_clip_percent_falls_linearly() -> None:
    assert [binarize.clip_percent(epoch, 4) for epoch in range(4)] == [15.0, 11.25, 7.5, 3.75]
