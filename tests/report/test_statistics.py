"""The statistics of latent weights against loops that follow their definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from siman_convert.layers import SiMaNConv2d
from siman_convert.report.statistics import (
    BINS,
    DRAWN,
    bit_statistics,
    entropy,
    fit,
    fitted_shapes,
    histogram,
    layer_statistics,
    model_statistics,
    shape_distances,
)


def rows(filters: int, size: int, seed: int = 0) -> Tensor:
    """Filters of different scales and means."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(filters, size, generator=generator)
    return weights * torch.rand(filters, 1, generator=generator) + torch.randn(filters, 1, generator=generator)


def slow(row: list[float], selection: str) -> dict[str, float]:
    """One filter, by the definitions: standardise, choose k, set the k largest magnitudes to 1."""
    mean = sum(row) / len(row)
    variance = sum((w - mean) ** 2 for w in row) / (len(row) - 1)
    magnitudes = [abs(w - mean) / math.sqrt(variance + 1e-5) for w in row]
    ordered = sorted(magnitudes, reverse=True)
    if selection == "half":
        k = sum(m > ordered[len(row) // 2] for m in magnitudes)
    else:
        k = max(range(1, len(row) + 1), key=lambda k: sum(ordered[:k]) / math.sqrt(k))
    share = k / len(row)
    length = math.sqrt(sum(m * m for m in magnitudes))
    return {
        "ones": share,
        "entropy": -sum(p * math.log2(p) for p in (share, 1 - share) if p),
        "cosine": sum(ordered[:k]) / (math.sqrt(k) * length),
        "threshold": ordered[k - 1],
    }


@pytest.mark.parametrize("selection", ["half", "analytic"])
@pytest.mark.parametrize("size", [3, 9, 10, 63, 144])
def test_bits_against_the_definitions(selection: Any, size: int) -> None:
    weights = rows(7, size, seed=size)
    found = layer_statistics("layer", weights, "half").bits[selection]
    expected = [slow(row, selection) for row in weights.tolist()]
    for name in ("ones", "entropy", "cosine", "threshold"):
        values, spread = [filter_[name] for filter_ in expected], getattr(found, name)
        assert spread.mean == pytest.approx(sum(values) / len(values), abs=1e-5), name
        assert (spread.low, spread.high) == pytest.approx(np.quantile(values, [0.25, 0.75]), abs=1e-5), name


def test_no_choice_of_bits_agrees_better_than_the_analytic_one() -> None:
    weights = rows(1, 10)
    magnitudes = ((weights - weights.mean()) / weights.std()).abs()[0].double()
    every = torch.tensor([[bool(code >> bit & 1) for bit in range(10)] for code in range(1, 1024)]).double()
    best = (every @ magnitudes / every.norm(dim=1) / magnitudes.norm()).max()
    assert layer_statistics("layer", weights, "half").bits["analytic"].cosine.mean == pytest.approx(
        float(best), abs=1e-4
    )


def test_entropy_of_known_shares() -> None:
    found = entropy(np.array([0.0, 0.25, 0.5, 1.0]))
    assert found == pytest.approx([0.0, 0.8112781, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "share", "carried"),
    [("Laplacian", 1 / math.e, 0.949), ("Gaussian", 0.541, 0.995), ("uniform", 2 / 3, 0.918)],
)
def test_three_distributions_are_told_apart_and_have_the_papers_shares(name: str, share: float, carried: float) -> None:
    torch.manual_seed(0)
    weights = {
        "Laplacian": torch.distributions.Laplace(0.3, 0.02).sample((64, 4608)),
        "Gaussian": torch.randn(64, 4608) * 0.02,
        "uniform": torch.rand(64, 4608) - 0.2,
    }[name]
    found = layer_statistics("layer", weights, "half")
    assert found.shape == name
    assert found.bits["analytic"].ones.mean == pytest.approx(share, abs=0.005)
    assert found.bits["analytic"].entropy.mean == pytest.approx(carried, abs=0.005)
    assert found.bits["half"].ones.mean == 0.5


def test_the_laplacian_is_the_most_likely_of_all() -> None:
    weights = rows(5, 201)
    found = layer_statistics("layer", weights, "half")
    z = ((weights - weights.mean(dim=1, keepdim=True)) / weights.std(dim=1, keepdim=True)).flatten().tolist()

    def likelihood(location: float, scale: float) -> float:
        return sum(-abs(value - location) / scale - math.log(2 * scale) for value in z)

    location, scale = found.laplace
    best = likelihood(location, scale)
    grid = [(location + a, scale + b) for a in (-0.1, -0.02, 0.02, 0.1) for b in (-0.1, -0.02, 0.0, 0.02, 0.1)]
    assert all(likelihood(*point) < best for point in grid)
    assert found.laplacian() == pytest.approx(
        [math.exp(-abs(x - location) / scale) / (2 * scale) for x in found.histogram.centres]
    )


def test_the_curve_is_the_density_of_the_shape_that_is_named() -> None:
    torch.manual_seed(0)
    half_width = math.sqrt(3)
    drawn: dict[str, tuple[Tensor, Callable[[float], float]]] = {
        "Laplacian": (torch.distributions.Laplace(0.0, 1.0).sample((64, 4608)),
                      lambda x: math.exp(-abs(x) * math.sqrt(2)) / math.sqrt(2)),
        "Gaussian": (torch.randn(64, 4608), lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
        "uniform": (torch.rand(64, 4608), lambda x: 1 / (2 * half_width) if abs(x) < 1.7 else -1.0),
    }  # fmt: skip
    for name, (weights, density) in drawn.items():
        found = layer_statistics("layer", weights, "half")
        curve = found.nearest_density()
        assert found.shape == name
        assert curve is not None
        pairs = [(y, density(float(x))) for x, y in zip(found.histogram.centres, curve, strict=True)]
        assert all(y == pytest.approx(expected, abs=0.01) for y, expected in pairs if expected >= 0), name
    two = torch.randn(64, 4608).sign() + 0.01 * torch.randn(64, 4608)
    found = layer_statistics("layer", two, "half")
    assert (found.shape, found.nearest_density()) == ("none of them", None)


def test_distances_against_both_sides_of_every_step() -> None:
    values = np.sort(rows(1, 300).double().numpy()[0])
    location, scale = float(np.median(values)), float(np.abs(values - np.median(values)).mean())
    gap = 0.0
    for index, value in enumerate(values):
        expected = float(stats.laplace.cdf(value, location, scale))
        gap = max(gap, abs(expected - index / 300), abs(expected - (index + 1) / 300))
    shapes = fitted_shapes(*fit(values))
    assert shape_distances(values, shapes)["Laplacian"] == pytest.approx(gap)


def test_histogram_counts_what_lies_in_its_bins() -> None:
    z = torch.randn(5000, generator=torch.Generator().manual_seed(1)).numpy()
    found = histogram(z)
    width = found.centres[1] - found.centres[0]
    assert len(found.centres) == BINS
    assert found.centres[BINS // 2] == pytest.approx(0, abs=1e-12)
    counts = [sum(centre - width / 2 <= value < centre + width / 2 for value in z) for centre in found.centres]
    assert found.density * 5000 * width == pytest.approx(counts, abs=1.01)  # a value may lie on an edge
    assert (found.density * width).sum() == pytest.approx(DRAWN, abs=1e-3)


@pytest.mark.parametrize("weights", [torch.zeros(3, 9), torch.ones(2, 4), torch.tensor([[5.0]])])
def test_constant_filters_have_figures_that_are_numbers(weights: Tensor) -> None:
    found = layer_statistics("layer", weights, "half")
    for bits in found.bits.values():
        for spread in vars(bits).values():
            assert all(math.isfinite(value) for value in vars(spread).values())
    curve = found.nearest_density()
    assert curve is None or np.isfinite(curve).all()
    assert np.isfinite(found.histogram.density).all()


def test_bits_are_those_of_the_layer() -> None:
    layer = SiMaNConv2d(6, 5, 3, selection="analytic")
    (found,) = model_statistics(torch.nn.Sequential(layer))
    assert (found.name, found.filters, found.size, found.used) == ("0", 5, 54, "analytic")
    assert found.bits["analytic"].ones.mean == pytest.approx(float(layer.bits().double().mean()))


def test_layers_of_full_precision_weights_have_none() -> None:
    assert list(model_statistics(torch.nn.Sequential(SiMaNConv2d(4, 4, 3, binarizes="activations")))) == []


def test_bit_statistics_of_no_ones() -> None:
    found = bit_statistics(torch.ones(2, 6), "half")  # all tied with the median
    assert (found.ones.mean, found.entropy.mean, found.cosine.mean, found.threshold.mean) == (0.0, 0.0, 0.0, 1.0)
