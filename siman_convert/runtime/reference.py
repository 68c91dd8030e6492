"""The specification of siman.BinaryConv2d and siman.QuantizedConv2d: numpy, readable before fast.

siman.BinaryConv2d, with bits and population counts:

    m = center ? float32(mean over C,H,W of X in float64) : 0;   xb = X >= m ? +1 : -1
    acc = integer convolution of xb with the +-1 weights, out-of-image taps contribute 0
    v = scale*acc + bias + residual      (float32, each operation rounded, in this order)
    Y = v >= 0 ? v : slope*v

Why xor: let a and b hold K values of +-1 as bits. Where the bits agree the product is +1, where they differ it is -1, so
their dot product is (K - differing) - differing = K - 2*popcount(a xor b), with K the channels of one tap. Padding bits
are 0 in both and never differ.

Corners, the same in every runtime:
  * NaN compares false: a NaN in X becomes -1. With center the mean is then NaN and the whole sample is -1; so it is when
    X holds +inf and -inf. With +inf alone m is +inf, and only the infinite elements become +1.
  * v = NaN stays NaN; slope 0 times v = -inf is NaN.
  * n = channels*kH*kW is at most 2^24, so that acc is exact in float32.
  * scale, bias, residual and slope may hold anything; files with such values are refused where files are read.
  * a batch of 0 gives a batch of 0; every other dimension is at least 1.

siman.QuantizedConv2d, with integers; `onnx_quantized_op` gives the formula and the range of acc. NaN in X becomes -x_zero_point,
infinities clip; the last three corners above hold here too, and a NaN behind the slope is left out of a pool.

So an image with a NaN, or with infinities of both signs behind the stem, is an image of -1 to the first binary layer, and what
a network answers is finite. The operators between ours are each runtime's own; a max pool or a Relu before the first binary
layer may treat NaN differently there (in stock ONNX Runtime a window with NaN has values of its own, `onnx_quantized_op`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from siman_convert.bits import check_packed
from siman_convert.errors import InputError, one_line
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, output_size
from siman_convert.onnx_quantized_op import MAX_CODE, MAX_TAPS, MAX_WEIGHT, QUANTIZED_OP

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Int8s = npt.NDArray[np.int8]

BLOCK = 4096  # elements of a sample that are summed together
LANES = 32  # partial sums of a block
MAX_BINARY_TAPS = 2**24  # integers up to here are exact in float32
MAX_ELEMENTS = 2**31 - 1  # of X, W or Y, and the largest stride, pad or dilation


class Geometry(NamedTuple):
    """The attributes that say which input elements meet which weights; `pads` is top, left, bottom, right."""

    channels: int  # per group
    strides: Sequence[int]
    pads: Sequence[int]
    dilations: Sequence[int]
    group: int


class Pool(NamedTuple):
    """The max pool of a siman.QuantizedConv2d; `pads` is top, left, bottom, right."""

    kernel: Sequence[int]
    strides: Sequence[int]
    pads: Sequence[int]


def binary_conv2d(
    X: Floats,
    W: Bytes,
    scale: Floats,
    bias: Floats,
    residual: Floats,
    slope: Floats,
    *,
    channels: int,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    center: int,
) -> Floats:
    """Y (N, O, Ho, Wo) from X (N, C, H, W), W (O, kH, kW, B) and per-filter scale, bias, slope (O,)."""
    _check_arrays(OP_NAME, X=X, W=W, scale=scale, bias=bias, residual=residual, slope=slope)
    check_attributes(channels, strides, pads, dilations, group, center)
    geometry = Geometry(channels, strides, pads, dilations, group)
    out_shape = _out_shape(X, W, geometry)
    for name, vector in (("scale", scale), ("bias", bias), ("slope", slope)):
        _check_float(OP_NAME, name, vector, [out_shape[1:2]])
    _check_float(OP_NAME, "residual", residual, [out_shape, (1, 1, 1, 1)])

    m = sample_mean(X) if center else np.zeros((1, 1, 1, 1), np.float32)
    acc = _integer_conv(np.greater_equal(X, m), W, out_shape, geometry)
    per_filter = (1, -1, 1, 1)
    with np.errstate(all="ignore"):  # infinities and NaN go where IEEE 754 sends them
        v = scale.reshape(per_filter) * acc.astype(np.float32)
        v = v + bias.reshape(per_filter)
        v = v + residual
        return np.where(v >= 0, v, slope.reshape(per_filter) * v)


def quantized_conv2d(
    X: Floats,
    W: Int8s,
    scale: Floats,
    bias: Floats,
    slope: Floats,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    x_scale: float,
    x_zero_point: int,
    pool_kernel: Sequence[int] = (1, 1),
    pool_strides: Sequence[int] = (1, 1),
    pool_pads: Sequence[int] = (0, 0, 0, 0),
) -> Floats:
    """Y (N, O, Ho, Wo) from X (N, C, H, W) float32, W (O, C, kH, kW) int8 and per-filter float32 scale, bias, slope (O,).

    Raises InputError for whatever does not fit: -128 in W, more than MAX_TAPS products, an x_scale that is 0 in float32, a
    pool larger than what it reads.
    """
    _check_arrays(QUANTIZED_OP, X=X, W=W, scale=scale, bias=bias, slope=slope)
    pool = Pool(pool_kernel, pool_strides, pool_pads)
    check_quantized_attributes(strides, pads, x_scale, x_zero_point, *pool)
    check_int8_weights(W)
    filters, channels, *kernel = W.shape
    out_shape = _output_shape(QUANTIZED_OP, X, channels, filters, kernel, strides, pads, [1, 1])
    for name, vector in (("scale", scale), ("bias", bias), ("slope", slope)):
        _check_float(QUANTIZED_OP, name, vector, [out_shape[1:2]])

    lo, hi = np.float32(-x_zero_point), np.float32(MAX_CODE - x_zero_point)
    per_filter = (1, -1, 1, 1)
    with np.errstate(all="ignore"):  # infinities and NaN go where IEEE 754 sends them
        t = np.rint(X / np.float32(x_scale))
        d = np.where(t >= lo, t, lo)
        d = np.where(d <= hi, d, hi).astype(np.int32)
        acc = _int8_conv(d, W, out_shape, strides, pads)
        v = scale.reshape(per_filter) * acc.astype(np.float32)
        v = v + bias.reshape(per_filter)
        return _max_pool(np.where(v >= 0, v, slope.reshape(per_filter) * v), pool)


def _max_pool(p: Floats, pool: Pool) -> Floats:
    """The largest of each window, by rows and then by columns; NaN is never the larger one."""
    kernel, strides, pads = pool
    if {*kernel, *strides} == {1}:
        return p
    largest = np.where(np.isnan(p), np.float32(-np.inf), p)
    for i in (0, 1):
        size = p.shape[2 + i]
        out = output_size(size, kernel[i], strides[i], pads[i], pads[i + 2], 1)
        if out < 1:
            raise InputError(f"{QUANTIZED_OP}: the {list(kernel)} pool is larger than the padded output {p.shape}")
        if largest.size // size * out > MAX_ELEMENTS:
            raise InputError(f"{QUANTIZED_OP}: Y has more than {MAX_ELEMENTS} elements")
        first = np.arange(out) * strides[i] - pads[i]
        windows = [np.arange(max(at, 0), min(at + kernel[i], size)) for at in first.tolist()]  # none is empty
        largest = np.stack([largest.take(window, 2 + i).max(2 + i) for window in windows], 2 + i)
    return largest


def _int8_conv(
    d: npt.NDArray[np.int32], W: Int8s, out_shape: tuple[int, ...], strides: Sequence[int], pads: Sequence[int]
) -> npt.NDArray[np.int32]:
    """acc (N, O, Ho, Wo), summed tap by tap over the taps that fall inside the image."""
    height, width = d.shape[2:]
    acc = np.zeros(out_shape, np.int32)
    for i, j in np.ndindex(*W.shape[2:]):
        y = np.arange(out_shape[2]) * strides[0] - pads[0] + i
        x = np.arange(out_shape[3]) * strides[1] - pads[1] + j
        inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))  # (Ho, Wo)
        taken = d[:, :, y.clip(0, height - 1)[:, None], x.clip(0, width - 1)] * inside  # (N, C, Ho, Wo)
        acc += np.einsum("nchw,oc->nohw", taken, W[:, :, i, j].astype(np.int32))
    return acc


def sample_mean(X: Floats) -> Floats:
    """Mean of each sample, (N, 1, 1, 1), summed in float64 in the one order the native kernels share.

    The flattened sample is cut into blocks of 4096. Element i of a block is added to partial sum i mod 32, in increasing
    i; the 32 sums are halved by adding 0+16, 1+17, ...; then 0+8, ...; down to 0+1; the blocks' sums are added in order.
    """
    N, count = X.shape[0], math.prod(X.shape[1:])
    blocks = -(-count // BLOCK)
    padded = np.zeros((N, blocks * BLOCK), np.float64)  # adding the zeros of the last block changes no sum
    padded[:, :count] = X.reshape(N, count)
    rows = padded.reshape(N, blocks, BLOCK // LANES, LANES)
    with np.errstate(invalid="ignore"):
        sums = np.zeros((N, blocks, LANES))
        for i in range(BLOCK // LANES):
            sums += rows[:, :, i]
        width = LANES
        while width > 1:
            width //= 2
            sums = sums[..., :width] + sums[..., width:]
        total = np.zeros(N)
        for b in range(blocks):
            total += sums[:, b, 0]
        return (total / count).astype(np.float32).reshape(N, 1, 1, 1)


def _integer_conv(
    xb: npt.NDArray[np.bool_], W: Bytes, out_shape: tuple[int, ...], geometry: Geometry
) -> npt.NDArray[np.int32]:
    """acc (N, O, Ho, Wo): K - 2*popcount(xor), summed over the taps that fall inside the image."""
    channels, strides, pads, dilations, group = geometry
    batch, filters, out_h, out_w = out_shape
    height, width = xb.shape[2:]
    by_channel = xb.reshape(batch, group, channels, height, width).transpose(0, 3, 4, 1, 2)  # (N, H, W, g, C/g)
    x_words = _words_u64(np.packbits(by_channel, axis=-1, bitorder="little"))  # (N, H, W, g, words)
    w_words = _words_u64(W).reshape(group, filters // group, *W.shape[1:3], -1)  # (g, O/g, kH, kW, words)
    acc = np.zeros((batch, group, filters // group, out_h, out_w), np.int32)
    for i, j in np.ndindex(*W.shape[1:3]):
        y = np.arange(out_h) * strides[0] - pads[0] + i * dilations[0]
        x = np.arange(out_w) * strides[1] - pads[1] + j * dilations[1]
        inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))  # (Ho, Wo)
        taken = x_words[:, y.clip(0, height - 1)[:, None], x.clip(0, width - 1)]  # (N, Ho, Wo, g, words)
        differing = np.zeros_like(acc)
        for word in range(taken.shape[-1]):
            a = taken[..., word].transpose(0, 3, 1, 2)[:, :, None]  # (N, g, 1, Ho, Wo)
            b = w_words[:, :, i, j, word][:, :, None, None]  # (g, O/g, 1, 1)
            differing += np.bitwise_count(a ^ b)
        acc += (channels - 2 * differing) * inside
    return acc.reshape(out_shape)


def _words_u64(packed: Bytes) -> npt.NDArray[np.uint64]:
    """Group the bytes of the last axis by eight, filled up with 0; which byte goes where in a word does not matter."""
    missing = -packed.shape[-1] % 8
    filled = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(filled).view(np.uint64)


def check_attributes(
    channels: int, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], group: int, center: int
) -> None:
    """Raise InputError for attributes no siman.BinaryConv2d can have."""
    _check_ints(OP_NAME, "channels", [channels], 1, least=1)
    _check_ints(OP_NAME, "group", [group], 1, least=1)
    _check_ints(OP_NAME, "strides", strides, 2, least=1)
    _check_ints(OP_NAME, "dilations", dilations, 2, least=1)
    _check_ints(OP_NAME, "pads", pads, 4, least=0)
    if center not in (0, 1):
        raise InputError(f"{OP_NAME}: center must be 0 or 1, got {center}")


def check_quantized_attributes(
    strides: Sequence[int],
    pads: Sequence[int],
    x_scale: float,
    x_zero_point: int,
    pool_kernel: Sequence[int] = (1, 1),
    pool_strides: Sequence[int] = (1, 1),
    pool_pads: Sequence[int] = (0, 0, 0, 0),
) -> None:
    """Raise InputError for attributes no siman.QuantizedConv2d can have."""
    _check_ints(QUANTIZED_OP, "strides", strides, 2, least=1)
    _check_ints(QUANTIZED_OP, "pads", pads, 4, least=0)
    _check_ints(QUANTIZED_OP, "x_zero_point", [x_zero_point], 1, least=0, most=MAX_CODE)
    with np.errstate(over="ignore"):
        finite = isinstance(x_scale, (float, np.floating)) and 0 < np.float32(x_scale) < np.inf
    if not finite:
        raise InputError(f"{QUANTIZED_OP}: x_scale must be a finite float32 above 0, got {x_scale}")
    _check_ints(QUANTIZED_OP, "pool_kernel", pool_kernel, 2, least=1)
    _check_ints(QUANTIZED_OP, "pool_strides", pool_strides, 2, least=1)
    _check_ints(QUANTIZED_OP, "pool_pads", pool_pads, 4, least=0)
    if any(pad >= pool_kernel[i % 2] for i, pad in enumerate(pool_pads)):
        raise InputError(
            f"{QUANTIZED_OP}: pool_pads must be below pool_kernel {list(pool_kernel)}, got {list(pool_pads)}"
        )


def check_int8_weights(W: Int8s) -> None:
    """Raise InputError unless W can be the weights of a siman.QuantizedConv2d."""
    if W.dtype != np.int8 or W.ndim != 4 or 0 in W.shape:
        raise InputError(f"{QUANTIZED_OP}: W must be a non-empty int8 (O, C, kH, kW), got {W.dtype} {W.shape}")
    if math.prod(W.shape[1:]) > MAX_TAPS:
        raise InputError(f"{QUANTIZED_OP}: C*kH*kW must be at most {MAX_TAPS}, got {'*'.join(map(str, W.shape[1:]))}")
    if W.min() < -MAX_WEIGHT:
        raise InputError(f"{QUANTIZED_OP}: W must be -{MAX_WEIGHT} to {MAX_WEIGHT}, it holds {W.min()}")


def _check_ints(op: str, name: str, values: Sequence[int], count: int, least: int, most: int = MAX_ELEMENTS) -> None:
    listed = list(values) if isinstance(values, (Sequence, np.ndarray)) else [values]
    whole = all(isinstance(v, (int, np.integer)) and least <= v <= most for v in listed)
    if len(listed) != count or not whole:
        raise InputError(f"{op}: {name} must be {count} x integer in {least}..{most}, got {values}")


def _out_shape(X: Floats, W: Bytes, geometry: Geometry) -> tuple[int, int, int, int]:
    """(N, O, Ho, Wo) of a binary convolution's output, or an InputError that says which input does not fit."""
    channels, strides, pads, dilations, group = geometry
    check_packed(W, channels)
    filters, *kernel = W.shape[:3]
    if filters % group:
        raise InputError(f"{OP_NAME}: {filters} filters of W cannot be split into {group} groups")
    if channels * kernel[0] * kernel[1] > MAX_BINARY_TAPS:
        raise InputError(
            f"{OP_NAME}: channels*kH*kW must be at most {MAX_BINARY_TAPS}, got {channels}*{kernel[0]}*{kernel[1]}"
        )
    return _output_shape(OP_NAME, X, channels * group, filters, kernel, strides, pads, dilations)


