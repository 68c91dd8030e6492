"""Elementwise work done a few rows at a time, so that a chain of operations finds its operands in a CPU's cache.

A pass over a tensor larger than the cache costs a trip to memory, and its result new pages from the system; both cost more
than the arithmetic.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PIECE = (
    1 << 19
)  # elements a thread: 2 MiB of float32; of 2^16 to 2^20 the fastest for a convolution and its elementwise part


def pieces(*tensors: Tensor, least: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """The same rows (first dimension) of all tensors as views, about `PIECE` elements of the first per thread, or `least`.

    On an accelerator all rows at once, more kernels would only cost more; and when compiling, which does its own tiling.
    """
    first = tensors[0]
    rows = max(1, len(first))
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = max(1, max(least, PIECE * torch.get_num_threads()) * rows // max(1, first.numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def scaled_and_joined(parts: Iterable[Tensor], scale: Tensor, count: int) -> Tensor:
    """The parts times `scale` one after another, `count` rows in all; they are gone afterwards.

    Unlike `torch.cat` it lets go of each part before it takes the next, and their only copy is the product.
    """
    whole, row = None, 0
    for part in parts:
        if len(part) == count:
            # Compiled by torch 2.11, an output that was changed in place has no gradient.
            return part * scale if torch.compiler.is_compiling() else part.mul_(scale)
        if whole is None:
            layout = torch.contiguous_format if part.is_contiguous() else torch.channels_last
            whole = torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)
        torch.mul(part, scale, out=whole[row : row + len(part)])
        row += len(part)
    assert whole is not None
    return whole
