"""siman.QuantizedConv2d in the numpy reference, against plain loops over Python integers."""

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from test_onnx_quantized_op import make_quantized_model, quantized_layer

from siman_convert.errors import InputError
from siman_convert.runtime.reference import evaluator, quantized_conv2d

INF, NAN = float("inf"), float("nan")


def code(value, x_scale, zero_point):
    """d of one value, an int; `round` of Python takes halves to the even one."""
    with np.errstate(all="ignore"):
        steps = np.float32(value) / np.float32(x_scale)
    if np.isnan(steps):
        return -zero_point
    if np.isinf(steps):
        return 255 - zero_point if steps > 0 else -zero_point
    return min(max(round(float(steps)), -zero_point), 255 - zero_point)


def oracle(X, W, scale, bias, slope, *, strides, pads, x_scale, x_zero_point, **pool):
    filters, channels, k_h, k_w = W.shape
    top, left, bottom, right = pads
    batch, _, height, width = X.shape
    out_h = len(range(0, top + height + bottom - k_h + 1, strides[0]))
    out_w = len(range(0, left + width + right - k_w + 1, strides[1]))
    d = {at: code(X[at], x_scale, x_zero_point) for at in np.ndindex(*X.shape)}
    Y = np.zeros((batch, filters, out_h, out_w), np.float32)
    for n, o, y, x in np.ndindex(*Y.shape):
        acc = sum(
            d.get((n, c, y * strides[0] - top + i, x * strides[1] - left + j), 0) * int(W[o, c, i, j])
            for c, i, j in itertools.product(range(channels), range(k_h), range(k_w))
        )
        v = np.float32(np.float32(scale[o] * np.float32(acc)) + bias[o])
        Y[n, o, y, x] = v if v >= 0 else slope[o] * v
    return pool_oracle(Y, **pool) if pool else Y


def pool_oracle(p, *, pool_kernel, pool_strides, pool_pads):
    top, left, bottom, right = pool_pads
    height, width = p.shape[2:]
    rows = range(-top, height + bottom - pool_kernel[0] + 1, pool_strides[0])
    columns = range(-left, width + right - pool_kernel[1] + 1, pool_strides[1])
    Y = np.full((*p.shape[:2], len(rows), len(columns)), -np.inf, np.float32)
    for (n, o, y, x), i, j in itertools.product(np.ndindex(*Y.shape), *map(range, pool_kernel)):
        row, column = rows[y] + i, columns[x] + j
        if 0 <= row < height and 0 <= column < width and p[n, o, row, column] > Y[n, o, y, x]:
            Y[n, o, y, x] = p[n, o, row, column]
    return Y


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_equals_the_oracle(data, seed):
    rng = np.random.default_rng(seed)

    def draw(low, high, count):
        return [data.draw(st.integers(low, high)) for _ in range(count)]

    kernel, strides, pads = draw(1, 3, 2), draw(1, 3, 2), draw(0, 3, 4)
    image = [max(1, kernel[i] - pads[i] - pads[i + 2]) + data.draw(st.integers(0, 4)) for i in (0, 1)]
    channels, filters, batch = data.draw(st.sampled_from([1, 2, 7])), data.draw(st.integers(1, 3)), *draw(0, 2, 1)
    x_scale = data.draw(st.sampled_from([1.0, 0.1, 1 / 255, 1e-40]))
    arrays, attributes = quantized_layer(
        rng,
        channels,
        filters,
        kernel=kernel,
        strides=strides,
        pads=pads,
        slope=rng.standard_normal(filters),
        x_scale=x_scale,
        x_zero_point=data.draw(st.sampled_from([0, 1, 128, 255])),
    )
    if data.draw(st.booleans()):
        convolved = [(image[i] + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i in (0, 1)]
        sides = [data.draw(st.integers(1, min(size, 4))) for size in convolved]
        beside = [data.draw(st.integers(0, side - 1)) for side in (*sides, *sides)]
        # a window of 1x1 that does not move by more is no pool, and would keep a NaN
        attributes |= {"pool_kernel": sides, "pool_strides": [*draw(1, 3, 1), 2], "pool_pads": beside}
    steps = rng.integers(-600, 600, (batch, channels, *image)) / 2  # ties, and both sides of the range
    X = np.where(rng.random(steps.shape) < 0.1, rng.choice([NAN, INF, -INF, 3e38], steps.shape), steps * x_scale)
    Y = quantized_conv2d(X.astype(np.float32), *arrays, **attributes)
    assert Y.dtype == np.float32
    if batch:
        np.testing.assert_array_equal(Y, oracle(X.astype(np.float32), *arrays, **attributes))
    else:
        assert Y.shape[0] == 0


def one_by_one(X, *, x_scale=1.0, x_zero_point=0, scale=1.0, bias=0.0, slope=1.0, weight=1):
    """One 1x1 weight over one channel: Y is d through the epilogue."""
    X = np.asarray(X, np.float32).reshape(1, 1, 1, -1)
    numbers = [np.array([value], np.float32) for value in (scale, bias, slope)]
    W = np.full((1, 1, 1, 1), weight, np.int8)
    attributes = {"strides": [1, 1], "pads": [0] * 4, "x_scale": x_scale, "x_zero_point": x_zero_point}
    return quantized_conv2d(X, W, *numbers, **attributes).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("X", "x_scale", "zero_point", "d"),
    [
        ([0.5, 1.5, 2.5, -0.5, -1.5], 1.0, 2, [0, 2, 2, 0, -2]),  # halves to even
        ([0.49999997, 1.4999999], 1.0, 0, [0, 1]),
        ([255.4, 255.6, 300.0, -0.6], 1.0, 0, [255, 255, 255, 0]),
        ([0.4, 1.0, -254.6, -300.0], 1.0, 255, [0, 0, -255, -255]),
        ([127.0, 128.0, -128.0, -129.0], 1.0, 128, [127, 127, -128, -128]),
        ([NAN, INF, -INF], 1.0, 100, [-100, 155, -100]),
        ([NAN], 1.0, 0, [0]),
        ([1.0, 3e38], 1e-40, 7, [248, 248]),  # the quotient overflows
        ([1e-45, -1e-45, 3e-45], 1.401298464324817e-45, 5, [1, -1, 2]),  # denormals are not zeros
        ([0.3], 0.1, 0, [3]),
        ([1.55], 0.1, 0, [15]),  # 15.499999 in float32; times the reciprocal of 0.1 it is 15.5, and so 16
        ([3.15], 0.7, 0, [4]),  # 4.5, likewise 4.5000005
    ],
)
def test_codes(X, x_scale, zero_point, d):
    assert one_by_one(X, x_scale=x_scale, x_zero_point=zero_point) == d


