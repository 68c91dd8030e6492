"""The library inside ONNX Runtime: the kernel runs, gives the reference's bits, and refuses malformed nodes."""

import json
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from test_onnx_op import in_reference, layer, make_model

from siman_convert.onnx_op import OP_NAME
from siman_convert.runtime.reference import binary_conv2d


def session(library, model, *, threads=1, profile=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.register_custom_ops_library(library.path)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def chain():
    rng = np.random.default_rng(7)
    return [
        layer(rng, 16, 24, slope=0),
        layer(rng, 24, 40, group=2, strides=[2, 2], slope=1),
        layer(rng, 40, 130, kernel=(1, 3), pads=[0, 2, 1, 1], dilations=[1, 2]),
    ]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_chain(library, chain, batch, threads):
    X = np.random.default_rng(batch).standard_normal((batch, 16, 19, 21)).astype(np.float32)
    got = session(library, make_model(chain), threads=threads).run(None, {"x": X})[0]
    np.testing.assert_array_equal(got, in_reference(X, chain))


def test_residual_as_an_input(library):
    rng = np.random.default_rng(1)
    residual = rng.standard_normal((2, 8, 9, 9)).astype(np.float32)
    layers = [layer(rng, 70, 8, residual=residual)]
    X = rng.standard_normal((2, 70, 9, 9)).astype(np.float32)
    opened = session(library, make_model(layers, residual_is_input=True))
    np.testing.assert_array_equal(opened.run(None, {"x": X, "residual0": residual})[0], in_reference(X, layers))
    with pytest.raises(Exception, match=r"residual must have the shape of Y, or \(1, 1, 1, 1\)"):
        opened.run(None, {"x": X[:1], "residual0": residual})


@pytest.mark.parametrize("size", [9, 60])
def test_residuals_whose_memory_becomes_that_of_y(library, size):
    """ONNX Runtime may hand over the residual's memory as Y's; not where X or a later node has it, too."""
    rng = np.random.default_rng(4)
    layers = [layer(rng, 32, 32) for _ in range(4)]
    model = make_model(layers, names_of_x=("N", 32, size, size))
    names = {0: "last", 1: "y0", 2: "kept", 3: "y0"}  # used here last; X itself; used later on; used here last
    for at, node in enumerate(model.graph.node):
        node.input[4] = names[at]
    nodes = list(model.graph.node)
    del model.graph.node[:]
    first = [helper.make_node("Neg", ["x"], ["last"]), helper.make_node("Abs", ["x"], ["kept"])]
    model.graph.node.extend([*first, *nodes, helper.make_node("Add", ["y", "kept"], ["sum"])])
    model.graph.output[0].name = "sum"
    X = rng.standard_normal((2, 32, size, size)).astype(np.float32)

    def conv(at, X, residual):
        (W, scale, bias, _, slope), attributes = layers[at]
        return binary_conv2d(X, W, scale, bias, residual, slope, **attributes)

    y0 = conv(0, X, -X)
    y2 = conv(2, conv(1, y0, y0), np.abs(X))
    opened = session(library, model)
    for _ in range(3):
        np.testing.assert_array_equal(opened.run(None, {"x": X})[0], conv(3, y2, y0) + np.abs(X))


@pytest.mark.parametrize("variant", ["amx", "avx512", "avx512vnni", "avx2", "neon", "scalar"])
def test_the_kernel_runs_not_the_function(library, chain, variant, monkeypatch, tmp_path):
    if not library.variants().get(variant):
        pytest.skip(f"{variant} does not run on this processor")
    monkeypatch.setenv("SIMAN_ISA", variant)
    X = np.random.default_rng(3).standard_normal((1, 16, 9, 9)).astype(np.float32)
    opened = session(library, make_model(chain), profile=tmp_path / "profile")
    np.testing.assert_array_equal(opened.run(None, {"x": X})[0], in_reference(X, chain))
    with Path(opened.end_profiling()).open() as file:
        kinds = [event["args"]["op_name"] for event in json.load(file) if "op_name" in event.get("args", {})]
    assert kinds.count(OP_NAME) == len(chain)
    assert "Conv" not in kinds


def test_shape_inference_keeps_the_batch_symbolic(library, chain):
    model = make_model(chain, names_of_x=("N", 16, 19, 21))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    opened = session(library, model)
    assert opened.get_outputs()[0].shape == ["N", 130, 11, 10]
    for batch in (1, 3):
        X = np.ones((batch, 16, 19, 21), np.float32)
        assert opened.run(None, {"x": X})[0].shape == (batch, 130, 11, 10)


def test_two_sessions_in_two_threads(library, chain):
    model = make_model(chain)
    X = np.random.default_rng(9).standard_normal((2, 16, 33, 33)).astype(np.float32)
    expected, results = in_reference(X, chain), []

    def work():
        opened = session(library, model, threads=2)
        results.extend(opened.run(None, {"x": X})[0] for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_unknown_variant_is_an_error_of_the_session(library, chain, monkeypatch):
    monkeypatch.setenv("SIMAN_ISA", "avx3")
    with pytest.raises(Exception, match="SIMAN_ISA.*known are amx, avx512, avx512vnni, avx2, neon and scalar"):
        session(library, make_model(chain))


def attribute(**changes):
    def apply(model):
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name not in changes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in changes.items() if v is not None)

    return apply


def initializer(name, array):
    def apply(model):
        found = next(i for i in model.graph.initializer if i.name == f"{name}0")
        found.CopyFrom(numpy_helper.from_array(array, f"{name}0"))

    return apply


def as_input(name):
    def apply(model):
        found = next(i for i in model.graph.initializer if i.name == f"{name}0")
        model.graph.initializer.remove(found)
        model.graph.input.append(helper.make_tensor_value_info(found.name, found.data_type, found.dims))

    return apply


def drop_input(model):
    del model.graph.node[0].input[5]


ONES, BYTES = np.ones, np.uint8
MALFORMED = {
    "stride 0": (attribute(strides=[0, 1]), "strides must be"),
    "one stride": (attribute(strides=[1]), "strides"),
    "no strides": (attribute(strides=None), "strides"),
    "strides of another type": (attribute(strides=1.5), "strides"),
    "negative pad": (attribute(pads=[0, 0, -1, 0]), "pads must be"),
    "huge pad": (attribute(pads=[2**40, 0, 0, 0]), "pads must be"),
    "dilation 0": (attribute(dilations=[1, 0]), "dilations must be"),
    "group": (attribute(group=5), "group must"),
    "group 0": (attribute(group=0), "group must"),
    "center": (attribute(center=7), "center must"),
    "no center": (attribute(center=None), "center"),
    "channels": (attribute(channels=-3), "channels must"),
    "channels and W": (attribute(channels=40), "W must hold"),
    "channels beyond 64 bits": (attribute(channels=2**63 - 1), "channels must|W must hold"),
    "W rank": (initializer("W", ONES((24, 9, 2), BYTES)), "W must be"),
    "W empty": (initializer("W", ONES((24, 0, 3, 2), BYTES)), "kernel"),
    "W type": (initializer("W", ONES((24, 3, 3, 2), np.int8)), "int8|type"),
    "W padding bits": (attribute(channels=15), "padding bits"),
    "W input": (as_input("W"), "W must be constant"),
    "scale": (initializer("scale", ONES(23, np.float32)), "scale must be"),
    "scale rank": (initializer("scale", ONES((24, 1), np.float32)), "scale must be"),
    "scale type": (initializer("scale", ONES(24, np.float64)), "double|type"),
    "scale input": (as_input("scale"), "scale must be constant"),
    "slope": (initializer("slope", ONES(1, np.float32)), "slope must be"),
    "five inputs": (drop_input, "input"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_node(library, chain, case):
    change, message = MALFORMED[case]
    model = make_model(chain[:1])
    session(library, model)
    change(model)
    with pytest.raises(Exception, match=message):
        session(library, model)


MALFORMED_RUNS = {
    "residual": (initializer("residual", ONES((1, 24, 1, 1), np.float32)), (1, 16, 9, 9), "residual must"),
    "channels": (None, (1, 15, 9, 9), "X must be"),
    "empty": (None, (1, 16, 0, 9), "X must be"),
    "smaller than the kernel": (attribute(pads=[0] * 4), (1, 16, 2, 9), "larger than the padded image"),
    "output too large": (attribute(pads=[2**30] * 4), (1, 16, 9, 9), "more than 2147483647"),
}


@pytest.mark.parametrize("case", MALFORMED_RUNS)
def test_malformed_run(library, chain, case):
    change, shape, message = MALFORMED_RUNS[case]
    model = make_model(chain[:1])
    if change is not None:
        change(model)
    with pytest.raises(Exception, match=message):
        session(library, model).run(None, {"x": np.ones(shape, np.float32)})


def test_the_library_can_be_registered_again_and_again(library, chain):
    X = np.ones((1, 16, 5, 5), np.float32)
    results = [session(library, make_model(chain[:1])).run(None, {"x": X})[0] for _ in range(5)]
    assert all(np.array_equal(results[0], r) for r in results)
    assert isinstance(make_model(chain), onnx.ModelProto)
