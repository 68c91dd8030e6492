"""The mathematics of SiMaN (Sign-to-Magnitude Network Binarization, arXiv 2102.07981), as functions of tensors.

`clip_magnitudes_` changes its argument; the others are pure.

Symbols, for one filter (one output channel) of n = C_in/groups * kH * kW elements:

    w   latent weight, what the optimizer updates
    z   standardised weight, (w - mean(w)) / sqrt(var(w) + EPS), var unbiased (divided by n - 1)
    b   bit of a weight, 1 for a high magnitude |z|, 0 for a low one; the convolution uses 2b - 1 in {-1, +1}

`sign`, the bits of most other binary networks, is here for comparison: b = [z >= 0].

Weights are passed as matrices `(C_out, n)`, one filter a row. Nothing here reads a value back to the host, so every function
also runs on the meta device; a test holds that.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from siman_convert import training_kernels
from siman_convert.pieces import pieces

EPS = 1e-5  # added to a variance inside the square root, for weights and for activations

Selection = Literal["half", "analytic", "sign"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)


def standardize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return z (C_out, n) and 1/std (C_out, 1) of each filter.

    A filter of one element has no unbiased variance; its variance counts as 0. Two passes, not `var_mean`: 3 times faster.
    """
    centred = rows - rows.mean(dim=1, keepdim=True)
    squares = torch.linalg.vecdot(centred, centred).unsqueeze(1)
    rstd = torch.rsqrt(squares / max(1, rows.shape[1] - 1) + EPS)
    return centred * rstd, rstd


def standardize_backward(grad_z: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """Gradient through `standardize`: dL/dw = (g - mean(g) - z * sum(g*z) / (n - 1)) / std, per filter."""
    slope = torch.linalg.vecdot(grad_z, z).unsqueeze(1) / max(1, z.shape[1] - 1)
    return grad_z.addcmul(z, slope, value=-1).sub_(grad_z.mean(dim=1, keepdim=True)).mul_(rstd)


def binary_rows(rows: Tensor, selection: Selection) -> Tensor:
    """The weights 2b - 1 (C_out, n) that latent weights stand for, in their dtype."""
    if selection == "half" and training_kernels.are_for(rows):
        return training_kernels.binarize(rows)
    bw = torch.empty_like(rows)
    for out, latents in pieces(bw, rows):
        z, _ = standardize(latents)
        out.copy_(select_bits(z, selection)).mul_(2).sub_(1)
    return bw


def binary_rows_backward(grad_bw: Tensor, rows: Tensor, selection: Selection) -> Tensor:
    """Gradient (C_out, n) of the latent weights from that of `binary_rows`."""
    if selection in MAGNITUDE_BITS and training_kernels.are_for(grad_bw, rows):
        return training_kernels.binarize_backward(grad_bw, rows)
    grad = torch.empty_like(rows)
    for out, grads, latents in pieces(grad, grad_bw, rows):
        z, rstd = standardize(latents)
        out.copy_(standardize_backward(select_backward(grads, z, selection), z, rstd))
    return grad


def half_bits(magnitudes: Tensor) -> Tensor:
    """Bits (C_out, n) of the high-magnitude half: 1 where |z| exceeds the filter's lower median.

    The comparison is strict: elements tied with the median are all 0, so ties leave fewer than floor(n/2) ones.

    >>> half_bits(torch.tensor([[0.1, 2.0, 0.3, 1.5]]))
    tensor([[False,  True, False,  True]])
    """
    return magnitudes > lower_medians(magnitudes)


def lower_medians(rows: Tensor) -> Tensor:
    """The lower median of each row, (C_out, 1). On a CPU numpy's selection is 6 times faster than torch's."""
    if _in_numpy(rows):
        middle = (rows.shape[1] - 1) // 2
        return torch.from_numpy(np.partition(rows.detach().numpy(), middle, axis=1)[:, middle : middle + 1])
    return rows.median(dim=1, keepdim=True).values  # torch's median is the lower one


def _in_numpy(values: Tensor) -> bool:
    """Whether numpy can read the values where they are, and knows their type."""
    known = values.dtype in (torch.float32, torch.float64)
    return known and values.device.type == "cpu" and not torch.compiler.is_compiling()


def analytic_bits(magnitudes: Tensor) -> Tensor:
    """Bits (C_out, n) that maximise cos(b, |z|) over b in {0, 1}^n: the k* largest are 1 (the paper's closed form).

    k* = argmax_k sum_{i<=k} |z|_(i) / sqrt(k) with |z| sorted in descending order; O(n log n).

    >>> analytic_bits(torch.tensor([[0.1, 2.0, 0.3, 0.2]]))  # sums over sqrt(k): 2.00, 1.63, 1.44, 1.30
    tensor([[False,  True, False, False]])
    """
    values, order = magnitudes.sort(dim=1, descending=True, stable=True)
    k = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
    best = (values.cumsum(dim=1) / k.sqrt()).argmax(dim=1, keepdim=True)
    ranks = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ranks <= best)


