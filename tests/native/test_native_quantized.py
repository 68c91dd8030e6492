"""siman.QuantizedConv2d of the C library and inside ONNX Runtime, against the numpy reference, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_library import NativeError, assert_same_with_signs
from test_native import VARIANTS
from test_native_ort import as_input, attribute, initializer, session
from test_onnx_quantized_op import in_reference, make_quantized_model, quantized_layer

from siman_convert.onnx_quantized_op import MAX_TAPS, QUANTIZED_OP
from siman_convert.runtime.reference import quantized_conv2d

ODD = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)


def draw_image(kind, rng, shape, x_scale):
    values = rng.standard_normal(shape) * 100 * x_scale
    if kind == "halves":  # between two steps the even one counts
        values = rng.integers(-700, 700, shape) / 2 * x_scale
    values = np.clip(values, -3e38, 3e38).astype(np.float32)
    return np.where(rng.random(shape) < 0.05, rng.choice(ODD, shape), values) if kind == "odd" else values


@st.composite
def cases(draw):
    def pair(low, high):
        return [draw(st.integers(low, high)), draw(st.integers(low, high))]

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kernel, strides, pads = pair(1, 7), pair(1, 3), pair(0, 3) + pair(0, 3)
    channels = draw(st.integers(1, min(70, MAX_TAPS // (kernel[0] * kernel[1]))))
    filters = draw(st.sampled_from([1, 3, 7, 8, 16, 17, 31, 64, 65]))
    least = [max(1, kernel[i] - pads[i] - pads[i + 2]) for i in range(2)]
    size = [draw(st.integers(least[i], least[i] + 20)) for i in range(2)]
    x_scale = float(np.float32(draw(st.sampled_from([0.0186, 1.0, 0.5, 1e-45, 1e-39, 3e38]))))
    attributes = {
        "strides": strides,
        "pads": pads,
        "x_scale": x_scale,
        "x_zero_point": draw(st.sampled_from([0, 255, 128]) | st.integers(0, 255)),
    }
    if draw(st.booleans()):
        convolved = [(size[i] + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i in range(2)]
        sides = [draw(st.integers(1, min(convolved[i], 5))) for i in range(2)]
        attributes |= {"pool_kernel": sides, "pool_strides": pair(1, 4)}
        attributes["pool_pads"] = [draw(st.integers(0, side - 1)) for side in (*sides, *sides)]
    shape = (draw(st.integers(0, 4)), channels, *size)
    X = draw_image(draw(st.sampled_from(["normal", "halves", "odd"])), rng, shape, x_scale)
    W = rng.integers(-127, 128, (filters, channels, *kernel)).astype(np.int8)
    scale, bias, slope = (rng.standard_normal(filters).astype(np.float32) for _ in range(3))
    slope = draw(st.sampled_from([slope, np.zeros_like(slope), np.ones_like(slope)]))
    return (X, W, scale, bias, slope), attributes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_bits_of_the_reference(library, variant):
    if not library.variants().get(variant):
        pytest.skip(f"{variant} does not run on this processor")

    @given(cases(), st.integers(0, 4))
    @settings(max_examples=150, deadline=None)
    def sweep(case, threads):
        inputs, attributes = case
        ran = []
        Y = library.quantized_conv(*inputs, **attributes, variant=variant, threads=threads, ran=ran)
        np.testing.assert_array_equal(Y, quantized_conv2d(*inputs, **attributes))
        assert ran == [variant]

    sweep()


def one_layer():
    rng = np.random.default_rng(0)
    (W, scale, bias, slope), attributes = quantized_layer(rng, 16, 8)
    X = rng.standard_normal((1, 16, 6, 6)).astype(np.float32)
    return {"X": X, "W": W, "scale": scale, "bias": bias, "slope": slope} | attributes


@pytest.mark.parametrize("pool", [{}, {"pool_kernel": [2, 2]}])
def test_nothing_is_added_where_there_is_no_residual(library, pool):
    """Not even 0, which would make 0 of -0."""
    layer = one_layer() | pool
    layer |= {"W": np.zeros_like(layer["W"]), "scale": -abs(layer["scale"]), "bias": np.full(8, -0.0, np.float32)}
    expected = quantized_conv2d(**layer)
    assert np.signbit(expected).all()
    for name, supported in library.variants().items():
        if supported:
            assert_same_with_signs(library.quantized_conv(**layer, variant=name), expected)


def test_pads_far_beyond_the_image(library):
    arguments = one_layer() | {"pads": [2**30] * 4, "strides": [2**25 - 1, 2**25 + 1]}
    np.testing.assert_array_equal(library.quantized_conv(**arguments), quantized_conv2d(**arguments))


HUGE = 2**31 - 1
MALFORMED = {
    "strides": ({"strides": [0, 1]}, "strides must be"),
    "pads": ({"pads": [0, 0, -1, 0]}, "pads must be"),
    "output": ({"pads": [HUGE] * 4}, "more than 2147483647 elements"),
    "X": ({"X": np.ones((1, 15, 6, 6), np.float32)}, "X must be"),
    "taps": ({"W": np.ones((8, 16, 3, 11), np.int8)}, "at most 518"),
    "weight": ({"W": np.full((8, 16, 3, 3), -128, np.int8)}, r"W must be in -127\.\.127"),
    "x_scale": ({"x_scale": float("nan")}, "x_scale must be"),
    "x_zero_point": ({"x_zero_point": 256}, "x_zero_point must be"),
    "null": ({"slope": None}, "null"),
    "pool strides": ({"pool_strides": [1, 0]}, "pool_strides must be"),
    "pool pads": ({"pool_kernel": [3, 2], "pool_pads": [2, 1, 2, 2]}, "pool_pads from 0 and below pool_kernel"),
    "pool": ({"pool_kernel": [7, 1]}, "the pool is larger"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments(library, case):
    changes, message = MALFORMED[case]
    library.quantized_conv(**one_layer())
    with pytest.raises(NativeError, match=message):
        library.quantized_conv(**(one_layer() | changes))


STEM_POOL = {"pool_kernel": [3, 3], "pool_strides": [2, 2], "pool_pads": [1, 1, 1, 1]}


@pytest.fixture
def chain():
    rng = np.random.default_rng(7)
    return [
        quantized_layer(rng, 3, 64, kernel=(7, 7), slope=0, strides=[2, 2], pads=[3] * 4, **STEM_POOL),
        quantized_layer(rng, 64, 11, kernel=(1, 1), slope=1, x_scale=40, strides=[2, 2], pads=[0] * 4, x_zero_point=0),
        quantized_layer(rng, 11, 130, kernel=(1, 3), pads=[0, 2, 1, 1], x_scale=3e4, x_zero_point=255),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_the_kernel_runs_not_the_function(library, chain, batch, threads, variant, monkeypatch, tmp_path):
    if not library.variants().get(variant):
        pytest.skip(f"{variant} does not run on this processor")
    monkeypatch.setenv("SIMAN_ISA", variant)
    X = np.random.default_rng(batch).standard_normal((batch, 3, 37, 40)).astype(np.float32)
    opened = session(library, make_quantized_model(chain), threads=threads, profile=tmp_path / "profile")
    np.testing.assert_array_equal(opened.run(None, {"x": X})[0], in_reference(X, chain))
    with Path(opened.end_profiling()).open() as file:
        kinds = [event["args"]["op_name"] for event in json.load(file) if "op_name" in event.get("args", {})]
    assert kinds.count(QUANTIZED_OP) == len(chain)
    assert "Conv" not in kinds


def test_shape_inference_keeps_the_batch_symbolic(library, chain):
    model = make_quantized_model(chain, names_of_x=("N", 3, 37, 40))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert session(library, model).get_outputs()[0].shape == ["N", 130, 6, 6]


ONES, INT8 = np.ones, np.int8
MALFORMED_NODES = {
    "no strides": (attribute(strides=None), "strides"),
    "one stride": (attribute(strides=[1]), "strides"),
    "pads of another type": (attribute(pads=1.5), "pads"),
    "negative pad": (attribute(pads=[0, 0, -1, 0]), "pads must be"),
    "one pool stride": (attribute(pool_strides=[2]), "pool_strides must be 2 integers"),
    "pool of another type": (attribute(pool_kernel=3), "pool_kernel"),
    "pool of floats": (attribute(pool_kernel=[3.0, 3.0]), "pool_kernel"),
    "pool kernel": (attribute(pool_kernel=[3, 0]), "pool_kernel and pool_strides must be"),
    "pool pads": (attribute(pool_pads=[1, 1, 3, 1]), "pool_pads from 0 and below"),
    "pool pads without a pool": (attribute(pool_kernel=None, pool_strides=None), "pool_pads from 0 and below"),
    "no x_scale": (attribute(x_scale=None), "x_scale must be"),
    "x_scale of another type": (attribute(x_scale=1), "x_scale must be"),
    "x_scale 0": (attribute(x_scale=0.0), "x_scale must be"),
    "x_scale infinite": (attribute(x_scale=float("inf")), "x_scale must be"),
    "no x_zero_point": (attribute(x_zero_point=None), "x_zero_point must be"),
    "x_zero_point of another type": (attribute(x_zero_point=1.0), "x_zero_point must be"),
    "x_zero_point": (attribute(x_zero_point=256), "x_zero_point must be"),
    "x_zero_point beyond 32 bits": (attribute(x_zero_point=2**32 + 1), "x_zero_point must be"),
    "W rank": (initializer("W", ONES((64, 21, 7), INT8)), "W must be"),
    "W empty": (initializer("W", ONES((64, 3, 0, 7), INT8)), "kernel"),
    "W type": (initializer("W", ONES((64, 3, 7, 7), np.uint8)), "uint8|type"),
    "W -128": (initializer("W", np.full((64, 3, 7, 7), -128, INT8)), r"W must be in -127\.\.127"),
    "W too large": (initializer("W", ONES((64, 3, 13, 14), INT8)), "at most 518"),
    "W input": (as_input("W"), "W must be constant"),
    "scale": (initializer("scale", ONES(63, np.float32)), "scale must be"),
    "bias rank": (initializer("bias", ONES((64, 1), np.float32)), "bias must be"),
    "slope input": (as_input("slope"), "slope must be constant"),
    "four inputs": (lambda model: model.graph.node[0].input.pop(), "input"),
}


@pytest.mark.parametrize("case", MALFORMED_NODES)
def test_malformed_node(library, chain, case):
    change, message = MALFORMED_NODES[case]
    model = make_quantized_model(chain[:1])
    session(library, model)
    change(model)
    with pytest.raises(Exception, match=message):
        session(library, model)


@pytest.mark.parametrize(("shape", "message"), [((1, 4, 9, 9), "X must be"), ((1, 3, 0, 9), "X must be")])
def test_malformed_run(library, chain, shape, message):
    with pytest.raises(Exception, match=message):
        session(library, make_quantized_model(chain[:1])).run(None, {"x": np.ones(shape, np.float32)})
