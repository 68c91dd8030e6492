"""timm's own convolution classes: the weight that each convolves with, and how it pads, so that a plain convolution can stand in.

Conv2dSame                              pads as TensorFlow's SAME does: as much as this map needs, the odd element behind
StdConv2d, StdConv2dSame                the weight standardised per filter (arXiv 1903.10520)
ScaledStdConv2d, ScaledStdConv2dSame    the same times gain / sqrt(fan-in) (arXiv 2101.08692)
"""

from __future__ import annotations

import torch
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv2d, CondConv2d)
_SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
_STANDARDISED = (StdConv2d, StdConv2dSame, *_SCALED)
_FORWARDS = {cls.forward for cls in (nn.Conv2d, Conv2dSame, *_STANDARDISED)}


def is_understood(conv: nn.Conv2d) -> bool:
    """Whether `conv` computes what nn.Conv2d or one of the classes above does; a subclass that changes nothing counts."""
    own = "forward" in vars(conv) or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    return type(conv).forward in _FORWARDS and not own


def pads_to_same(conv: nn.Conv2d) -> bool:
    """Whether the padding depends on the map that comes in."""
    return bool(getattr(conv, "same_pad", isinstance(conv, Conv2dSame)))


@torch.no_grad()
def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight that the forward of `conv` convolves with, (C_out, C_in/groups, kH, kW)."""
    weight = conv.weight.detach()
    if not isinstance(conv, _STANDARDISED):
        return weight
    gain = (conv.gain * conv.scale).flatten() if isinstance(conv, _SCALED) else None
    filters = weight.flatten(1)[None]  # a filter is what batch_norm calls a channel
    rows = F.batch_norm(filters, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    return rows.view_as(weight)


def same_pads(length: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and behind `length` elements, so that ceil(length / stride) outputs come out."""
    needed = max(0, (-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length)
    return needed // 2, needed - needed // 2
