"""SiMaNConv2d: an nn.Conv2d whose forward uses one-bit weights and one-bit activations.

    y = alpha * conv(sign(x - mean(x)), 2b - 1) + bias        mean over (C, H, W) of each sample; zero padding after the sign

Weights are binarized by magnitude, not by sign (see `binarize`), so `weight` holds latent full-precision values that only
training needs. Nothing here decides when to clip, anneal or decay: that is the trainer's.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from siman_convert import binarize
from siman_convert.binarize import Selection
from siman_convert.errors import InputError

Init = Literal["remap", "copy", "scratch"]
INITS: tuple[Init, ...] = get_args(Init)


class Geometry(NamedTuple):
    """Where the taps of a convolution lie: (vertical, horizontal) pairs; `pads` are (left, right, top, bottom) as F.pad's."""

    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """The geometry of a convolution; its padding may be "same" or "valid"."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    stride, dilation = cast("tuple[int, int]", conv.stride), cast("tuple[int, int]", conv.dilation)
    return Geometry(stride, (left, right, top, bottom), dilation, conv.groups)


class SiMaNConv2d(nn.Conv2d):
    """A binary convolution trained by SiMaN. Takes `nn.Conv2d`'s arguments, zero padding only.

    Parameters: `weight` (C_out, C_in/groups, kH, kW), the latent weights; `alpha` (C_out,), one learned scale per output
    channel; `bias` (C_out,) or None, added after alpha. `selection` is how weights become bits: by magnitude (`half`,
    `analytic`) or, to compare with, by `sign`. Without `center` the threshold is 0 in place of the mean.

    Training: threshold and statistics in float32 (float64 for float64 input) whatever autocast says.
    Eval: the threshold is the float64 mean rounded to float32, as in every runtime, and the integer convolution is exact.
    """

    def __init__(self, *args: Any, selection: Selection = "half", center: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise InputError(f"SiMaNConv2d pads with zeros only, got padding_mode={self.padding_mode!r}")
        if selection not in binarize.SELECTIONS:
            raise InputError(f"unknown bit selection {selection!r}; known: {', '.join(binarize.SELECTIONS)}")
        self.selection: Selection = selection
        self.center = center
        self.alpha = nn.Parameter(self._rows().detach().abs().mean(dim=1).to(self.weight.dtype))

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        init: Init = "remap",
        selection: Selection = "half",
        generator: torch.Generator | None = None,
        center: bool = True,
    ) -> "SiMaNConv2d":
        """A binary layer in place of `conv`; same shape, device, dtype, bias, training flag and requires_grad.

        `remap` gives latents whose bits follow the pretrained weights: of magnitudes by `binarize.remap_rows`, of signs the
        weights themselves; alpha is the weights' projection on the bits. `copy` takes the weights as they are, which loses
        their signs to magnitudes, and `scratch` draws new ones from `generator` (torch's own when None); alpha = mean|w|.
        """
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            raise InputError(
                f"SiMaNConv2d replaces an nn.Conv2d, not a {type(conv).__name__}, which convolves in its own way"
            )
        if init not in INITS:
            raise InputError(f"unknown initialisation {init!r}; known: {', '.join(INITS)}")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, int]", conv.kernel_size),
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            selection=selection,
            center=center,
        )
        rows = conv.weight.detach().flatten(1)
        with torch.no_grad():
            latents = _latents(rows, init, selection, generator)
            layer.weight.copy_(latents.view_as(layer.weight))
            bits = layer.bits().flatten(1)
            layer.alpha.copy_(binarize.projection_scale(rows, bits) if init == "remap" else latents.abs().mean(dim=1))
            if conv.bias is not None:
                cast(Tensor, layer.bias).copy_(conv.bias)
        layer.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    @torch.no_grad()
    def clip_weights_(self, percent: float) -> None:
        """Clip the latent weights by magnitude percentiles, in place (`binarize.clip_magnitudes`); once per optimizer step.

        Bits by `sign` are left alone: raising small magnitudes moves a weight away from the zero that it has to cross for its
        bit to flip, where for bits by magnitude the clip brings weights nearer to the median.
        """
        if self.selection == "sign":
            return
        self.weight.copy_(binarize.clip_magnitudes(self._rows(), percent).view_as(self.weight))

    @torch.no_grad()
    def bits(self) -> Tensor:
        """The bits of the current weights, bool (C_out, C_in/groups, kH, kW); True stands for +1."""
        z, _ = binarize.standardize(self._rows())
        return binarize.select_bits(z, self.selection).view_as(self.weight)

    @torch.no_grad()
    def unscaled(self, x: Tensor) -> Tensor:
        """The integer convolution of eval mode, before alpha and bias: (N, C_in, H, W) -> (N, C_out, H', W')."""
        bw = self.bits().to(x.dtype).mul_(2).sub_(1)
        ones = x.new_ones(self.out_channels)
        y: Tensor = BinaryConv.apply(x, self._threshold(x, exact_mean), bw, ones, geometry_of(self), True, self.center)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), in x's dtype, or autocast's."""
        threshold = self._threshold(x, batch_mean if self.training else exact_mean)
        bw = BinarizeWeight.apply(self._rows(), self.selection).view_as(self.weight)
        y: Tensor = BinaryConv.apply(x, threshold, bw, self.alpha, geometry_of(self), not self.training, self.center)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{base}, selection={self.selection}, center={self.center}"

    def _threshold(self, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        return mean(x) if self.center else x.new_zeros(1, 1, 1, 1, dtype=_statistics_dtype(x))

    def _rows(self) -> Tensor:
        rows = self.weight.flatten(1)
        return rows if rows.dtype == torch.float64 else rows.float()


def _latents(rows: Tensor, init: Init, selection: Selection, generator: torch.Generator | None) -> Tensor:
    """The latent weights (C_out, n) that a layer in place of pretrained `rows` starts with."""
    if init == "scratch":
        return binarize.scratch_rows(rows.shape, generator)
    return binarize.remap_rows(rows) if init == "remap" and selection != "sign" else rows


class BinarizeWeight(torch.autograd.Function):
    """w (C_out, n) -> 2b - 1, straight through to |z| (`sign`: to z), then through the standardisation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection) -> Tensor:
        z, rstd = binarize.standardize(rows)
        ctx.save_for_backward(z, rstd)
        ctx.selection = selection
        return binarize.select_bits(z, selection).to(rows.dtype).mul_(2).sub_(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bw: Tensor) -> tuple[Tensor, None]:
        z, rstd = ctx.saved_tensors
        return binarize.standardize_backward(binarize.select_backward(grad_bw, z, ctx.selection), z, rstd), None


class BinaryConv(torch.autograd.Function):
    """y = alpha * conv(sign(x - threshold), bw), with the surrogate gradient max(0, 2 - 2|a|) of a = (x - mean) / std.

    Saves x (which a full-precision convolution saves too), no intermediate: signs and statistics are computed again.
    The convolution's output is not needed either, since dL/dalpha_k = sum g*o = <dL/d(unscaled weight)_k, bw_k>.
    `exact` rounds the convolution to the integer it is, whatever algorithm computed it. `center`: the threshold is x's own mean,
    which the gradient takes into account; else it is 0 and a = x / std.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        bw: Tensor,
        alpha: Tensor,
        geometry: Geometry,
        exact: bool,
        center: bool,
    ) -> Tensor:
        dtype = _compute_dtype(x)
        ctx.save_for_backward(x, threshold, bw, alpha)
        ctx.geometry, ctx.compute_dtype, ctx.center = geometry, dtype, center
        signs, pads = pad_signs(signs_of(x, threshold, dtype), geometry.pads)
        y = F.conv2d(signs, bw.to(dtype), None, geometry.stride, pads, geometry.dilation, geometry.groups)
        if exact:
            y = y.round_()
        return y.mul_(alpha.to(dtype).view(-1, 1, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None, None]:
        x, threshold, bw, alpha = ctx.saved_tensors
        geometry, dtype = ctx.geometry, ctx.compute_dtype
        signs, pads = pad_signs(signs_of(x, threshold, dtype), geometry.pads)
        # The input's gradient wants the scaled weight, the weight's gradient the unscaled output gradient: one call does both.
        scaled = (bw * alpha.to(bw.dtype).view(-1, 1, 1, 1)).to(dtype)
        grad_signs, grad_unscaled, _ = torch.ops.aten.convolution_backward(
            grad_y.to(dtype), signs, scaled, None, geometry.stride, pads, geometry.dilation, False, [0, 0],
            geometry.groups, [ctx.needs_input_grad[0], True, False],
        )  # fmt: skip
        grad_unscaled = grad_unscaled.to(bw.dtype)
        grad_alpha = (grad_unscaled * bw).sum(dim=(1, 2, 3)).to(alpha.dtype)
        grad_bw = grad_unscaled.mul_(alpha.to(bw.dtype).view(-1, 1, 1, 1))
        if not ctx.needs_input_grad[0]:
            return None, None, grad_bw, grad_alpha, None, None, None
        if signs.shape != x.shape:
            left, right, top, bottom = geometry.pads
            grad_signs = F.pad(grad_signs, (-left, -right, -top, -bottom))
        grad_x = sign_backward(grad_signs, x, threshold) if ctx.center else static_sign_backward(grad_signs, x)
        return grad_x, None, grad_bw, grad_alpha, None, None, None


def sign_backward(grad_signs: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """Gradient of sign(a), a = (x - mean) / std per sample over (C, H, W), with d sign(a)/da := max(0, 2 - 2|a|).

    With p = grad_signs * max(0, 2 - 2|a|):  dL/dx = (p - mean(p) - a * sum(p*a) / (N - 1)) / std,  N = C*H*W.
    """
    shape = (-1, 1, 1, 1)
    centred = x.to(mean.dtype) - mean  # (N, C, H, W)
    count = centred[0].numel()
    rstd = torch.rsqrt(_inner(centred, centred) / max(1, count - 1) + binarize.EPS).view(shape)
    a = centred.mul_(rstd)
    p = a.abs().mul_(-2).add_(2).clamp_(min=0).mul_(grad_signs)
    slope = _inner(p, a).view(shape) / max(1, count - 1)
    p.sub_(p.mean(dim=(1, 2, 3), keepdim=True)).sub_(a.mul_(slope)).mul_(rstd)
    return p.to(x.dtype)


def static_sign_backward(grad_signs: Tensor, x: Tensor) -> Tensor:
    """Gradient of sign(a), a = x / std with the threshold at 0, with d sign(a)/da := max(0, 2 - 2|a|).

    std = sqrt(sum(x^2) / (N - 1) + EPS) of each sample only sets how wide the surrogate is (`sign_backward` has it alike); the
    sign does not depend on it, so it counts as a constant:  dL/dx = grad_signs * max(0, 2 - 2|a|) / std.
    """
    wide = x.to(_statistics_dtype(x))  # (N, C, H, W)
    rstd = torch.rsqrt(_inner(wide, wide) / max(1, x[0].numel() - 1) + binarize.EPS).view(-1, 1, 1, 1)
    p = (wide * rstd).abs_().mul_(-2).add_(2).clamp_(min=0).mul_(grad_signs)
    return p.mul_(rstd).to(x.dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample's elements, (N,). einsum's float32 sum was 500 times less accurate here, and slower."""
    if a.is_contiguous(memory_format=torch.channels_last):  # flatten views of the memory, where it can
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    products: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products


def signs_of(x: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where x >= threshold, else -1 (for NaN too). Comparing straight into `dtype` saves a pass over a bool tensor."""
    return torch.ge(x, threshold, out=torch.empty_like(x, dtype=dtype)).mul_(2).sub_(1)


def pad_signs(signs: Tensor, pads: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The signs and the padding a convolution has to add; unequal padding (of `same`) is written out as zeros."""
    left, right, top, bottom = pads
    if left == right and top == bottom:
        return signs, (top, left)
    return F.pad(signs, pads), (0, 0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type  # "meta" knows no autocast
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else x.dtype


def batch_mean(x: Tensor) -> Tensor:
    """Mean of each sample, (N, 1, 1, 1), in float32 (float64 for float64 input)."""
    return x.mean(dim=(1, 2, 3), keepdim=True, dtype=_statistics_dtype(x))


def exact_mean(x: Tensor) -> Tensor:
    """Mean of each sample taken in float64 and rounded to float32 (not rounded for float64 input), (N, 1, 1, 1).

    Sample by sample: a float64 copy of the whole batch costs 50 times more, and a sample's mean must not depend on
    the batch around it.
    """
    means = [sample.mean(dtype=torch.float64) for sample in x]
    stacked = torch.stack(means) if means else x.new_empty(0, dtype=torch.float64)
    return stacked.to(_statistics_dtype(x)).view(-1, 1, 1, 1)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
