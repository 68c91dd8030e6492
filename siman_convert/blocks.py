"""What a plan's topology puts around binary convolutions and in place of their activations (`topology` decides)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class Shift(nn.Module):
    """x - offset, one learned offset a channel, 0 at first: ReActNet's RSign is the sign of it (arXiv 2003.03488)."""

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape and dtype."""
        return x - self.offset.to(x.dtype).view(-1, 1, 1)


class BinaryUnit(nn.Module):
    """A convolution with what belongs to it, in its place: norm(conv(shift(x))) + x, or conv(shift(x)) without a norm.

    `norm`: the BatchNorm that stood behind the convolution; with it comes the shortcut. `shift`: learned thresholds.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module | None, shift: Shift | None) -> None:
        super().__init__()
        self.conv, self.norm, self.shift = conv, norm, shift
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'); with a norm they are equal."""
        y: Tensor = self.conv(x if self.shift is None else self.shift(x))
        return y if self.norm is None else self.norm(y) + x


class ShiftedPReLU(nn.Module):
    """PReLU(x - before) + after with learned shifts, 0 at first: ReActNet's RPReLU."""

    def __init__(self, channels: int, slope: float, **factory: Any) -> None:
        super().__init__()
        self.before = Shift(channels, **factory)
        self.prelu = nn.PReLU(channels, slope, **factory)
        self.after = nn.Parameter(torch.zeros(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        y: Tensor = self.prelu(self.before(x))
        return y + self.after.to(y.dtype).view(-1, 1, 1)


def norm_alone(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A BatchNorm without what timm's BatchNormAct2d does behind it; the same parameters and buffers."""
    if type(norm) is nn.BatchNorm2d:
        return norm
    alone = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    for name in ("weight", "bias"):
        alone.register_parameter(name, norm._parameters[name])
    for name, buffer in norm._buffers.items():
        alone.register_buffer(name, buffer)
    return alone.train(norm.training)


def behind_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What stays in the place of a BatchNorm that went into a BinaryUnit, its children under their names."""
    children = OrderedDict(norm.named_children())
    return (nn.Sequential(children) if children else nn.Identity()).train(norm.training)
