"""The mathematics of SiMaN (Sign-to-Magnitude Network Binarization, arXiv 2102.07981), as pure functions of tensors.

Symbols, for one filter (one output channel) of n = C_in/groups * kH * kW elements:

    w   latent weight, what the optimizer updates
    z   standardised weight, (w - mean(w)) / sqrt(var(w) + EPS), var unbiased (divided by n - 1)
    b   bit of a weight, 1 for a high magnitude |z|, 0 for a low one; the convolution uses 2b - 1 in {-1, +1}

Weights are passed as matrices `(C_out, n)`, one filter a row. Nothing here reads a value back to the host, so every function
also runs on the meta device; a test holds that.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

EPS = 1e-5  # added to a variance inside the square root, for weights and for activations

Selection = Literal["half", "analytic"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)


def standardize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return z (C_out, n) and 1/std (C_out, 1) of each filter (paper, Sec. 3.3).

    A filter of one element has no unbiased variance; its variance counts as 0.
    """
    var, mean = torch.var_mean(rows, dim=1, correction=min(1, rows.shape[1] - 1), keepdim=True)
    rstd = torch.rsqrt(var + EPS)
    return (rows - mean) * rstd, rstd


def standardize_backward(grad_z: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """Gradient through `standardize`: dL/dw = (g - mean(g) - z * sum(g*z) / (n - 1)) / std, per filter."""
    correction = (grad_z * z).sum(dim=1, keepdim=True) / max(1, z.shape[1] - 1)
    return (grad_z - grad_z.mean(dim=1, keepdim=True) - z * correction) * rstd


def half_bits(magnitudes: Tensor) -> Tensor:
    """Bits (C_out, n) of the high-magnitude half: 1 where |z| exceeds the filter's lower median (paper, Eq. 13).

    The comparison is strict: elements tied with the median are all 0, so ties leave fewer than floor(n/2) ones.
    """
    return magnitudes > magnitudes.median(dim=1, keepdim=True).values  # torch's median is the lower one


def analytic_bits(magnitudes: Tensor) -> Tensor:
    """Bits (C_out, n) that maximise cos(b, |z|) over b in {0, 1}^n: the k* largest are 1 (paper, Theorem 1).

    k* = argmax_k sum_{i<=k} |z|_(i) / sqrt(k) with |z| sorted in descending order; O(n log n).
    """
    values, order = magnitudes.sort(dim=1, descending=True, stable=True)
    k = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
    best = (values.cumsum(dim=1) / k.sqrt()).argmax(dim=1, keepdim=True)
    ranks = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ranks <= best)


BITS: dict[Selection, Callable[[Tensor], Tensor]] = {"half": half_bits, "analytic": analytic_bits}


def clip_magnitudes(rows: Tensor, percent: float) -> Tensor:
    """Centre each filter, then clamp all magnitudes of the layer into [P_percent, P_(100-percent)], keeping signs.

    Small magnitudes are raised, large ones lowered (paper, Sec. 3.4, as the authors' implementation does it: centred per
    filter, percentiles over the whole layer, linear interpolation). `percent` is in [0, 50); at 0 only the centring remains.
    """
    if not 0 <= percent < 50:
        raise ValueError(f"percent must be in [0, 50), got {percent}")
    centred = rows - rows.mean(dim=1, keepdim=True)
    magnitudes = centred.abs()
    low, high = percentiles(magnitudes.flatten(), (percent, 100 - percent))
    return centred.sign() * magnitudes.clamp(low, high)


def percentiles(values: Tensor, percents: tuple[float, ...]) -> list[Tensor]:
    """0-dim percentiles of a vector of any length, linearly interpolated as numpy's default does.

    `torch.quantile` refuses more than 16 million elements and sorts. On a CPU selection is 5 times faster than a sort (2.4 M
    elements); on an accelerator `kthvalue` runs on one block, and the sort is faster.
    """
    if values.device.type == "cpu":
        return [_percentile_by_selection(values, percent) for percent in percents]
    ordered = values.sort().values
    return [_interpolate(ordered[low], ordered[high], part) for low, high, part in _ranks(values.numel(), percents)]


def _ranks(count: int, percents: tuple[float, ...]) -> list[tuple[int, int, float]]:
    """The two 0-based ranks around each percentile, and how far it lies between them."""
    positions = [percent / 100 * (count - 1) for percent in percents]
    return [(math.floor(p), min(math.floor(p) + 1, count - 1), p - math.floor(p)) for p in positions]


def _percentile_by_selection(values: Tensor, percent: float) -> Tensor:
    ((low, high, part),) = _ranks(values.numel(), (percent,))
    below = values.kthvalue(low + 1).values
    if part == 0 or low == high:
        return below
    # The next order statistic is `below` itself where it occurs again beyond rank `low`, else the least larger value.
    larger = values.masked_fill(values <= below, math.inf).amin()
    above = torch.where((values <= below).sum() > high, below, larger)
    return _interpolate(below, above, part)


def _interpolate(below: Tensor, above: Tensor, part: float) -> Tensor:
    return below + part * (above - below)


def remap_rows(rows: Tensor) -> Tensor:
    """Latent weights (C_out, n) whose SiMaN bits are [w > lower median(w)], for pretrained weights `rows`.

    SiMaN reads a bit off the magnitude alone, so copying pretrained weights discards their signs. Here the magnitude of a
    latent follows the rank of its weight within the filter (the most negative weight gets the smallest magnitude, the most
    positive the largest; half-normal quantiles), which keeps cos(w, 2b - 1) at about 0.79 for Gaussian weights. One scale
    for the whole layer, the root mean square of its centred weights: the clip compares magnitudes across filters.
    """
    count = rows.shape[1]
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    scale = centred.square().mean().sqrt().clamp_min(EPS)  # a layer of constant filters keeps distinct latents
    return _signed_quantiles(count).to(rows)[ranks] * scale


def _signed_quantiles(count: int) -> Tensor:
    """Half-normal quantiles (count,) in ascending magnitude, with signs that alternate so that their mean is almost 0.

    A mean comparable with the gap between neighbouring magnitudes would reorder them when the filter is centred, and with
    them the bits around the median; plain alternation leaves such a mean (half the largest quantile over n). Choosing each
    sign against the running sum, from the largest magnitude down, leaves at most the smallest magnitude over n.
    """
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    magnitudes: list[float] = (math.sqrt(2) * torch.erfinv(middles)).tolist()
    total = 0.0
    for i in reversed(range(count)):
        if total > 0:
            magnitudes[i] = -magnitudes[i]
        total += magnitudes[i]
    return torch.tensor(magnitudes, dtype=torch.float64)


def projection_scale(rows: Tensor, bits: Tensor) -> Tensor:
    """The scale (C_out,) that brings the +-1 weights nearest to `rows` in least squares: <w, 2b - 1> / n per filter."""
    return torch.where(bits, rows, -rows).mean(dim=1)


def clip_percent(epoch: int, epochs: int, start: float = 15.0) -> float:
    """The clip of an epoch, in percent: start * (1 - epoch/epochs), falling linearly (paper, Sec. 3.4; the authors' 15)."""
    return start * (1.0 - epoch / epochs)
