"""The binary parts of a training step by the native library: on a CPU one call in place of a dozen operators.

What operators do in passes over a batch, or over a layer's weights, is done sample by sample, or filter by filter, here: all
passes but the first find it in the cache. Where the library was not built, and for other devices and types, `layers` and
`binarize` have the same in torch.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from siman_convert.errors import InputError
from siman_convert.shared_library import find_library

LEAST = 1 << 18  # floats that are worth a thread


def are_for(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: float32 in a CPU's memory, samples one after another, nothing that only traces."""
    # A trace would keep the signs of its example as constants. torch has no types for is_tracing.
    traces = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return not traces and _library() is not None and all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor) -> bool:
    is_dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    kind = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return kind and is_dense and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def signs(x: Tensor, means: Tensor) -> Tensor:
    """+1 where x (N, C, H, W) >= means (N, 1, 1, 1), else -1 (for NaN too)."""
    out = torch.empty_like(x)
    c = _kernels()
    _by_samples(x, lambda at, count: c.siman_signs(_at(x, at), _at(means, at), count, _size(x), None, _at(out, at)))
    return out


def sign_backward(grad: Tensor, x: Tensor, means: Tensor, out: Tensor, *, centred: bool) -> None:
    """Write what `layers.sign_backward` says to `out`; grad, x and out (N, C, H, W) have one layout, means is (N, 1, 1, 1)."""
    c = _kernels()

    def call(at: int, count: int) -> int:
        status: int = c.siman_sign_backward(
            _at(x, at), _at(means, at), _at(grad, at), count, _size(x), centred, None, _at(out, at)
        )
        return status

    _by_samples(x, call)


def binarize(rows: Tensor) -> Tensor:
    """The weights 2b - 1 of latents (C_out, n) whose bits are the half of the larger magnitudes: `binarize.binary_rows`."""
    out, c = torch.empty_like(rows), _kernels()
    _by_samples(rows, lambda at, count: c.siman_binarize(_at(rows, at), count, _size(rows), None, _at(out, at)))
    return out


def binarize_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient of latents (C_out, n) from that of their 2b - 1: `binarize.binary_rows_backward`."""
    out, c = torch.empty_like(rows), _kernels()

    def call(at: int, count: int) -> int:
        status: int = c.siman_binarize_backward(_at(rows, at), _at(grad, at), count, _size(rows), None, _at(out, at))
        return status

    _by_samples(rows, call)
    return out


def clip_(rows: Tensor, percent: float) -> None:
    """Clip latents (C_out, n) in place: `binarize.clip_magnitudes_`. On one thread, as numpy's selection is."""
    _require(_kernels().siman_clip(_at(rows, 0), len(rows), _size(rows), percent, None))
    torch.autograd.graph.increment_version(rows)  # a backward pass that needs the weights of before has to notice


def _size(x: Tensor) -> int:
    return x.numel() // max(1, len(x))


def _at(tensor: Tensor, sample: int) -> int:
    return tensor.data_ptr() + sample * _size(tensor) * tensor.element_size()


def _by_samples(x: Tensor, call: Callable[[int, int], int]) -> None:
    """call(first sample, how many) for all of x, on as many threads as torch has and as the work is worth."""
    threads = max(1, min(torch.get_num_threads(), len(x), x.numel() // LEAST))
    cuts = [len(x) * i // threads for i in range(threads + 1)]
    shares = [(begin, end - begin) for begin, end in pairwise(cuts)]
    run = _threads(threads).map if threads > 1 else map
    for status in run(lambda share: call(*share), shares):
        _require(status)


def _require(status: int) -> None:
    if status:
        message = _kernels().siman_message(status).decode()
        raise MemoryError(message) if message == "out of memory" else InputError(message)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="siman")


def _kernels() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@cache
def _library() -> ctypes.CDLL | None:
    path = find_library()
    if path is None:
        return None
    c = ctypes.CDLL(str(path))
    floats, size = ctypes.c_void_p, ctypes.c_size_t
    c.siman_signs.argtypes = [floats, floats, size, size, ctypes.c_char_p, floats]
    c.siman_sign_backward.argtypes = [floats, floats, floats, size, size, ctypes.c_int, ctypes.c_char_p, floats]
    c.siman_binarize.argtypes = [floats, size, size, ctypes.c_char_p, floats]
    c.siman_binarize_backward.argtypes = [floats, floats, size, size, ctypes.c_char_p, floats]
    c.siman_clip.argtypes = [floats, size, size, ctypes.c_double, ctypes.c_char_p]
    c.siman_message.restype = ctypes.c_char_p
    return c