def _output_shape(
    op: str,
    X: Floats,
    channels: int,
    filters: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> tuple[int, int, int, int]:
    """(N, O, Ho, Wo) from X of so many channels, or an InputError."""
    if X.dtype != np.float32 or X.ndim != 4 or X.shape[1] != channels or 0 in X.shape[1:]:
        expected = f"float32 (N, {channels}, H, W) with H and W at least 1"
        raise InputError(f"{op}: X must be {expected}, got {X.dtype} {X.shape}")
    out_h, out_w = (
        output_size(X.shape[2 + i], kernel[i], strides[i], pads[i], pads[i + 2], dilations[i]) for i in (0, 1)
    )
    if out_h < 1 or out_w < 1:
        raise InputError(f"{op}: the dilated {list(kernel)} kernel is larger than the padded image of X {X.shape}")
    shape = (X.shape[0], filters, out_h, out_w)
    if max(X.size, math.prod(shape), out_h * out_w) > MAX_ELEMENTS:
        raise InputError(f"{op}: X {X.shape} or Y {shape} has more than {MAX_ELEMENTS} elements")
    return shape


def _check_arrays(op: str, **inputs: object) -> None:
    for name, value in inputs.items():
        if not isinstance(value, np.ndarray):
            raise InputError(f"{op}: {name} must be a numpy array, got {type(value).__name__}")


def _check_float(op: str, name: str, array: Floats, shapes: list[tuple[int, ...]]) -> None:
    if array.dtype != np.float32 or array.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise InputError(f"{op}: {name} must be float32 {expected}, got {array.dtype} {array.shape}")


class BinaryConv2d(OpRun):  # type: ignore[misc, unused-ignore]
    """`binary_conv2d` as an operator of onnx.reference; the class name is how the evaluator finds it."""

    op_domain = DOMAIN

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Floats]:
        return (binary_conv2d(*inputs, **attributes),)


