"""The ONNX operator siman.QuantizedConv2d, for what stays in full precision: integers inside, float32 at both ends.

A host that registered our kernels runs the node itself, any other the function, as with `onnx_op`'s siman.BinaryConv2d.

    X float32 (N, C, H, W);  W int8 (O, C, kH, kW), -127..127;  scale, bias, slope float32 (O)
    attributes: strides, pads (top, left, bottom, right), x_scale (finite, > 0), x_zero_point (0..255)
    optional: pool_kernel, pool_strides, pool_pads (each below its side of the kernel); together they are 1, 1 and 0, no pool
    t = round half to even(X / x_scale);  lo = -x_zero_point, hi = 255 - x_zero_point
    d = t >= lo ? t : lo;  d = d <= hi ? d : hi
    acc = convolution of d with W, 0 beside the image
    v = scale*acc + bias;  p = v >= 0 ? v : slope*v
    Y = p, or the largest p of each window of the pool: it is below p's last row or column by less than a stride (no ceil mode),
        what is beside the image is left out, and so is a NaN; -inf where nothing is left

in float32, each operation rounded. d + x_zero_point is the uint8 code of X that ONNX's QuantizeLinear gives; without the zero
point 0 stays 0, so that padding is what it is. A NaN becomes lo, infinities clip. scale is x_scale times the step of a
filter's weights: the file's exporter multiplies the two.

Range: |d| <= 255 and |W| <= 127, so |acc| <= C*kH*kW * 32,385. Up to MAX_TAPS = 518 products that is below 2^24: every partial
sum, in any order, is an integer that float32 holds, and a float convolution gives the same acc as an integer one.

What the body does differently from these lines, and why it gives the same values:
  * Min after the first Where: nothing is NaN there any more. Before it Clip or Max would not do, hosts differ on NaN.
  * Round after Conv and the slopes, as in `onnx_op`.
  * ONNX Runtime folds the Cast of W, and so holds these weights as float32.
  * MaxPool, where there is a pool: in a window that holds NaN, or -inf alone, ONNX Runtime gives values of its own. p is finite
    where a file's numbers are, but for an overflow of v.
"""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

from siman_convert.onnx_op import DOMAIN, SLOPE_BODY, VERSION, infer_shape, output_size, parse_body

QUANTIZED_OP = "QuantizedConv2d"
QUANTIZED_INPUTS = ("X", "W", "scale", "bias", "slope")
QUANTIZED_ATTRIBUTES = ("strides", "pads", "x_scale", "x_zero_point")  # every node carries all of them
NO_POOL = {"pool_kernel": [1, 1], "pool_strides": [1, 1], "pool_pads": [0, 0, 0, 0]}  # what is left out means
MAX_TAPS = 518  # C*kH*kW: (2^24 - 1) // (255 * 127)
MAX_WEIGHT = 127
MAX_CODE = 255  # of an activation

_BODY = """
<domain: "siman", opset_import: ["" : OPSET]>
QuantizedConv2d <strides, pads, x_scale, x_zero_point, POOL> (X, W, scale, bias, slope) => (Y)
{
  zero = Constant <value = float {0.0}> ()
  one = Constant <value = float {1.0}> ()
  max_code = Constant <value = float {255.0}> ()

  step = Constant <value_float: float = @x_scale> ()
  zero_point_int = Constant <value_int: int = @x_zero_point> ()
  zero_point = Cast <to = 1> (zero_point_int)
  lo = Sub (zero, zero_point)
  hi = Sub (max_code, zero_point)
  steps = Div (X, step)
  t = Round (steps)
  at_least_lo = GreaterOrEqual (t, lo)
  d_from_lo = Where (at_least_lo, t, lo)
  d = Min (d_from_lo, hi)

  W_float = Cast <to = 1> (W)
  acc_inexact = Conv <strides: ints = @strides, pads: ints = @pads> (d, W_float)
  acc = Round (acc_inexact)

  axes_hw = Constant <value = int64[2] {1, 2}> ()
  scale_o = Unsqueeze (scale, axes_hw)
  bias_o = Unsqueeze (bias, axes_hw)
  slope_o = Unsqueeze (slope, axes_hw)
  scaled = Mul (scale_o, acc)
  v = Add (scaled, bias_o)
SLOPE
  pool_rows_columns = Constant <value_ints: ints = @pool_kernel> ()
  pool_steps = Constant <value_ints: ints = @pool_strides> ()
  pool_sizes = Concat <axis = 0> (pool_rows_columns, pool_steps)
  largest_size = ReduceMax <keepdims = 0> (pool_sizes)
  size_1 = Constant <value = int64 {1}> ()
  no_pool = Equal (largest_size, size_1)
  Y = If (no_pool) <
    then_branch = unpooled () => (float[N, O, Ho, Wo] Y_unpooled) {
      Y_unpooled = Identity (p)
    },
    else_branch = pooled () => (float[N, O, Hp, Wp] Y_pooled) {
      Y_pooled = MaxPool <kernel_shape: ints = @pool_kernel, strides: ints = @pool_strides, pads: ints = @pool_pads> (p)
    }
  >
}
"""


def quantized_body(opset: int) -> onnx.FunctionProto:
    """The operator in standard ONNX operators; `opset` must be the default-domain version the model imports."""
    slope = SLOPE_BODY.replace("  Y = If", "  p = If")
    pool = ", ".join(f"{name}: ints = {value}" for name, value in NO_POOL.items())
    return parse_body(_BODY.replace("SLOPE", slope).replace("POOL", pool), QUANTIZED_OP, opset)


def _infer_shape(context: onnx.shape_inference.InferenceContext) -> None:
    def ints(name: str) -> list[int]:
        attribute = context.get_attribute(name)
        return list(attribute.ints) if attribute is not None else NO_POOL[name]

    infer_shape(context, 2, ints("strides"), ints("pads"), [1, 1])
    y = context.get_output_type(0)
    for i, dim in enumerate(list(y.tensor_type.shape.dim)[2:]):
        if dim.HasField("dim_value"):
            kernel, stride, (before, after) = ints("pool_kernel")[i], ints("pool_strides")[i], ints("pool_pads")[i::2]
            dim.dim_value = output_size(dim.dim_value, kernel, stride, before, after, 1)
    context.set_output_type(0, y)


def _schema() -> OpSchema:
    types = dict.fromkeys(QUANTIZED_INPUTS, "tensor(float)") | {"W": "tensor(int8)"}
    kind = OpSchema.AttrType
    kinds = dict(zip(QUANTIZED_ATTRIBUTES, (kind.INTS, kind.INTS, kind.FLOAT, kind.INT), strict=True))
    schema = OpSchema(
        QUANTIZED_OP,
        DOMAIN,
        VERSION,
        doc="8-bit convolution: Y = max_pool(prelu(scale * conv(clip(round(X / x_scale)), W) + bias, slope))",
        inputs=[OpSchema.FormalParameter(name, types[name]) for name in QUANTIZED_INPUTS],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        attributes=[
            *[OpSchema.Attribute(name, kind, required=True) for name, kind in kinds.items()],
            *[OpSchema.Attribute(name, onnx.helper.make_attribute(name, value)) for name, value in NO_POOL.items()],
        ],
    )
    schema.set_type_and_shape_inference_function(_infer_shape)
    return schema


if not onnx.defs.has(QUANTIZED_OP, DOMAIN):
    onnx.defs.register_schema(_schema())