MAGNITUDE_BITS: dict[Selection, Callable[[Tensor], Tensor]] = {"half": half_bits, "analytic": analytic_bits}


def select_bits(z: Tensor, selection: Selection) -> Tensor:
    """Bits (C_out, n) of standardised weights; `sign` (XNOR-Net, IR-Net) takes [z >= 0] instead of magnitudes."""
    return z >= 0 if selection == "sign" else MAGNITUDE_BITS[selection](z.abs())


def select_backward(grad_bw: Tensor, z: Tensor, selection: Selection) -> Tensor:
    """Gradient of z from that of 2b - 1, straight through: d(2b - 1)/d|z| := 1, of `sign` d(2b - 1)/dz := 1."""
    return grad_bw if selection == "sign" else grad_bw * z.sign()


@torch.no_grad()
def clip_magnitudes_(rows: Tensor, percent: float) -> None:
    """In place: centre each filter, then clamp all magnitudes of the layer into [P_percent, P_(100-percent)], keeping signs.

    Small magnitudes are raised, large ones lowered (as the authors' implementation does it: centred per
    filter, percentiles over the whole layer, linear interpolation). `percent` is in [0, 50); at 0 only the centring remains.
    """
    if not 0 <= percent < 50:
        raise ValueError(f"percent must be in [0, 50), got {percent}")
    if training_kernels.are_for(rows):
        return training_kernels.clip_(rows, percent)
    rows.sub_(rows.mean(dim=1, keepdim=True))
    low, high = percentiles(rows.abs().flatten(), (percent, 100 - percent))
    for (part,) in pieces(rows):
        magnitudes = part.abs()
        torch.maximum(magnitudes, low, out=magnitudes)
        torch.minimum(magnitudes, high, out=magnitudes)
        part.sign_().mul_(magnitudes)
    return None


def percentiles(values: Tensor, percents: tuple[float, ...]) -> list[Tensor]:
    """0-dim percentiles of a vector of any length, linearly interpolated as numpy's default does.

    `torch.quantile` refuses more than 16 million elements and sorts them. On an accelerator a sort is fast and nothing waits
    for the host; on a CPU numpy's selection is tens of times faster than torch's sort.
    """
    positions = [percent / 100 * (values.numel() - 1) for percent in percents]
    select = _select_in_numpy if _in_numpy(values) else _select_by_sorting
    around = select(values, [math.floor(position) for position in positions])
    return [
        below + (position - math.floor(position)) * (above - below)
        for position, (below, above) in zip(positions, around, strict=True)
    ]


def _select_by_sorting(values: Tensor, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The order statistics of each 0-based rank and of the next (of the same, where it is the last)."""
    ordered = values.sort().values
    return [(ordered[rank], ordered[min(rank + 1, values.numel() - 1)]) for rank in ranks]


def _select_in_numpy(values: Tensor, ranks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """As `_select_by_sorting`. One rank at a time: only then does numpy select with SIMD, ten times faster."""
    array = values.detach().numpy().copy()
    found = []
    for rank in ranks:
        array.partition(rank)
        above = array[rank + 1 :].min() if rank + 1 < array.size else array[rank]
        found.append((values.new_tensor(array[rank]), values.new_tensor(above)))
    return found


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


def scratch_rows(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Latent weights of `shape` (C_out, n) as torch's Conv2d draws its own: uniform within 1/sqrt(n). On the CPU."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


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
    """The scale (C_out,) that brings the +-1 weights nearest to `rows` in least squares: <w, 2b - 1> / n per filter.

    >>> weights = torch.tensor([[0.5, -1.0, 0.25, -0.25]])
    >>> projection_scale(weights, weights > 0)
    tensor([0.5000])
    """
    return torch.where(bits, rows, -rows).mean(dim=1)


def clip_percent(epoch: int, epochs: int, start: float = 15.0) -> float:
    """The clip of an epoch, in percent: start * (1 - epoch/epochs), falling linearly (15 in the paper).

    >>> [clip_percent(epoch, epochs=4) for epoch in range(4)]
    [15.0, 11.25, 7.5, 3.75]
    """
    return start * (1.0 - epoch / epochs)