class QuantizedConv2d(OpRun):  # type: ignore[misc, unused-ignore]
    """`quantized_conv2d`, likewise."""

    op_domain = DOMAIN

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Floats]:
        return (quantized_conv2d(*inputs, **attributes),)


def evaluator(model_or_path: onnx.ModelProto | str | Path) -> ReferenceEvaluator:
    """An evaluator that runs a model's nodes of our operators with this module, not with their function bodies."""
    model = model_or_path if isinstance(model_or_path, onnx.ModelProto) else _read(Path(model_or_path))
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if versions.get(DOMAIN, VERSION) != VERSION:
        raise InputError(f"the model needs {DOMAIN} operators of version {versions[DOMAIN]}, this siman has {VERSION}")
    # The evaluator does not hand its operators down to functions: inline the others, and drop the bodies of ours.
    ours = [(DOMAIN, OP_NAME), (DOMAIN, QUANTIZED_OP)]
    try:
        model = onnx.inliner.inline_selected_functions(model, ours, exclude=True)
        del model.functions[:]
        return ReferenceEvaluator(model, new_ops=[BinaryConv2d, QuantizedConv2d])
    except Exception as error:  # whatever a strange graph leads to: their errors share no class
        raise InputError(f"the reference cannot run this graph: {one_line(str(error))}") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except (OSError, DecodeError) as error:
        raise InputError(f"{path}: expected a readable ONNX file: {error}") from error
