"""SiMaNConv2d: an nn.Conv2d whose forward uses one-bit weights and one-bit activations.

    y = alpha * conv(sign(x - mean(x)), 2b - 1) + bias        mean over (C, H, W) of each sample; zero padding after the sign

Weights are binarized by magnitude, not by sign (see `binarize`), so `weight` holds latent full-precision values that only
training needs. Nothing here decides when to clip, anneal or decay: that is the trainer's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from siman_convert import binarize, training_kernels
from siman_convert.binarize import Selection
from siman_convert.errors import InputError
from siman_convert.pieces import pieces, scaled_and_joined
from siman_convert.timm_convs import effective_weight, is_understood, pads_to_same, same_pads

Init = Literal["remap", "copy", "scratch"]
INITS: tuple[Init, ...] = get_args(Init)
Binarized = Literal["activations", "weights", "all"]
BINARIZED: tuple[Binarized, ...] = get_args(Binarized)


class Geometry(NamedTuple):
    """Where the taps of a convolution lie: (vertical, horizontal) pairs; `pads` are (left, right, top, bottom) as F.pad's."""

    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    same: bool = False  # the pads depend on the map, as TensorFlow's SAME does; `on` knows them

    def on(self, kernel_size: Sequence[int], size: Sequence[int]) -> "Geometry":
        """The geometry of a kernel (kH, kW) on a map of `size` (H, W), with its pads."""
        if not self.same:
            return self
        sides = zip(size, kernel_size, self.stride, self.dilation, strict=True)
        (top, bottom), (left, right) = (same_pads(*side) for side in sides)
        return self._replace(pads=(left, right, top, bottom), same=False)


