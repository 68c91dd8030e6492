"""Elementwise work done a few rows at a time, so that a chain of operations finds its operands in a CPU's cache.

A pass over a tensor larger than the cache costs a trip to memory, and its result new pages from the system; both cost more
than the arithmetic.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 17  # elements a thread: 512 KiB of float32, about the second cache of a core


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows (first dimension) of all tensors as views, about `PIECE` elements of the first per thread.

    On an accelerator all rows at once: more kernels would only cost more.
    """
    first = tensors[0]
    rows = max(1, len(first))
    if first.device.type == "cpu":
        rows = max(1, PIECE * torch.get_num_threads() * rows // max(1, first.numel()))
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
