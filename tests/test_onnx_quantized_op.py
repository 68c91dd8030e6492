"""siman.QuantizedConv2d in stock ONNX Runtime, whose function body must give the reference's bits."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_onnx_op import FLOAT, assert_same_bits, session

from siman_convert.errors import InputError
from siman_convert.onnx_op import DOMAIN, MIN_OPSET, VERSION
from siman_convert.onnx_quantized_op import (
    MAX_TAPS,
    NO_POOL,
    QUANTIZED_ATTRIBUTES,
    QUANTIZED_INPUTS,
    QUANTIZED_OP,
    quantized_body,
)
from siman_convert.runtime import native
from siman_convert.runtime.reference import quantized_conv2d

needs_library = pytest.mark.skipif(native.find_library() is None, reason="the native library was not built here")


def quantized_layer(rng, channels, filters, *, kernel=(3, 3), slope=0.25, x_scale=0.05, x_zero_point=100, **changes):
    """(W, scale, bias, slope), attributes."""
    W = rng.integers(-127, 128, (filters, channels, *kernel)).astype(np.int8)
    scale, bias = (rng.standard_normal(filters).astype(np.float32) for _ in range(2))
    slope = np.broadcast_to(np.float32(slope), filters).copy()
    attributes = {"strides": [1, 1], "pads": [1, 1, 1, 1], "x_scale": float(np.float32(x_scale))} | changes
    return (W, scale, bias, slope), attributes | {"x_zero_point": x_zero_point}


def pool(kernel, strides, pads):
    return {"pool_kernel": list(kernel), "pool_strides": list(strides), "pool_pads": list(pads)}


def make_quantized_model(layers, opset=20, names_of_x=("N", None, None, None)):
    """A chain of QuantizedConv2d nodes."""
    nodes, initializers = [], []
    for i, (arrays, attributes) in enumerate(layers):
        names = [f"{name}{i}" for name in QUANTIZED_INPUTS[1:]]
        initializers += [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True)]
        x, y = (f"y{i - 1}" if i else "x"), (f"y{i}" if i < len(layers) - 1 else "y")
        nodes.append(helper.make_node(QUANTIZED_OP, [x, *names], [y], f"node{i}", domain=DOMAIN, **attributes))
    inputs = [helper.make_tensor_value_info("x", FLOAT, names_of_x)]
    outputs = [helper.make_tensor_value_info("y", FLOAT, ("N", None, None, None))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[quantized_body(opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def in_reference(X, layers):
    for arrays, attributes in layers:
        X = quantized_conv2d(X, *arrays, **attributes)
    return X


@pytest.fixture
def chain():
    rng = np.random.default_rng(7)
    return [
        quantized_layer(
            rng, 3, 16, kernel=(7, 7), slope=0, strides=[2, 2], pads=[3] * 4, **pool((2, 3), (1, 2), [1, 2, 0, 1])
        ),
        quantized_layer(rng, 16, 11, slope=1, x_scale=40, x_zero_point=0),
        quantized_layer(rng, 11, 8, kernel=(1, 1), pads=[0] * 4, x_scale=3e4),
    ]


@pytest.mark.parametrize("batch", [1, 7, 0])
def test_chain_runs_with_any_batch(chain, batch):
    X = np.random.default_rng(batch).standard_normal((batch, 3, 19, 20)).astype(np.float32)
    expected = in_reference(X, chain)
    assert_same_bits(session(make_quantized_model(chain)).run(None, {"x": X})[0], expected)
    assert not batch or len(np.unique(expected)) > 400


@needs_library
def test_a_session_with_our_kernels_takes_the_same_bits(chain):
    """By its own kernel or, of a library that does not know the operator, by the function."""
    X = np.random.default_rng(3).standard_normal((2, 3, 19, 20)).astype(np.float32)
    opened = native.open_session(make_quantized_model(chain).SerializeToString(), use_kernels=True)
    assert_same_bits(opened.run(None, {"x": X})[0], in_reference(X, chain))


def test_what_is_left_in_the_session(chain, tmp_path):
    """Slopes 0, 1 and 1/4. Inlined; weights are float, whole and unscaled; all Ifs gone; Round still between Conv and Mul."""
    path = tmp_path / "optimized.onnx"
    session(make_quantized_model(chain), optimized_to=path)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert QUANTIZED_OP not in kinds
    assert not model.functions
    counts = {
        "Conv": 3,
        "MaxPool": 1,
        "Round": 6,
        "Div": 3,
        "Where": 3,
        "LeakyRelu": 1,
        "Max": 1,
        "Cast": 0,
        "If": 0,
        "Unsqueeze": 0,
    }
    assert {kind: kinds.count(kind) for kind in counts} == counts
    weights = [i for i in model.graph.initializer if len(i.dims) == 4 and i.dims[1] > 1]
    assert [i.data_type for i in weights] == [FLOAT] * 3
    for values in (numpy_helper.to_array(i) for i in weights):
        np.testing.assert_array_equal(values, np.round(values))
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert len(node.input) == 2  # no bias was folded in


HALVES = (np.arange(-600, 600) / 2).astype(np.float32)  # of a step: ties, and both sides of the range
AWKWARD = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-39, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)
IMAGES = st.sampled_from(["ordinary", "ordinary", "ties", "awkward"])
SLOPES = st.sampled_from([0, 1, 0.25, -0.5, 1.5, "mixed"])
SCALES = st.sampled_from([1.0, 0.5, 0.1, 1 / 255, 3.3e-3, 1e-30, 1e30, 1e-40])


def draw_image(kind, rng, shape, x_scale):
    if kind == "ordinary":
        return (rng.standard_normal(shape) * 100 * x_scale).astype(np.float32)
    values = rng.choice(HALVES, shape) * np.float32(x_scale)
    return values if kind == "ties" else np.where(rng.random(shape) < 0.2, rng.choice(AWKWARD, shape), values)


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_same_bits_as_the_reference(data, seed):
    rng = np.random.default_rng(seed)

    def draw(low, high, count):
        return [data.draw(st.integers(low, high)) for _ in range(count)]

    kernel, strides, pads = draw(1, 4, 2), draw(1, 3, 2), draw(0, 3, 4)
    channels = data.draw(st.integers(1, MAX_TAPS // (kernel[0] * kernel[1])))
    filters = data.draw(st.sampled_from([1, 3, 8, 17]))
    image = [max(1, kernel[i] - pads[i] - pads[i + 2]) + data.draw(st.integers(0, 5)) for i in (0, 1)]
    x_scale, slope = data.draw(SCALES), data.draw(SLOPES)
    arrays, attributes = quantized_layer(
        rng,
        channels,
        filters,
        kernel=kernel,
        strides=strides,
        pads=pads,
        x_scale=x_scale,
        x_zero_point=data.draw(st.sampled_from([0, 255, 1, 128, 77])),
        slope=rng.standard_normal(filters) * 2 if slope == "mixed" else slope,
    )
    if data.draw(st.booleans()):
        convolved = [(image[i] + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i in (0, 1)]
        sides = [data.draw(st.integers(1, min(size, 4))) for size in convolved]
        attributes |= pool(sides, draw(1, 3, 2), [data.draw(st.integers(0, side - 1)) for side in (*sides, *sides)])
    elif data.draw(st.booleans()):
        arrays[2][:] = rng.choice(AWKWARD, filters)  # bias; ONNX Runtime's pools of what is not finite are its own
    X = draw_image(data.draw(IMAGES), rng, (data.draw(st.integers(1, 3)), channels, *image), x_scale)
    got = session(make_quantized_model([(arrays, attributes)])).run(None, {"x": X})[0]
    assert_same_bits(got, quantized_conv2d(X, *arrays, **attributes))


@pytest.mark.parametrize(("value", "zero_point", "sum_"), [(1e9, 0, 518 * 255 * 127), (-1e9, 255, -518 * 255 * 127)])
def test_the_largest_sum_is_exact(value, zero_point, sum_):
    """All products alike, but for one that makes the sum odd: a float32 above 2^24 could not hold it."""
    X, W = np.full((1, MAX_TAPS, 1, 1), value, np.float32), np.full((1, MAX_TAPS, 1, 1), 127, np.int8)
    X[0, 0] = 1 if zero_point == 0 else -1
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    attributes = {"strides": [1, 1], "pads": [0] * 4, "x_scale": 1.0, "x_zero_point": zero_point}
    expected = sum_ - np.sign(value) * 254 * 127
    got = session(make_quantized_model([((W, one, zero, one), attributes)])).run(None, {"x": X})[0]
    assert got.item() == quantized_conv2d(X, W, one, zero, one, **attributes).item() == expected


def test_a_true_division():
    """Times the reciprocal, 1.55 would be 15.5 steps of 0.1, and so 16."""
    X, W = np.full((1, 1, 1, 1), 1.55, np.float32), np.ones((1, 1, 1, 1), np.int8)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    attributes = {"strides": [1, 1], "pads": [0] * 4, "x_scale": float(np.float32(0.1)), "x_zero_point": 0}
    assert session(make_quantized_model([((W, one, zero, one), attributes)])).run(None, {"x": X})[0].item() == 15


def test_a_residual_network_stem_at_full_size():
    """Where ONNX Runtime blocks, packs and sums as it does in earnest."""
    rng = np.random.default_rng(11)
    usual = pool((3, 3), (2, 2), [1] * 4)
    layers = [quantized_layer(rng, 3, 64, kernel=(7, 7), slope=0, strides=[2, 2], pads=[3] * 4, **usual)]
    X = rng.standard_normal((1, 3, 112, 112)).astype(np.float32)
    assert_same_bits(session(make_quantized_model(layers)).run(None, {"x": X})[0], in_reference(X, layers))


@pytest.mark.parametrize("opset", range(MIN_OPSET, 24))
def test_every_opset(opset, chain):
    X = np.random.default_rng(opset).standard_normal((2, 3, 9, 9)).astype(np.float32)
    assert_same_bits(session(make_quantized_model(chain, opset)).run(None, {"x": X})[0], in_reference(X, chain))


def test_the_body_means_the_same_to_the_onnx_evaluator(chain):
    X = np.random.default_rng(5).standard_normal((2, 3, 19, 20)).astype(np.float32)
    evaluator = onnx.reference.ReferenceEvaluator(make_quantized_model(chain[:1]))
    assert_same_bits(evaluator.run(None, {"x": X})[0], in_reference(X, chain[:1]))


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, 0, 1000])
def test_unsupported_opset(opset):
    with pytest.raises(InputError, match=f"siman.QuantizedConv2d needs .*opset {MIN_OPSET} to .*got {opset}"):
        quantized_body(opset)


def test_function_and_schema_agree():
    function, schema = quantized_body(20), onnx.defs.get_schema(QUANTIZED_OP, VERSION, DOMAIN)
    assert tuple(function.input) == tuple(i.name for i in schema.inputs) == QUANTIZED_INPUTS
    assert tuple(function.attribute) == QUANTIZED_ATTRIBUTES
    assert {a.name: list(a.ints) for a in function.attribute_proto} == NO_POOL
    assert {name for name, a in schema.attributes.items() if a.required} == set(QUANTIZED_ATTRIBUTES)
    assert {name: list(a.default_value.ints) for name, a in schema.attributes.items() if not a.required} == NO_POOL
    assert (function.domain, function.name) == (DOMAIN, QUANTIZED_OP)


def test_shape_inference(chain):
    model = make_quantized_model(chain, names_of_x=("N", 3, 19, 20))
    del model.functions[:]  # by the schema alone
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    dims = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info
    }
    assert dims == {"y0": ["N", 16, 10, 6], "y1": ["N", 11, 10, 6]}


@pytest.mark.parametrize("missing", QUANTIZED_ATTRIBUTES)
def test_a_node_without_an_attribute_is_refused_by_the_checker(chain, missing):
    arrays, attributes = chain[0]
    with pytest.raises(onnx.checker.ValidationError, match=missing):
        make_quantized_model([(arrays, {k: v for k, v in attributes.items() if k != missing})])
