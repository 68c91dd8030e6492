"""siman.BinaryConv2d in stock ONNX Runtime: nothing of ours is loaded there, the function body does the work."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from siman_convert.bits import pack_weight_bits
from siman_convert.errors import InputError
from siman_convert.onnx_op import ATTRIBUTES, DOMAIN, INPUTS, MIN_OPSET, OP_NAME, VERSION, function_body
from siman_convert.runtime.reference import binary_conv2d

FLOAT = onnx.TensorProto.FLOAT


def make_model(layers, residual_is_input=False, opset=20, names_of_x=("N", None, None, None)):
    """A chain of BinaryConv2d nodes; a layer is (inputs after X, attributes)."""
    nodes, initializers = [], []
    graph_inputs = [helper.make_tensor_value_info("x", FLOAT, names_of_x)]
    for i, (arrays, attributes) in enumerate(layers):
        names = [f"{name}{i}" for name in INPUTS[1:]]
        for name, array in zip(names, arrays, strict=True):
            if name.startswith("residual") and residual_is_input:
                graph_inputs.append(helper.make_tensor_value_info(name, FLOAT, array.shape))
            else:
                initializers.append(numpy_helper.from_array(array, name))
        x, y = (f"y{i - 1}" if i else "x"), (f"y{i}" if i < len(layers) - 1 else "y")
        nodes.append(helper.make_node(OP_NAME, [x, *names], [y], domain=DOMAIN, name=f"node{i}", **attributes))
    output = helper.make_tensor_value_info("y", FLOAT, ("N", None, None, None))
    graph = helper.make_graph(nodes, "g", graph_inputs, [output], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function_body(opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model, optimized_to=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def layer(rng, channels_in, filters, *, group=1, kernel=(3, 3), slope=0.25, center=1, residual=None, **changes):
    channels = channels_in // group
    W = pack_weight_bits(rng.random((filters, channels, *kernel)) < 0.5)
    scale, bias = (rng.standard_normal(filters).astype(np.float32) for _ in range(2))
    residual = np.zeros((1, 1, 1, 1), np.float32) if residual is None else residual
    slope = np.broadcast_to(np.float32(slope), filters).copy()
    geometry = {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1]} | changes
    return (W, scale, bias, residual, slope), {"channels": channels, "group": group, "center": center, **geometry}


def assert_same_bits(got, expected):
    """Equal bit for bit; a NaN is a NaN, and the sign of a zero is not part of the operator's meaning."""
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def in_reference(X, layers):
    for arrays, attributes in layers:
        X = binary_conv2d(X, *arrays, **attributes)
    return X


@pytest.fixture
def chain():
    rng = np.random.default_rng(7)
    return [layer(rng, 16, 24, slope=0), layer(rng, 24, 11, group=1, strides=[2, 2], slope=1), layer(rng, 11, 8)]


@pytest.mark.parametrize("batch", [1, 7, 0])
def test_chain_runs_with_any_batch(chain, batch):
    X = np.random.default_rng(batch).integers(-64, 64, (batch, 16, 9, 10)).astype(np.float32)
    first = chain[:1]
    assert_same_bits(session(make_model(first)).run(None, {"x": X})[0], in_reference(X, first))
    # further on the mean's last bit is free (see test_gaussian_inputs), yet these few samples agree
    assert_same_bits(session(make_model(chain)).run(None, {"x": X})[0], in_reference(X, chain))


