"""What the latent weights of a binary layer look like, and what their bits are worth.

All are taken filter by filter on standardised weights z (see `binarize`), in which filters of all scales look alike, and then put
together for the layer. `half` and `analytic` are always both there: what the layer does not use is what it could.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn

from siman_convert.binarize import Selection, select_bits, standardize
from siman_convert.surgery import binary_layers

BINS = 61  # odd: one bin is centred on 0
DRAWN = 0.999  # share of the weights that the histogram's range holds
SAMPLE = 100_000  # weights of a layer that its shape is judged by
COMPARED: tuple[Selection, ...] = ("half", "analytic")
SHAPES = ("Laplacian", "Gaussian", "uniform")
FAR = 0.1  # a gap between distributions that makes them different in kind
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A figure that every filter of a layer has: mean, first and third quartile over the filters."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        low, high = np.quantile(values, (0.25, 0.75))
        return cls(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class BitStatistics:
    """What one way of choosing bits makes of a layer.

    ones: share of a filter's bits that are 1, for `analytic` k*/n. entropy: bits of information a bit of that filter
    carries, 0 to 1.
    cosine: between |z| and the bits in {0, 1}. threshold: smallest |z| with bit 1, in standard deviations of the filter.
    """

    ones: Spread
    entropy: Spread
    cosine: Spread
    threshold: Spread


@dataclass(frozen=True)
class Histogram:
    """Densities of z over equal bins: `centres` (BINS,), `density` (BINS,), which sums to DRAWN over the bins' width."""

    centres: Floats
    density: Floats


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of `filters` filters with `size` weights each. used: how its bits are chosen in this network.

    laplace: location and scale of the Laplacian that fits z best (maximum likelihood). moments: mean and standard deviation of z.
    distances: largest gap between the cumulative distribution of z and that of each of SHAPES fitted to it
    (Kolmogorov-Smirnov), 0 to 1.
    """

    name: str
    filters: int
    size: int
    used: Selection
    histogram: Histogram
    laplace: tuple[float, float]
    moments: tuple[float, float]
    distances: dict[str, float]
    bits: dict[Selection, BitStatistics]

    @property
    def shape(self) -> str:
        """The nearest of SHAPES, or "none of them" where all are FAR."""
        nearest = min(SHAPES, key=lambda name: self.distances[name])
        return nearest if self.distances[nearest] < FAR else "none of them"

    def laplacian(self) -> Floats:
        """The density of the fitted Laplacian at the histogram's centres."""
        return np.asarray(stats.laplace.pdf(self.histogram.centres, *self.laplace), dtype=np.float64)

    def nearest_density(self) -> Floats | None:
        """The density of `shape`, as it was fitted, at the histogram's centres; None where it is none of them."""
        shape = fitted_shapes(self.laplace, self.moments).get(self.shape)
        return None if shape is None else np.asarray(shape.pdf(self.histogram.centres), dtype=np.float64)


def model_statistics(model: nn.Module) -> Iterator[LayerStatistics]:
    """The statistics of every layer of a model whose weights are binary, in the model's order."""
    for name, layer in binary_layers(model).items():
        if layer.binarizes != "activations":
            yield layer_statistics(name, layer.weight.detach().flatten(1), layer.selection)


def layer_statistics(name: str, rows: Tensor, used: Selection) -> LayerStatistics:
    """The statistics of latent weights (C_out, n)."""
    z, _ = standardize(rows.float().cpu())
    sample = _sample(z)
    laplace, moments = fit(sample)
    return LayerStatistics(
        name=name,
        filters=z.shape[0],
        size=z.shape[1],
        used=used,
        histogram=histogram(z.numpy().ravel()),
        laplace=laplace,
        moments=moments,
        distances=shape_distances(sample, fitted_shapes(laplace, moments)),
        bits={selection: bit_statistics(z, selection) for selection in COMPARED},
    )


def bit_statistics(z: Tensor, selection: Selection) -> BitStatistics:
    """What the bits that `selection` gives standardised weights (C_out, n) are worth."""
    bits, magnitudes = select_bits(z, selection), z.abs()
    ones = bits.double().mean(dim=1).numpy()
    thresholds = torch.where(bits, magnitudes, torch.inf).amin(dim=1)
    return BitStatistics(
        ones=Spread.of(ones),
        entropy=Spread.of(entropy(ones)),
        cosine=Spread.of(torch.cosine_similarity(magnitudes.double(), bits.double(), dim=1).numpy()),
        threshold=Spread.of(thresholds.where(bits.any(dim=1), magnitudes.amax(dim=1)).double().numpy()),
    )


def entropy(share: Floats) -> Floats:
    """Bits of information in a bit that is 1 with probability `share`: -p log2 p - (1 - p) log2 (1 - p)."""
    found: Floats = stats.entropy(np.stack([share, 1 - share]), base=2, axis=0)
    return found


def histogram(z: npt.NDArray[np.float32]) -> Histogram:
    """Over a symmetric range that holds DRAWN of the values; what lies outside is counted in no bin."""
    reach = max(1.0, float(np.quantile(np.abs(z), DRAWN)))
    counts, edges = np.histogram(z, bins=BINS, range=(-reach, reach))
    return Histogram((edges[:-1] + edges[1:]) / 2, counts / (z.size * (edges[1] - edges[0])))


def fit(values: Floats) -> tuple[tuple[float, float], tuple[float, float]]:
    """Location and scale of the most likely Laplacian, mean and standard deviation."""
    location, scale = stats.laplace.fit(values)
    laplace = float(location), max(float(scale), 1e-6)
    return laplace, (float(values.mean()), max(float(values.std()), 1e-6))


def fitted_shapes(laplace: tuple[float, float], moments: tuple[float, float]) -> dict[str, Any]:
    """SHAPES with these parameters, as scipy's distributions.

    Laplacian and Gaussian by maximum likelihood; the uniform by mean and variance, as its likelihood sees the extremes only.
    """
    mean, deviation = moments
    half_width = np.sqrt(3) * deviation
    fitted = stats.laplace(*laplace), stats.norm(mean, deviation), stats.uniform(mean - half_width, 2 * half_width)
    return dict(zip(SHAPES, fitted, strict=True))


def shape_distances(values: Floats, shapes: Mapping[str, Any]) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of values to distributions."""
    return {name: float(stats.ks_1samp(values, shape.cdf, method="asymp").statistic) for name, shape in shapes.items()}


def _sample(z: Tensor) -> Floats:
    """At most about SAMPLE of the values, evenly spread over filters and taps."""
    values = z.flatten()
    step = max(1, values.numel() // SAMPLE) | 1  # odd: a kernel's taps, or channels, are not left out for good
    return values[::step].double().numpy()
