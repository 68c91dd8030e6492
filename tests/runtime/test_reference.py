"""The numpy reference against an oracle that shares nothing with it: plain loops over unpacked +-1 floats."""

import itertools
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from siman_convert.errors import InputError
from siman_convert.onnx_op import function_body
from siman_convert.runtime.reference import binary_conv2d, evaluator, sample_mean

INF, NAN = float("inf"), float("nan")


def oracle_mean(x):
    """The order of summation, read off the page: one float64 addition at a time."""
    flat, total = [float(v) for v in x.reshape(-1)], 0.0
    for start in range(0, len(flat), 4096):
        sums = [0.0] * 32
        for i, value in enumerate(flat[start : start + 4096]):
            sums[i % 32] += value
        for width in (16, 8, 4, 2, 1):
            sums = [sums[k] + sums[k + width] for k in range(width)]
        total += sums[0]
    return np.float32(total / len(flat))


def oracle(X, W, scale, bias, residual, slope, *, channels, strides, pads, dilations, group, center):
    filters, k_h, k_w, _ = W.shape
    w = np.zeros((filters, channels, k_h, k_w))
    for o, c, i, j in np.ndindex(*w.shape):
        w[o, c, i, j] = 1.0 if (int(W[o, i, j, c // 8]) >> (c % 8)) & 1 else -1.0
    xb = np.stack([np.where(x >= (oracle_mean(x) if center else 0), 1.0, -1.0) for x in X])
    top, left, bottom, right = pads
    xb = np.pad(xb, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out_h = len(range(0, xb.shape[2] - dilations[0] * (k_h - 1), strides[0]))
    out_w = len(range(0, xb.shape[3] - dilations[1] * (k_w - 1), strides[1]))
    Y = np.zeros((len(X), filters, out_h, out_w), np.float32)
    residual = np.broadcast_to(residual, Y.shape)
    for n, o, y, x in np.ndindex(*Y.shape):
        first = o // (filters // group) * channels
        rows = [y * strides[0] + i * dilations[0] for i in range(k_h)]
        columns = [x * strides[1] + j * dilations[1] for j in range(k_w)]
        acc = sum(
            xb[n, first + c, rows[i], columns[j]] * w[o, c, i, j]
            for c, i, j in itertools.product(range(channels), range(k_h), range(k_w))
        )
        v = np.float32(np.float32(scale[o] * np.float32(acc)) + bias[o])
        v = np.float32(v + residual[n, o, y, x])
        Y[n, o, y, x] = v if v >= 0 else slope[o] * v
    return Y


@st.composite
def cases(draw):
    def pair(low, high):
        return [draw(st.integers(low, high)), draw(st.integers(low, high))]

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    group, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 8, 9, 65]))
    filters = group * draw(st.integers(1, 3))
    kernel, dilations = pair(1, 3), pair(1, 2)
    strides, pads = pair(1, 3), pair(0, 3) + pair(0, 3)
    # at least as large as the dilated kernel, less the padding
    image = [
        max(1, dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2]) + draw(st.integers(0, 4)) for i in (0, 1)
    ]
    out = [(image[i] + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
    batch = draw(st.integers(0, 2))
    W = np.packbits(rng.random((filters, *kernel, channels)) < 0.5, axis=-1, bitorder="little")
    shape = draw(st.sampled_from([(batch, filters, *out), (1, 1, 1, 1)]))
    X = rng.standard_normal((batch, group * channels, *image)).astype(np.float32)
    inputs = (X, W, *(rng.standard_normal(s).astype(np.float32) for s in (filters, filters, shape, filters)))
    attributes = {
        "channels": channels,
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "group": group,
        "center": draw(st.integers(0, 1)),
    }
    return inputs, attributes


@given(cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_oracle(case):
    inputs, attributes = case
    Y = binary_conv2d(*inputs, **attributes)
    assert Y.dtype == np.float32
    if len(inputs[0]):
        np.testing.assert_array_equal(Y, oracle(*inputs, **attributes))
    else:
        assert Y.shape[0] == 0


@pytest.mark.parametrize("count", [1, 31, 32, 33, 4095, 4096, 4097, 8192, 9001])
def test_mean_sums_in_the_stated_order(count):
    # values of very different size that cancel: what is left is rounding errors, and another order makes others
    rng = np.random.default_rng(count)
    half = rng.standard_normal((3, count // 2)) * 2.0 ** rng.integers(-40, 40, (3, count // 2))
    pairs = np.concatenate([half, -half, np.ones((3, count % 2))], axis=1).astype(np.float32)
    X = rng.permuted(pairs, axis=1).reshape(3, count, 1, 1)
    m = sample_mean(X)
    assert m.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(m.reshape(-1), [oracle_mean(x) for x in X])


def test_the_order_of_summation_can_be_told():
    # 2^60 in partial sum 0 and 1 in partial sum 16 of the first fold: the 1 is lost; 1 at index 33 meets -2^60 too late
    x = np.zeros((1, 64, 1, 1), np.float32)
    x[0, [0, 16, 32, 1], 0, 0] = [2.0**60, 1.0, -(2.0**60), 64.0]
    assert sample_mean(x).item() == np.float32(65 / 64)  # 2^60 - 2^60 first (both in sum 0), then + 1, then + 64
    x[0, [32, 48], 0, 0] = [0.0, -(2.0**60)]
    assert sample_mean(x).item() == 1.0  # sum 16 is 1 - 2^60, which rounds to -2^60


def one_by_one(X, *, center, residual=0.0, slope=1.0, scale=1.0, bias=0.0):
    """1x1 weight +1 over one channel: Y is the sign, through the epilogue."""
    X = np.asarray(X, np.float32).reshape(1, 1, 1, -1)
    numbers = [np.array([value], np.float32) for value in (scale, bias, residual, slope)]
    numbers[2] = numbers[2].reshape(1, 1, 1, 1)
    W = np.ones((1, 1, 1, 1), np.uint8)
    attributes = {"channels": 1, "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    return binary_conv2d(X, W, *numbers, **attributes, center=center).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("X", "center", "signs"),
    [
        ([0.0, -0.0, 1e-45, -1e-45], 0, [1, 1, 1, -1]),
        ([NAN, INF, -INF, 0.0], 0, [-1, 1, -1, 1]),
        ([5.0, 5.0, 5.0], 1, [1, 1, 1]),
        ([0.1] * 7, 1, [1] * 7),  # the mean of equal values is that value
        ([NAN, 1.0, 2.0], 1, [-1, -1, -1]),
        ([INF, -INF, 0.0], 1, [-1, -1, -1]),
        ([INF, 1.0, -1.0], 1, [1, -1, -1]),
        ([-INF, 1.0, -1.0], 1, [1, 1, 1]),
        ([3e38, 3e38, -1.0], 1, [1, 1, -1]),  # the sum exceeds float32, not float64
    ],
)
def test_signs(X, center, signs):
    assert one_by_one(X, center=center) == signs


@pytest.mark.parametrize(
    ("residual", "slope", "expected"),
    [(0.0, 0.0, [1, 0]), (0.0, 0.25, [1, -0.25]), (0.0, -2.0, [1, 2]), (-INF, 0.0, [NAN, NAN]), (INF, 0.0, [INF, INF])],
)
def test_slope(residual, slope, expected):
    np.testing.assert_array_equal(one_by_one([1, -1], center=0, residual=residual, slope=slope), expected)


def test_epilogue_rounds_after_each_operation():
    # (3 * (1 + 2^-23)) - 3 in one rounding is 3 * 2^-23, in two it is 2^-21
    scale = np.float32(1 + 2.0**-23)
    W, X = np.full((1, 1, 1, 1), 7, np.uint8), np.ones((1, 3, 1, 1), np.float32)
    numbers = [np.array([v], np.float32) for v in (scale, -3.0)]
    attributes = {"channels": 3, "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1, "center": 0}
    zero, one = np.zeros((1, 1, 1, 1), np.float32), np.ones(1, np.float32)
    assert binary_conv2d(X, W, *numbers, zero, one, **attributes).item() == 2.0**-21


def valid_arguments():
    inputs = {
        "X": np.ones((2, 6, 4, 4), np.float32),
        "W": np.ones((4, 2, 2, 1), np.uint8),
        "scale": np.ones(4, np.float32),
        "bias": np.ones(4, np.float32),
        "residual": np.zeros((1, 1, 1, 1), np.float32),
        "slope": np.ones(4, np.float32),
    }
    return inputs | {
        "channels": 3,
        "strides": [1, 1],
        "pads": [0, 0, 0, 0],
        "dilations": [1, 1],
        "group": 2,
        "center": 1,
    }


MALFORMED = {
    "X rank": ("X", np.ones((6, 4, 4), np.float32), "X must be"),
    "X dtype": ("X", np.ones((2, 6, 4, 4)), "X must be"),
    "X channels": ("X", np.ones((2, 5, 4, 4), np.float32), "X must be"),
    "X empty": ("X", np.ones((2, 6, 0, 4), np.float32), "X must be"),
    "X list": ("X", [[1.0]], "X must be a numpy array"),
    "X smaller than the kernel": ("X", np.ones((2, 6, 1, 4), np.float32), "larger than the padded image"),
    "W dtype": ("W", np.ones((4, 2, 2, 1), np.int64), "dtype uint8"),
    "W padding bits": ("W", np.full((4, 2, 2, 1), 8, np.uint8), "padding bits beyond channel 2"),
    "W bytes": ("W", np.ones((4, 2, 2, 2), np.uint8), "packed weights"),
    "W filters": ("W", np.ones((3, 2, 2, 1), np.uint8), "3 filters of W cannot be split into 2 groups"),
    "scale": ("scale", np.ones(3, np.float32), "scale must be"),
    "bias": ("bias", np.ones((4, 1), np.float32), "bias must be"),
    "slope": ("slope", np.ones(4), "slope must be"),
    "residual": ("residual", np.ones((1, 4, 1, 1), np.float32), "residual must be"),
    "channels": ("channels", 0, "channels must be"),
    "group": ("group", 0, "group must be"),
    "strides zero": ("strides", [0, 1], "strides must be"),
    "strides count": ("strides", [1], "strides must be"),
    "strides scalar": ("strides", 1, "strides must be"),
    "pads negative": ("pads", [0, 0, -1, 0], "pads must be"),
    "pads count": ("pads", [0, 0], "pads must be"),
    "pads overflow": ("pads", [2**31, 0, 0, 0], "pads must be"),
    "output overflow": ("pads", [2**30, 2**30, 0, 0], "more than"),
    "dilations": ("dilations", [1.5, 1], "dilations must be"),
    "dilated kernel": ("dilations", [2**31 - 1, 1], "larger than the padded image"),
    "center": ("center", 2, "center must be 0 or 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments_are_named(case):
    name, value, message = MALFORMED[case]
    binary_conv2d(**valid_arguments())
    with pytest.raises(InputError, match=message):
        binary_conv2d(**(valid_arguments() | {name: value}))


def test_too_many_taps_for_exact_float32():
    arguments = valid_arguments() | {
        "channels": 2**24 + 8,
        "W": np.zeros((4, 1, 1, 2**21 + 1), np.uint8),
        "X": np.broadcast_to(np.float32(1), (1, 2**25 + 16, 1, 1)),
    }
    with pytest.raises(InputError, match="channels\\*kH\\*kW must be at most 16777216"):
        binary_conv2d(**arguments)


def small_model(op_inputs, attributes, functions):
    """Identity -> siman.BinaryConv2d -> Relu, with W and the vectors as initializers."""
    names = ["h", "W", "scale", "bias", "residual", "slope"]
    nodes = [
        helper.make_node("Identity", ["x"], ["h"]),
        helper.make_node("BinaryConv2d", names, ["b"], domain="siman", **attributes),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(a, n) for a, n in zip(op_inputs[1:], names[1:], strict=True)]
    four = ["N", None, None, None]
    value_infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, four) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value_infos[:1], value_infos[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("siman", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


@pytest.fixture
def operator_case():
    arguments = valid_arguments()
    inputs = [arguments.pop(n) for n in ("X", "W", "scale", "bias", "residual", "slope")]
    inputs[0] = np.random.default_rng(0).standard_normal(inputs[0].shape).astype(np.float32)
    return inputs, arguments


def test_evaluator_runs_our_operator_and_not_the_function(operator_case, tmp_path):
    inputs, attributes = operator_case
    wrong = function_body(20)
    del wrong.node[:]
    wrong.node.append(helper.make_node("Identity", ["X"], ["Y"]))  # would give Y = X if the evaluator ran it
    model = small_model(inputs, attributes, [wrong])
    expected = np.maximum(binary_conv2d(*inputs, **attributes), 0)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    for source in (model, path, str(path)):
        np.testing.assert_array_equal(evaluator(source).run(None, {"x": inputs[0]})[0], expected)
    assert len(model.functions) == 1  # the caller's model is left as it was


def test_evaluator_reaches_nodes_inside_other_functions(operator_case):
    inputs, attributes = operator_case
    inner = helper.make_node("BinaryConv2d", list("abcdef"), ["g"], domain="siman", **attributes)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("siman", 1)]
    wrapper = helper.make_function("other", "Block", list("abcdef"), ["g"], [inner], opsets)
    model = small_model(inputs, attributes, [wrapper, function_body(20)])
    node = model.graph.node[1]
    node.op_type, node.domain = "Block", "other"
    del node.attribute[:]
    model.opset_import.append(helper.make_opsetid("other", 1))
    expected = np.maximum(binary_conv2d(*inputs, **attributes), 0)
    np.testing.assert_array_equal(evaluator(model).run(None, {"x": inputs[0]})[0], expected)


def test_evaluator_refuses_what_it_cannot_read(operator_case, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="expected a readable ONNX file"):
        evaluator(path)
    model = small_model(*operator_case, [])
    path.write_bytes(model.SerializeToString()[:-7])
    with pytest.raises(InputError, match="expected a readable ONNX file"):
        evaluator(path)
    model.opset_import[1].version = 2
    with pytest.raises(InputError, match="version 2, this siman has 1"):
        evaluator(model)


def test_exact_mean_needs_no_order():
    X = np.random.default_rng(3).integers(-8192, 8192, (2, 5, 9, 9)).astype(np.float32) / 1024
    exact = [np.float32(math.fsum(x.reshape(-1).tolist()) / x.size) for x in X]
    np.testing.assert_array_equal(sample_mean(X).reshape(-1), exact)