def geometry_of(conv: nn.Conv2d) -> Geometry:
    """The geometry of a convolution; its padding may be "same" or "valid", or timm's that depends on the map."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    stride, dilation = cast("tuple[int, int]", conv.stride), cast("tuple[int, int]", conv.dilation)
    return Geometry(stride, (left, right, top, bottom), dilation, conv.groups, pads_to_same(conv))


class SiMaNConv2d(nn.Conv2d):
    """A binary convolution trained by SiMaN. Takes `nn.Conv2d`'s arguments, zero padding only.

    Parameters: `weight` (C_out, C_in/groups, kH, kW), the latent weights; `alpha` (C_out,), one learned scale per output
    channel; `bias` (C_out,) or None, added after alpha. `selection` is how weights become bits: by magnitude (`half`,
    `analytic`) or, to compare with, by `sign`. Without `center` the threshold is 0 in place of the mean. `same_pad`: pads as
    much as the map needs, as timm's Conv2dSame does. `binarizes` is what is binary: in a stage of training it may be the
    activations or the weights alone, with the same parameters; latent weights are then, or activations are, taken as they are.

    Training: threshold and statistics in float32 (float64 for float64 input) whatever autocast says.
    Eval: the threshold is the float64 mean rounded to float32, as in every runtime, and the integer convolution is exact.

    >>> layer = SiMaNConv2d.from_float(nn.Conv2d(8, 16, 3, padding=1, bias=False))
    >>> layer(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    >>> layer.bits().shape, layer.bits().dtype, int(layer.bits()[0].sum())  # half of the 72 weights of a filter
    (torch.Size([16, 8, 3, 3]), torch.bool, 36)
    """

    def __init__(
        self,
        *args: Any,
        selection: Selection = "half",
        binarizes: Binarized = "all",
        center: bool = True,
        same_pad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise InputError(f"SiMaNConv2d pads with zeros only, got padding_mode={self.padding_mode!r}")
        if selection not in binarize.SELECTIONS:
            raise InputError(f"unknown bit selection {selection!r}; known: {', '.join(binarize.SELECTIONS)}")
        if binarizes not in BINARIZED:
            raise InputError(f"unknown kind of layer {binarizes!r}; known: {', '.join(BINARIZED)}")
        self.selection: Selection = selection
        self.binarizes: Binarized = binarizes
        self.center, self.same_pad = center, same_pad
        self.alpha = nn.Parameter(self._rows().detach().abs().mean(dim=1).to(self.weight.dtype))

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        init: Init = "remap",
        selection: Selection = "half",
        generator: torch.Generator | None = None,
        binarizes: Binarized = "all",
        center: bool = True,
    ) -> "SiMaNConv2d":
        """A binary layer in place of `conv`; same shape, device, dtype, bias, training flag and requires_grad.

        `remap` gives latents whose bits follow the pretrained weights: of magnitudes by `binarize.remap_rows`, of signs the
        weights themselves; alpha is the weights' projection on the bits. Of timm's weight-standardised convolutions these are the
        weights that their forward convolves with. `copy` takes the weights as they are, which loses
        their signs to magnitudes, and `scratch` draws new ones from `generator` (torch's own when None); alpha = mean|w|.
        Where activations alone become binary, `remap` is the same as `copy`, and alpha = 1.
        """
        if not isinstance(conv, nn.Conv2d) or not is_understood(conv):
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
            binarizes=binarizes,
            center=center,
            same_pad=pads_to_same(conv),
        )
        layer._start_from(effective_weight(conv).flatten(1), init, generator)
        if conv.bias is not None:
            cast(Tensor, layer.bias).data.copy_(conv.bias)
        layer.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    @torch.no_grad()
    def binarize_all_(self, init: Init = "remap") -> None:
        """Go on from a stage of binary activations, or weights, alone; binary weights keep their latents and alpha.

        Full-precision weights, alpha included, become latents as in `from_float`, whose `init` this is.
        """
        before, self.binarizes = self.binarizes, "all"
        if before == "activations":
            self._start_from(self._rows() * self.alpha.to(self._rows().dtype).unsqueeze(1), init, None)

    @torch.no_grad()
    def _start_from(self, rows: Tensor, init: Init, generator: torch.Generator | None) -> None:
        """Latents and alpha from the weights (C_out, n) of a full-precision convolution."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # squares of small weights are 0 in float16
        latents = binarize.scratch_rows(rows.shape, generator) if init == "scratch" else rows
        if self.binarizes == "activations":
            self.weight.copy_(latents.view_as(self.weight))
            self.alpha.fill_(1)
            return
        if init == "remap" and self.selection != "sign":
            latents = binarize.remap_rows(rows)
        self.weight.copy_(latents.view_as(self.weight))
        projected = init == "remap"
        self.alpha.copy_(
            binarize.projection_scale(rows, self.bits().flatten(1)) if projected else latents.abs().mean(dim=1)
        )

    @torch.no_grad()
    def clip_weights_(self, percent: float) -> None:
        """Clip the latent weights by magnitude percentiles, in place (`binarize.clip_magnitudes_`); once per optimizer step.

        Bits by `sign` are left alone: raising small magnitudes moves a weight away from the zero that it has to cross for its
        bit to flip, where for bits by magnitude the clip brings weights nearer to the median. So are weights that have no bits.
        """
        if self.selection == "sign" or self.binarizes == "activations":
            return
        rows = self._rows()
        binarize.clip_magnitudes_(rows, percent)
        if rows.data_ptr() != self.weight.data_ptr():
            self.weight.copy_(rows.view_as(self.weight))

    @torch.no_grad()
    def bits(self) -> Tensor:
        """The bits of the current weights, bool (C_out, C_in/groups, kH, kW); True stands for +1."""
        return (binarize.binary_rows(self._rows(), self.selection) > 0).view_as(self.weight)

    @torch.no_grad()
    def unscaled(self, x: Tensor) -> Tensor:
        """Eval mode's convolution, (N, C_in, H, W) -> (N, C_out, H', W'), no alpha and bias; integers if all is binary."""
        weight = self.weight if self.binarizes == "activations" else self.bits().to(x.dtype).mul_(2).sub_(1)
        return self._convolve(x, weight, x.new_ones(self.out_channels), exact=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), in x's dtype, or autocast's."""
        weight = self.weight
        if self.binarizes != "activations":
            weight = BinarizeWeight.apply(self._rows(), self.selection).view_as(self.weight)
        y = self._convolve(x, weight, self.alpha, exact=not self.training)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def _convolve(self, x: Tensor, weight: Tensor, alpha: Tensor, *, exact: bool) -> Tensor:
        """Of signs, unless weights alone are binary; `exact` as in eval mode."""
        geometry = geometry_of(self).on(self.kernel_size, x.shape[2:])
        if self.binarizes == "weights":
            y = F.conv2d(
                F.pad(x, geometry.pads),
                weight.to(x.dtype),
                None,
                geometry.stride,
                0,
                geometry.dilation,
                geometry.groups,
            )
            return y * alpha.to(y.dtype).view(-1, 1, 1)
        threshold = self._threshold(x, exact_mean if exact else batch_mean)
        integers = exact and self.binarizes == "all"
        binary: Tensor = BinaryConv.apply(x, threshold, weight, alpha, geometry, integers, self.center)
        return binary

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        same = ", same_pad=True" if self.same_pad else ""
        stage = "" if self.binarizes == "all" else f", binarizes={self.binarizes}"
        return f"{base}, selection={self.selection}, center={self.center}{same}{stage}"

    def _threshold(self, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        return mean(x) if self.center else x.new_zeros(len(x), 1, 1, 1, dtype=_statistics_dtype(x))

    def _rows(self) -> Tensor:
        rows = self.weight.flatten(1)
        return rows if rows.dtype == torch.float64 else rows.float()


class BinarizeWeight(torch.autograd.Function):
    """w (C_out, n) -> 2b - 1, straight through to |z| (`sign`: to z), then through the standardisation.

    Saves w, which is there anyway; z is computed again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.selection = selection
        return binarize.binary_rows(rows, selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bw: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return binarize.binary_rows_backward(grad_bw, rows, ctx.selection), None


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
        ctx.save_for_backward(x, threshold, bw, alpha)
        ctx.geometry, ctx.compute_dtype, ctx.center = geometry, _compute_dtype(x), center
        weight, scale = bw.to(ctx.compute_dtype), alpha.to(ctx.compute_dtype).view(-1, 1, 1)

        def convolved(samples: Tensor, thresholds: Tensor) -> Tensor:
            signs, pads = pad_signs(signs_of(samples, thresholds, weight.dtype), geometry.pads)
            y = F.conv2d(signs, weight, None, geometry.stride, pads, geometry.dilation, geometry.groups)
            return y.round_() if exact else y

        return scaled_and_joined((convolved(*piece) for piece in pieces(x, threshold, least=bw.numel())), scale, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None, None]:
        x, threshold, bw, alpha = ctx.saved_tensors
        geometry, dtype, wants_x = ctx.geometry, ctx.compute_dtype, ctx.needs_input_grad[0]
        # The input's gradient wants the scaled weight, the weight's gradient the unscaled output gradient: one call does both.
        scaled = (bw * alpha.to(bw.dtype).view(-1, 1, 1, 1)).to(dtype)
        grad_unscaled: Tensor | None = None
        grad_x = torch.empty_like(x) if wants_x else x
        for samples, thresholds, grads, out in pieces(x, threshold, grad_y, grad_x, least=bw.numel()):
            signs, pads = pad_signs(signs_of(samples, thresholds, dtype), geometry.pads)
            grad_signs, grad_weight, _ = torch.ops.aten.convolution_backward(
                grads.to(dtype), signs, scaled, None, geometry.stride, pads, geometry.dilation, False, [0, 0],
                geometry.groups, [wants_x, True, False],
            )  # fmt: skip
            grad_unscaled = grad_weight.to(bw.dtype) if grad_unscaled is None else grad_unscaled.add_(grad_weight)
            if wants_x:
                inside = _unpadded(grad_signs, geometry.pads, samples)
                sign_backward(inside, samples, thresholds, out, centred=ctx.center)
        assert grad_unscaled is not None  # of no samples there is one piece, too
        grad_alpha = torch.linalg.vecdot(grad_unscaled.flatten(1), bw.flatten(1)).to(alpha.dtype)
        grad_bw = grad_unscaled.mul_(alpha.to(bw.dtype).view(-1, 1, 1, 1))
        return grad_x if wants_x else None, None, grad_bw, grad_alpha, None, None, None


def sign_backward(grad_signs: Tensor, x: Tensor, mean: Tensor, out: Tensor, *, centred: bool) -> None:
    """Write to `out` the gradient of sign(a), a = (x - mean) / std per sample over (C, H, W), d sign(a)/da := max(0, 2 - 2|a|).

    With p = grad_signs * max(0, 2 - 2|a|):  dL/dx = (p - mean(p) - a * sum(p*a) / (N - 1)) / std,  N = C*H*W.
    Here with c = x - mean and q = grad_signs * max(0, std - |c|), so p = 2q / std, which leaves fewer passes:
    dL/dx = (q - mean(q) - c * sum(q*c) / (var * (N - 1))) * 2 / var.  In the dtype of `mean`.
    Not `centred`, `mean` is 0, and std = sqrt(sum(x^2) / (N - 1) + EPS) only sets how wide the surrogate is: the sign does not
    depend on it, so it counts as a constant, and dL/dx = 2q / var.
    """
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    x, grad_signs = x.contiguous(memory_format=layout), grad_signs.contiguous(memory_format=layout)
    if len(mean) == len(x) and out.stride() == x.stride() and training_kernels.are_for(x, mean, grad_signs, out):
        return training_kernels.sign_backward(grad_signs, x, mean, out, centred=centred)
    freedom = max(1, x[0].numel() - 1)
    c = _samples(x).to(mean.dtype) - mean.view(-1, 1)  # (N, C*H*W)
    variance = (_inner(c, c) / freedom).add_(binarize.EPS)
    q = c.abs()
    torch.sub(variance.sqrt(), q, out=q).relu_().mul_(_samples(grad_signs))
    if centred:
        q.addcmul_(c, _inner(q, c) / (variance * -freedom)).sub_(q.mean(dim=1, keepdim=True))
    out.copy_(_like(q.mul_(2 / variance), x))
    return None


def _like(samples: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_samples`, for an x in the same layout."""
    if x.is_contiguous():
        return samples.view(x.shape)
    n, c, h, w = x.shape
    return samples.view(n, h, w, c).permute(0, 3, 1, 2)


def _samples(t: Tensor) -> Tensor:
    """(N, C, H, W) in either dense layout -> a view (N, C*H*W), in the order of the memory."""
    return t.view(len(t), -1) if t.is_contiguous() else t.permute(0, 2, 3, 1).view(len(t), -1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, (N, 1). einsum's float32 sum was 500 times less accurate here, and slower."""
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(1)


def signs_of(x: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where x >= threshold, else -1 (for NaN too). Comparing straight into `dtype` saves a pass over a bool tensor."""
    if dtype == x.dtype and len(threshold) == len(x) and training_kernels.are_for(x, threshold):
        return training_kernels.signs(x, threshold)
    if torch.compiler.is_compiling():  # which has no `out=` in channels_last, and saves the pass itself
        return torch.where(x >= threshold, 1.0, -1.0).to(dtype)
    signs = torch.ge(x, threshold, out=torch.empty_like(x, dtype=dtype))
    return torch.add(signs.new_full((), -1.0), signs, alpha=2, out=signs)


def pad_signs(signs: Tensor, pads: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The signs and the padding a convolution has to add; unequal padding (of `same`) is written out as zeros."""
    left, right, top, bottom = pads
    if left == right and top == bottom:
        return signs, (top, left)
    return F.pad(signs, pads), (0, 0)


def _unpadded(grad: Tensor, pads: tuple[int, int, int, int], samples: Tensor) -> Tensor:
    """The gradient without what `pad_signs` wrote out around the samples."""
    left, right, top, bottom = pads
    return grad if grad.shape == samples.shape else F.pad(grad, (-left, -right, -top, -bottom))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    mixed = device != "meta" and torch.is_autocast_enabled(device)  # "meta" knows no autocast
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