def test_what_is_left_in_the_session(chain, tmp_path):
    """Slopes 0, 1 and 1/4. Inlined; unpacked weights folded; all Ifs gone; Round still between Conv and Mul."""
    path = tmp_path / "optimized.onnx"
    session(make_model(chain), optimized_to=path)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert OP_NAME not in kinds
    assert not model.functions
    assert not {"If", "Transpose", "Unsqueeze", "Gather", "Slice", "Shape", "Concat", "And", "Equal", "Identity"} & set(
        kinds
    )
    # per node: no reshape of a vector, no unpacking step, no second copy of the weights
    weights = [i for i in model.graph.initializer if len(i.dims) == 4 and i.dims[2:] == [3, 3]]
    assert [i.data_type for i in weights] == [FLOAT] * 3
    counts = {"Conv": 3, "Round": 3, "ReduceMean": 3, "LeakyRelu": 1, "Max": 1, "Min": 1, "PRelu": 0, "Where": 0}
    assert {kind: kinds.count(kind) for kind in counts} == counts
    user_of = {name: node for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert len(node.input) == 2  # no bias was folded in
            after = user_of[node.output[0]]
            after = user_of[after.output[0]] if after.op_type == "ReorderOutput" else after
            assert after.op_type == "Round"
    for values in (numpy_helper.to_array(i) for i in weights):
        assert set(np.unique(values)) <= {-2.0, 0.0, 2.0}  # 0: ONNX Runtime's own padding of its layout


def test_no_mean_is_computed_without_center(tmp_path):
    path = tmp_path / "optimized.onnx"
    session(make_model([layer(np.random.default_rng(0), 8, 8, center=0)]), optimized_to=path)
    assert not {"If", "ReduceMean"} & {node.op_type for node in onnx.load(path).graph.node}


SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-39, 1e-34, -1e-34], np.float32)  # sums of 53 bits at most
INFINITE = np.array([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], np.float32)
SLOPES = st.sampled_from(["zero", "one", "quarter", "negative", "mixed", "above one"])
IMAGES = st.sampled_from(["dyadic", "dyadic", "constant", "special", "infinite"])


def draw_image(kind, rng, shape):
    """Values whose float64 sum is exact in any order, or that decide it: ORT sums the mean in its own order."""
    if kind == "constant":
        return np.full(shape, rng.standard_normal(), np.float32)
    if kind == "special":
        return rng.choice(SPECIAL, shape)
    if kind == "infinite":
        return rng.choice(INFINITE, shape, p=[0.32, 0.32, 0.32, 0.02, 0.01, 0.01])
    return (rng.integers(-8192, 8193, shape) / 1024).astype(np.float32)


