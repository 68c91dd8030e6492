"""Convolutions in 8 bits: a Conv node of a graph becomes siman.QuantizedConv2d, or keeps its arithmetic and stores int8 weights.

    w_q = round half to even(w / step), step = max|w| / 127 over a filter: all 8 bits, symmetric
    QuantizedConv2d: X and w_q as they are, scale = x_scale * step in float32, bias as it is, slope 1; 0 where the only reader
        is a Relu, which is then folded in, as is a MaxPool that alone reads what is there by then
    otherwise: Conv of X and Cast(w_q) * step, which hosts fold to float weights when they open the file

The second form is for what the operator cannot do (`onnx_int8_plan.why_not`): a quarter of the bytes of float weights, in the
time of float weights. A filter of zeros, or of values below float32's normal range, gets the step 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from siman_convert.errors import SimanError
from siman_convert.onnx_int8_plan import WEIGHT, Followers, attributes_of, bias_of
from siman_convert.onnx_op import DOMAIN
from siman_convert.onnx_quantized_op import MAX_WEIGHT, NO_POOL, QUANTIZED_OP

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]  # initializers by name


class Range(NamedTuple):
    """How a tensor is quantized: a value v has the code round(v / scale) + zero_point, 0..255."""

    scale: np.float32
    zero_point: int


def quantized_conv(conv: onnx.NodeProto, behind: Followers, weight: Floats, x: Range) -> tuple[onnx.NodeProto, Arrays]:
    """The node that takes the place of `conv` and of what follows it, and the initializers that it needs besides."""
    w_q, step = quantize_weight(weight)
    with np.errstate(over="ignore"):
        scale = x.scale * step
    if not np.isfinite(scale).all():
        raise SimanError(f"--int8: {conv.name}: its inputs, {x.scale:.1e} a step, are too large to be quantized")
    names = {name: f"{conv.name}/{name}" for name in ("scale", "bias", "slope")}
    made: Arrays = {int8_name(conv): w_q, names["scale"]: scale}
    if bias := bias_of(conv):
        names["bias"] = bias
    else:
        made[names["bias"]] = np.zeros_like(scale)
    made[names["slope"]] = np.full_like(scale, 1 if behind.relu is None else 0)
    attributes = attributes_of(conv)
    node = helper.make_node(
        QUANTIZED_OP,
        [conv.input[0], int8_name(conv), *names.values()],
        list(behind.last(conv).output),
        name=conv.name,
        domain=DOMAIN,
        strides=attributes.get("strides", [1, 1]),
        pads=attributes.get("pads", [0, 0, 0, 0]),
        x_scale=float(x.scale),
        x_zero_point=x.zero_point,
    )
    if behind.pool is not None:
        node.attribute.extend(_pool_attributes(behind.pool))
    return node, made


def _pool_attributes(pool: onnx.NodeProto) -> list[onnx.AttributeProto]:
    attributes = attributes_of(pool)
    return [
        helper.make_attribute("pool_kernel", attributes["kernel_shape"]),
        helper.make_attribute("pool_strides", attributes.get("strides", NO_POOL["pool_strides"])),
        helper.make_attribute("pool_pads", attributes.get("pads", NO_POOL["pool_pads"])),
    ]


def float_conv(conv: onnx.NodeProto, weight: Floats) -> tuple[list[onnx.NodeProto], Arrays]:
    """The same convolution, of a weight that two nodes before it make of 8 bits; and the initializers that they need."""
    w_q, step = quantize_weight(weight)
    name = conv.input[WEIGHT]
    made: Arrays = {int8_name(conv): w_q, f"{name}/step": step.reshape(-1, *[1] * (weight.ndim - 1))}
    cast = helper.make_node("Cast", [int8_name(conv)], [f"{name}/cast"], name=f"{name}/cast", to=onnx.TensorProto.FLOAT)
    mul = helper.make_node("Mul", [f"{name}/cast", f"{name}/step"], [f"{name}/float32"], name=f"{name}/float32")
    reading = onnx.NodeProto()
    reading.CopyFrom(conv)
    reading.input[WEIGHT] = mul.output[0]
    return [cast, mul, reading], made


def quantize_weight(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """(O, ...) float32 to int8 of that shape and the step of each filter, float32 (O,)."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    step = largest / np.float32(MAX_WEIGHT)
    step[step < np.finfo(np.float32).tiny] = 1
    w_q = np.rint(weight / step.reshape(-1, *[1] * (weight.ndim - 1))).clip(-MAX_WEIGHT, MAX_WEIGHT)
    return w_q.astype(np.int8), step


def int8_name(conv: onnx.NodeProto) -> str:
    """What a convolution's quantized weight is called; convolutions that share a weight share this one."""
    return f"{conv.input[WEIGHT]}_int8"