def test_padding_is_zero_and_not_the_zero_point():
    X, W = np.full((1, 1, 1, 1), 5, np.float32), np.full((1, 1, 3, 3), 2, np.int8)
    vectors = [np.array([value], np.float32) for value in (1, 0, 1)]
    attributes = {"strides": [1, 1], "pads": [1] * 4, "x_scale": 1.0, "x_zero_point": 100}
    assert quantized_conv2d(X, W, *vectors, **attributes).item() == 10


@pytest.mark.parametrize(
    ("bias", "slope", "expected"),
    [(0, 0, [2, 0]), (0, 0.25, [2, -0.5]), (0, -2, [2, 4]), (-INF, 0, [NAN, NAN]), (NAN, 0, [NAN, NAN]), (INF, 0, [INF] * 2)],
)  # fmt: skip
def test_bias_and_slope(bias, slope, expected):
    np.testing.assert_array_equal(one_by_one([2, -2], x_zero_point=10, bias=bias, slope=slope), expected)


def pooled(X, **pool):
    """A row of values of 1x1 weights through a pool; a bias per filter is all that there is of a filter."""
    X = np.asarray(X, np.float32).reshape(1, 1, 1, -1)
    one, zero, W = np.ones(1, np.float32), np.zeros(1, np.float32), np.ones((1, 1, 1, 1), np.int8)
    attributes = {"strides": [1, 1], "pads": [0] * 4, "x_scale": 1.0, "x_zero_point": 128}
    return quantized_conv2d(X, W, one, zero, one, **attributes, **pool).reshape(-1).tolist()


def test_pool():
    windows = {"pool_kernel": [1, 3], "pool_strides": [1, 2], "pool_pads": [0, 1, 0, 1]}
    assert pooled([-3, -1, -2, -9, -9], **windows) == [-1, -1, -9]  # padding is no 0, and 5 columns have 3 windows
    assert pooled([-3, -1, -2, -9, -9, 7], **windows) == [-1, -1, 7]  # so have 6: the fourth would need another column
    assert pooled([1, 2, 3, 4], pool_strides=[1, 3]) == [1, 4]
    assert pooled([1, 2, 3, 4], pool_kernel=[1, 1]) == [1, 2, 3, 4]


def test_a_nan_is_left_out_of_a_pool():
    """slope 0 times -inf is NaN; where there is nothing else the largest is -inf."""
    X, W = np.zeros((1, 1, 1, 2), np.float32), np.ones((3, 1, 1, 1), np.int8)
    X[..., 1] = 5
    scale, bias = np.array([1, 1, -3e38], np.float32), np.array([NAN, 2, -1], np.float32)
    attributes = {"strides": [1, 1], "pads": [0] * 4, "x_scale": 1.0, "x_zero_point": 0, "pool_kernel": [1, 2]}
    Y = quantized_conv2d(X, W, scale, bias, np.zeros(3, np.float32), **attributes)
    np.testing.assert_array_equal(Y.reshape(-1), [-INF, 7, 0])