def draw_slope(kind, rng, filters):
    fixed = {"zero": 0, "one": 1, "quarter": 0.25, "negative": -0.5, "above one": 1.5}
    values = np.full(filters, fixed[kind]) if kind in fixed else rng.standard_normal(filters) * 2
    return values.astype(np.float32)


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_same_bits_as_the_reference(data, seed):
    rng = np.random.default_rng(seed)

    def draw(low, high, count):
        return [data.draw(st.integers(low, high)) for _ in range(count)]

    group, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 8, 9, 16, 40, 65]))
    filters = group * data.draw(st.sampled_from([1, 3, 8, 16]))
    kernel, dilations, strides, pads = draw(1, 3, 2), draw(1, 2, 2), draw(1, 3, 2), draw(0, 3, 4)
    span = [dilations[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    image = [max(1, span[i] - pads[i] - pads[i + 2]) + data.draw(st.integers(0, 5)) for i in (0, 1)]
    batch = data.draw(st.integers(1, 3))
    arrays, attributes = layer(
        rng,
        group * channels,
        filters,
        group=group,
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
        center=data.draw(st.integers(0, 1)),
    )
    X = draw_image(data.draw(IMAGES), rng, (batch, group * channels, *image))
    W, scale, bias, zero_residual, _ = arrays
    slope = draw_slope(data.draw(SLOPES), rng, filters)
    numbers = data.draw(st.sampled_from(["ordinary", "zero bias", "infinite"]))
    if numbers == "zero bias":
        bias = rng.choice(np.array([0.0, -0.0], np.float32), filters)
    shape = binary_conv2d(X, W, scale, bias, zero_residual, slope, **attributes).shape
    residual_shape = data.draw(st.sampled_from([shape, (1, 1, 1, 1)]))
    residual = rng.standard_normal(residual_shape).astype(np.float32) * data.draw(st.integers(0, 1))
    if numbers == "infinite":
        residual = rng.choice(INFINITE, residual_shape)
    arrays = (W, scale, bias, residual.astype(np.float32), slope)
    got = session(make_model([(arrays, attributes)], residual_is_input=shape == residual_shape))
    feeds = {"x": X} | ({"residual0": arrays[3]} if shape == residual_shape else {})
    assert_same_bits(got.run(None, feeds)[0], binary_conv2d(X, *arrays, **attributes))


def test_gaussian_inputs():
    """The order of summation can move the float32 mean; none of 60,000 samples showed it when this was written."""
    rng = np.random.default_rng(11)
    layers = [layer(rng, 4, 8, kernel=(1, 1), pads=[0] * 4)]
    X = (rng.standard_normal((2000, 4, 6, 6)) + rng.standard_normal((2000, 1, 1, 1))).astype(np.float32)
    differ = session(make_model(layers)).run(None, {"x": X})[0] != in_reference(X, layers)
    assert differ.any(axis=(1, 2, 3)).sum() <= 1
    large = [layer(rng, 64, 64)]
    X = rng.standard_normal((4, 64, 28, 28)).astype(np.float32)
    assert_same_bits(session(make_model(large)).run(None, {"x": X})[0], in_reference(X, large))


@pytest.mark.parametrize("opset", range(MIN_OPSET, 24))
def test_every_opset(opset):
    rng = np.random.default_rng(opset)
    X = rng.integers(-64, 64, (2, 9, 5, 5)).astype(np.float32)
    for slope, center in ((0, 1), (2, 0)):
        layers = [layer(rng, 9, 4, slope=slope, center=center)]
        model = make_model(layers, opset=opset)
        assert_same_bits(session(model).run(None, {"x": X})[0], in_reference(X, layers))


def test_the_body_means_the_same_to_the_onnx_evaluator(chain):
    """Two implementations of standard ONNX read the body alike (this one runs the function, not our operator)."""
    X = np.random.default_rng(5).integers(-64, 64, (2, 16, 9, 10)).astype(np.float32)
    evaluator = onnx.reference.ReferenceEvaluator(make_model(chain[:1]))
    assert_same_bits(evaluator.run(None, {"x": X})[0], in_reference(X, chain[:1]))


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, 0, 1000])
def test_unsupported_opset(opset):
    with pytest.raises(InputError, match=f"opset {MIN_OPSET} to .*got {opset}"):
        function_body(opset)


def test_function_and_schema_agree():
    function, schema = function_body(20), onnx.defs.get_schema(OP_NAME, VERSION, DOMAIN)
    assert tuple(function.input) == tuple(i.name for i in schema.inputs) == INPUTS
    assert tuple(function.attribute) == ATTRIBUTES
    assert set(schema.attributes) == set(ATTRIBUTES)
    assert (function.domain, function.name) == (DOMAIN, OP_NAME)
    assert not function.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in function.node)


def test_shape_inference(chain):
    model = make_model(chain, names_of_x=("N", 16, 9, 10))
    del model.functions[:]  # by the schema alone
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    dims = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info
    }
    assert dims["y0"] == ["N", 24, 9, 10]
    assert dims["y1"] == ["N", 11, 5, 5]


@pytest.mark.parametrize("missing", ATTRIBUTES)
def test_a_node_without_an_attribute_is_refused_by_the_checker(chain, missing):
    arrays, attributes = chain[0]
    with pytest.raises(onnx.checker.ValidationError, match=missing):
        make_model([(arrays, {k: v for k, v in attributes.items() if k != missing})])


def test_interpreter_exits_cleanly_with_the_schema_registered():
    code = "import siman_convert.onnx_op as o, onnx; assert onnx.defs.has(o.OP_NAME, o.DOMAIN)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