def test_epilogue_rounds_after_each_operation():
    # (3 * (1 + 2^-23)) - 3 in one rounding is 3 * 2^-23, in two it is 2^-21
    scale = np.float32(1 + 2.0**-23)
    assert one_by_one([3], scale=scale, bias=-3.0) == [2.0**-21]


def valid_arguments():
    vectors = {name: np.ones(4, np.float32) for name in ("scale", "bias", "slope")}
    arrays = {"X": np.ones((2, 3, 4, 4), np.float32), "W": np.ones((4, 3, 2, 2), np.int8)}
    return arrays | vectors | {"strides": [1, 1], "pads": [0, 0, 0, 0], "x_scale": 0.5, "x_zero_point": 3}


MALFORMED = {
    "X rank": ("X", np.ones((3, 4, 4), np.float32), "X must be float32 \\(N, 3, H, W\\)"),
    "X dtype": ("X", np.ones((2, 3, 4, 4)), "X must be"),
    "X channels": ("X", np.ones((2, 6, 4, 4), np.float32), "X must be"),
    "X empty": ("X", np.ones((2, 3, 0, 4), np.float32), "X must be"),
    "X list": ("X", [[1.0]], "X must be a numpy array"),
    "X smaller than the kernel": ("X", np.ones((2, 3, 1, 4), np.float32), "kernel is larger than the padded image"),
    "W dtype": ("W", np.ones((4, 3, 2, 2), np.uint8), "W must be a non-empty int8"),
    "W rank": ("W", np.ones((4, 3, 2), np.int8), "W must be a non-empty int8"),
    "W empty": ("W", np.ones((4, 3, 0, 2), np.int8), "W must be a non-empty int8"),
    "W -128": ("W", np.full((4, 3, 2, 2), -128, np.int8), "W must be -127 to 127, it holds -128"),
    "W products": ("W", np.ones((4, 173, 3, 1), np.int8), "must be at most 518, got 173\\*3\\*1"),
    "scale": ("scale", np.ones(3, np.float32), "scale must be"),
    "bias": ("bias", np.ones((4, 1), np.float32), "bias must be"),
    "slope": ("slope", np.ones(4), "slope must be"),
    "strides zero": ("strides", [0, 1], "strides must be"),
    "strides count": ("strides", [1], "strides must be"),
    "pads negative": ("pads", [0, 0, -1, 0], "pads must be"),
    "pads overflow": ("pads", [2**31, 0, 0, 0], "pads must be"),
    "output overflow": ("pads", [2**30, 2**30, 0, 0], "more than"),
    "x_scale 0": ("x_scale", 0.0, "x_scale must be a finite float32 above 0, got 0.0"),
    "x_scale negative": ("x_scale", -0.5, "x_scale must be"),
    "x_scale NaN": ("x_scale", NAN, "x_scale must be"),
    "x_scale infinite": ("x_scale", INF, "x_scale must be"),
    "x_scale 0 in float32": ("x_scale", 1e-46, "x_scale must be"),
    "x_scale infinite in float32": ("x_scale", 1e39, "x_scale must be"),
    "x_scale whole": ("x_scale", 1, "x_scale must be"),
    "pool_kernel 0": ("pool_kernel", [0, 1], "pool_kernel must be 2 x integer in 1.."),
    "pool_strides count": ("pool_strides", [1], "pool_strides must be"),
    "pool_pads as wide as the pool": ("pool_pads", [0, 0, 1, 0], r"pool_pads must be below pool_kernel \[1, 1\], got"),
    "pool too large": ("pool_kernel", [4, 1], "the \\[4, 1\\] pool is larger than the padded output"),
    "x_zero_point -1": ("x_zero_point", -1, "x_zero_point must be 1 x integer in 0..255"),
    "x_zero_point 256": ("x_zero_point", 256, "x_zero_point must be"),
    "x_zero_point float": ("x_zero_point", 1.0, "x_zero_point must be"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments_are_named(case):
    name, value, message = MALFORMED[case]
    quantized_conv2d(**valid_arguments())
    with pytest.raises(InputError, match=f"^QuantizedConv2d: .*{message}"):
        quantized_conv2d(**(valid_arguments() | {name: value}))


def test_evaluator_runs_our_operator_and_not_the_function():
    rng = np.random.default_rng(0)
    arrays, attributes = quantized_layer(rng, 3, 4)
    model = make_quantized_model([(arrays, attributes)])
    del model.functions[0].node[:]
    model.functions[0].node.append(
        helper.make_node("Identity", ["X"], ["Y"])
    )  # would give Y = X if the evaluator ran it
    X = rng.standard_normal((2, 3, 5, 5)).astype(np.float32)
    expected = quantized_conv2d(X, *arrays, **attributes)
    np.testing.assert_array_equal(evaluator(model).run(None, {"x": X})[0], expected)
    wrong = onnx.reference.ReferenceEvaluator(model).run(None, {"x": X})[0]
    np.testing.assert_array_equal(wrong, X)
