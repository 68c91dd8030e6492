"""The int8 form of what is not binary: a timm model, and a small graph with all that is awkward about it."""

import functools
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import numpy_helper, parser
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from siman_convert import onnx_int8
from siman_convert.bits import pack_weight_bits
from siman_convert.data import Preprocess, resolve_preprocess
from siman_convert.description import Description, describe
from siman_convert.errors import InputError, SimanError
from siman_convert.frozen import freeze
from siman_convert.layers import SiMaNConv2d
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_int8 import quantize_rest
from siman_convert.onnx_int8_conv import Range, quantized_conv
from siman_convert.onnx_int8_plan import Followers, Quantization, followers, read_quantization
from siman_convert.onnx_op import DOMAIN, OP_NAME, function_body
from siman_convert.onnx_quantized_op import QUANTIZED_OP, quantized_body
from siman_convert.plans import make_plan
from siman_convert.runtime.reference import evaluator
from siman_convert.surgery import apply_plan

CORRELATION, AGREEMENT = 0.99, 0.95
QDQ = ("QuantizeLinear", "DequantizeLinear")
SIMAN = "<channels = 4, strides = [1, 1], pads = [0, 0, 0, 0], dilations = [1, 1], group = 1, center = 1>"
# `wide`, a grouped convolution with a bias, is read by a binary node as X, by another convolution, by a Relu; that other
# convolution is a residual.
GRAPH = f"""<ir_version: 10, opset_import: ["" : 20, "siman" : 1], domain: "test">
small (float[N, 4, 6, 6] image) => (float[N, 5] scores)
{{
  h = Conv <group = 2, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, wide_weight, wide_bias)
  side = Conv <kernel_shape = [1, 1]> (h, side_weight)
  y = siman.BinaryConv2d {SIMAN} (h, bits, scale, zeros, side, slope)
  r = Relu (h)
  deep = Conv <kernel_shape = [1, 1]> (r, deep_weight)
  rr = Relu (deep)
  deeper = Conv <kernel_shape = [1, 1]> (rr, deeper_weight)
  z = Add (y, deeper)
  pooled = GlobalAveragePool (z)
  flat = Flatten (pooled)
  scores = Gemm <transB = 1, beta = 1.0> (flat, fc_weight, fc_bias)
}}"""


def small_model():
    rng = np.random.default_rng(1)
    model = parser.parse_model(GRAPH)
    shapes = {"wide_weight": (4, 2, 3, 3), "wide_bias": (4,), "fc_weight": (5, 4), "fc_bias": (5,), "slope": (4,)}
    shapes |= {f"{name}_weight": (4, 4, 1, 1) for name in ("side", "deep", "deeper")} | {"scale": (4,), "zeros": (4,)}
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    bits = pack_weight_bits(rng.random((4, 4, 1, 1)) < 0.5)
    model.graph.initializer.append(numpy_helper.from_array(bits, "bits"))
    for i, node in enumerate(model.graph.node):
        weights = [name.removesuffix("_weight") for name in node.input if name.endswith("_weight")]
        node.name = weights[0] if weights else f"{node.op_type}_{i}"
    model.functions.append(function_body(20))
    onnx.checker.check_model(model, full_check=True)
    return model


def small_batches():
    rng = np.random.default_rng(2)
    return [rng.standard_normal((n, 4, 6, 6), dtype=np.float32) for n in (8, 3)]


@functools.cache
def _timm_bytes():
    """test_resnet with random weights and BatchNorms of both signs, exported once."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    plan = make_plan(model, name="test_resnet")
    preprocess, _ = resolve_preprocess(model, image_size=(32, 32))
    apply_plan(model, plan)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.3, 1.5).mul_(torch.randint(0, 2, module.weight.shape) * 2 - 1)
            module.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        model.train()(torch.from_numpy(digit_images(slice(0, 32))))
    classes = tuple("0123456789")
    description = Description("test_resnet", plan, preprocess, classes, "best", "x", None, "0.1.0")
    exported, _ = build_onnx(describe(freeze(model), description))
    return exported.SerializeToString()


def timm_model():
    return onnx.load_from_string(_timm_bytes())


def digit_images(which):
    """(N, 3, 32, 32): each pixel of a digit is a square of sixteen."""
    digits = load_digits().images[which].astype(np.float32) / 4 - 2
    return np.ascontiguousarray(np.kron(digits, np.ones((4, 4), np.float32))[:, None].repeat(3, axis=1))


@functools.cache
def _timm_int8_bytes():
    images = [digit_images(slice(0, 64)), digit_images(slice(64, 128))]
    return quantize_rest(timm_model(), images)[0].SerializeToString()


def pair(which):
    """A model and its int8 form."""
    if which == "timm":
        return timm_model(), onnx.load_from_string(_timm_int8_bytes())
    return small_model(), quantize_rest(small_model(), small_batches())[0]


def run(model, images, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.graph.input[0].name: images})[0]


def binary(model):
    return [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_NAME)]


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def named(model, name):
    (node,) = (node for node in model.graph.node if node.name == name)
    return node


def attributes(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def quantized(model):
    return [node for node in model.graph.node if node.op_type == QUANTIZED_OP]


both = pytest.mark.parametrize("which", ["small", "timm"])


def test_what_becomes_of_which_node():
    expected = Quantization(("side", "deep", "deeper"), ("deep",), (), {"wide": "2 groups"}, ("fc",), 140)
    assert quantize_rest(small_model(), small_batches())[1] == expected
    assert read_quantization(pair("small")[1].graph) == expected
    assert read_quantization(small_model().graph) == Quantization((), (), (), {}, (), 0)
    before, after = pair("timm")
    convs = [node.name for node in before.graph.node if node.op_type == "Conv"]
    assert len(convs) > 3
    found = read_quantization(after.graph)
    assert (list(found.convolutions), found.weights_only, found.classifiers) == (convs, {}, ("fc",))


@both
def test_convolutions_have_all_eight_bits_and_what_belongs_to_them(which):
    """Weights within half a step of the float ones, the scale their step times the inputs', the bias as it was."""
    before, after = pair(which)
    stored, floats = initializers(after), initializers(before)
    assert quantized(after)
    for node in quantized(after):
        W, scale, bias, slope = (stored[name] for name in node.input[1:])
        conv = named(before, node.name)
        weight, values = floats[conv.input[1]], attributes(node)
        assert W.dtype == np.int8
        assert (np.abs(W.astype(int)).reshape(len(W), -1).max(axis=1) == 127).all()
        step = np.abs(weight).reshape(len(W), -1).max(axis=1) / np.float32(127)
        assert np.abs(W - weight / step.reshape(-1, 1, 1, 1)).max() < 0.5001
        np.testing.assert_array_equal(scale, np.float32(values["x_scale"]) * step)
        np.testing.assert_array_equal(bias, floats[conv.input[2]] if len(conv.input) > 2 else 0 * scale)
        assert slope.shape == scale.shape
        assert set(slope) <= {0, 1}
        assert (values["strides"], values["pads"]) == (
            attributes(conv).get("strides", [1, 1]),
            attributes(conv).get("pads", [0] * 4),
        )


def test_classifiers_keep_to_seven_bits():
    for _, after in (pair("small"), pair("timm")):
        stored = initializers(after)
        sources = {node.output[0]: node.input for node in after.graph.node if node.op_type == "DequantizeLinear"}
        weight, scale, zero_point = (stored[name] for name in sources[named(after, "fc").input[1]])
        assert weight.dtype == np.int8
        assert scale.shape == weight.shape[:1]
        assert not zero_point.any()
        assert 60 <= np.abs(weight.astype(int)).max() <= 64
        (quantizer,) = [node for node in after.graph.node if node.op_type == "QuantizeLinear"]
        assert stored[quantizer.input[2]].dtype == np.uint8


@both
def test_no_float_copy_of_a_weight_is_left(which):
    before, after = pair(which)
    stored = initializers(after)
    read = {name for node in after.graph.node for name in node.input}
    assert stored.keys() <= read
    for node in before.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert node.input[1] not in stored
    assert sum(array.nbytes for array in stored.values() if array.ndim > 1 and array.dtype == np.float32) < 64


def test_ranges_are_the_least_and_largest_values_of_the_images_and_hold_zero():
    """Of the input of every convolution, as the float network computes it."""
    before, after = pair("small")
    tapped = onnx.ModelProto.FromString(before.SerializeToString())
    names = [node.input[0] for node in quantized(after)]
    assert names == ["h", "r", "rr"]
    for name in names:
        tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    read = [ort_outputs(tapped, images, names) for images in small_batches()]
    for index, node in enumerate(quantized(after)):
        values = np.concatenate([batch[index] for batch in read])
        low, high = min(0.0, values.min()), max(0.0, values.max())
        assert attributes(node)["x_scale"] == pytest.approx((high - low) / 255, rel=1e-6)
        assert attributes(node)["x_zero_point"] == round(-255 * low / (high - low))
    zero_points = {attributes(node)["x_zero_point"] for node in quantized(after)}
    assert 0 in zero_points  # behind a Relu
    assert len(zero_points) > 1


def ort_outputs(model, images, names):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(names, {"image": images})


@both
def test_nothing_else_of_the_graph_changes(which):
    before, after = pair(which)
    assert binary(after) == binary(before)
    assert binary(after)
    assert list(after.functions) == [*before.functions, quantized_body(20)]
    assert list(after.opset_import) == list(before.opset_import)
    assert (after.ir_version, after.producer_name) == (before.ir_version, before.producer_name)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    plan = read_quantization(after.graph)
    outputs = {value.name for value in before.graph.output}
    behind = [followers(named(before, name), before.graph.node, outputs) for name in plan.convolutions]
    folded = {node.output[0] for one in behind for node in (one.relu, one.pool) if node is not None}
    assert len(folded) == 1
    added = [node.name for node in after.graph.node if node.op_type in QDQ or node.name.startswith("wide_weight/")]
    kept = [node for node in after.graph.node if node.name not in added]
    old = [node for node in before.graph.node if node.output[0] not in folded]
    assert [node.name for node in kept] == [node.name for node in old]
    assert not any(node.doc_string or node.metadata_props for node in after.graph.node)
    for one, other in zip(old, kept, strict=True):
        assert one == other or other.name in plan.names
    known = {name for node in after.graph.node for name in (*node.input, *node.output)}
    assert {value.name for value in after.graph.value_info} <= known


@both
def test_only_classifiers_read_dequantized_values(which):
    _, after = pair(which)
    dequantized = {node.output[0] for node in after.graph.node if node.op_type == "DequantizeLinear"}
    assert {node.op_type for node in after.graph.node if dequantized & set(node.input)} == {"Gemm"}
    assert not dequantized & {value.name for value in after.graph.output}


def test_a_tensor_that_both_a_conv_and_a_binary_node_read_reaches_both_as_it_is():
    _, after = pair("small")
    (node,) = binary(after)
    assert (node.input[0], node.input[4]) == ("h", "side")
    assert named(after, "side").input[0] == "h"
    assert [n.input[0] for n in after.graph.node if n.op_type == "QuantizeLinear"] == ["flat"]


CONV = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y{more}) {{
  a = Conv (x, w)
  r = Relu (a)
  {last}
}}"""


@pytest.mark.parametrize(
    ("last", "more", "folded"),
    [
        ("y = Neg (r)", "", True),
        ("y = Add (r, a)", "", False),
        ("y = Neg (r)", ", float[N, 2, 6, 6] a", False),
        ("y = Neg (r)", ", float[N, 2, 6, 6] r", True),
    ],
)
def test_a_relu_is_folded_in_where_it_alone_reads_the_convolution(last, more, folded):
    model = parser.parse_model(CONV.format(last=last, more=more))
    model.graph.node[0].name = "a"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 2, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    images = rng.standard_normal((4, 2, 6, 6)).astype(np.float32)
    after, found = quantize_rest(model, [images])
    onnx.checker.check_model(after, full_check=True)
    assert found.relus == (("a",) if folded else ())
    assert ("Relu" in [node.op_type for node in after.graph.node]) != folded
    assert {opset.domain: opset.version for opset in after.opset_import} == {"": 20, DOMAIN: 1}
    np.testing.assert_allclose(run(after, images), run(model, images), atol=0.05)


POOL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 2, 9, 8] x) => (float[N, 2, A, B] y{more}) {{
  a = Conv (x, w)
  r = {behind} (a)
  {pool}
  {last}
}}"""
PLAIN = "p = MaxPool <kernel_shape = [3, 3], strides = [2, 1], pads = [1, 0, 1, 2]> (r)"


@pytest.mark.parametrize(
    ("behind", "pool", "last", "more", "folded"),
    [
        ("Relu", PLAIN, "y = Neg (p)", "", True),
        ("Relu", "p = MaxPool <kernel_shape = [3, 2]> (r)", "y = Add (p, p)", "", True),
        ("Relu", PLAIN.replace(">", ", ceil_mode = 0, dilations = [1, 1]>"), "y = Neg (p)", "", True),
        ("Relu", PLAIN, "y = Add (p, p)", ", float[N, 2, 9, 8] r", False),
        ("Relu", PLAIN, "q = ReduceMean (r)  y = Add (p, q)", "", False),
        ("Neg", PLAIN, "y = Neg (p)", "", False),
        ("Relu", PLAIN.replace(">", ", ceil_mode = 1>"), "y = Neg (p)", "", False),
        ("Relu", PLAIN.replace(">", ", dilations = [1, 2]>"), "y = Neg (p)", "", False),
        ("Relu", 'p = MaxPool <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (r)', "y = Neg (p)", "", False),
        ("Relu", PLAIN.replace("p =", "p, i ="), "y = Neg (p)", "", False),
        ("Relu", PLAIN.replace("MaxPool", "AveragePool"), "y = Neg (p)", "", False),
    ],
)  # fmt: skip
def test_a_pool_is_folded_in_where_it_alone_reads_what_is_before_it(behind, pool, last, more, folded):
    model = parser.parse_model(POOL.format(behind=behind, pool=pool, last=last, more=more))
    model.graph.node[0].name = "a"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 2, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    images = rng.standard_normal((4, 2, 9, 8)).astype(np.float32)
    after, found = quantize_rest(model, [images])
    onnx.checker.check_model(after, full_check=True)
    assert found.pools == (("a",) if folded else ())
    assert any("Pool" in node.op_type for node in after.graph.node) != folded
    np.testing.assert_allclose(run(after, images), run(model, images), atol=0.05)


def test_a_pool_without_a_relu_is_folded_in():
    model = parser.parse_model(
        CONV.format(last="y = Neg (r)", more="").replace("Relu", "MaxPool <kernel_shape = [1, 1]>")
    )
    model.graph.node[0].name = "a"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 2, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    images = rng.standard_normal((4, 2, 6, 6)).astype(np.float32)
    after, found = quantize_rest(model, [images])
    assert (found.relus, found.pools) == ((), ("a",))
    assert run(after, images).max() > 0.5  # negative values are kept
    np.testing.assert_allclose(run(after, images), run(model, images), atol=0.05)


NOT_QUANTIZED = {
    "groups": ("<group = 2>", (4, 2, 1, 1), "2 groups"),
    "dilation": ("<dilations = [1, 2]>", (4, 4, 1, 2), "dilation"),
    "padding": ('<auto_pad = "SAME_UPPER">', (4, 4, 2, 2), "padding that depends on the image"),
    "518": ("", (4, 518, 1, 1), None),
    "519": ("", (4, 519, 1, 1), "519 products an output, more than 518"),
    "7x7x11": ("", (4, 11, 7, 7), "539 products an output, more than 518"),
    "1-d": ("", (4, 4, 1), "a convolution of 1 dimensions"),
    "plain": ('<group = 1, dilations = [1, 1], auto_pad = "NOTSET">', (4, 4, 3, 2), None),
}


@pytest.mark.parametrize("case", NOT_QUANTIZED)
def test_what_the_operator_cannot_do_computes_in_float(case, tmp_path):
    options, shape, reason = NOT_QUANTIZED[case]
    size = ", ".join(["8"] * (len(shape) - 2))
    channels = shape[1] * (2 if case == "groups" else 1)
    out = ", ".join("ab"[: len(shape) - 2])
    model = parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, {channels}, {size}] x) => (float[N, 4, {out}] y) {{ y = Conv {options} (x, w) }}""")
    model.graph.node[0].name = "conv"
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    images = rng.standard_normal((2, channels, *[8] * (len(shape) - 2))).astype(np.float32)
    after, found = quantize_rest(model, [images])
    assert found.weights_only == ({} if reason is None else {"conv": reason})
    assert found.convolutions == (("conv",) if reason is None else ())
    expected = run(model, images)
    assert np.abs(run(after, images) - expected).max() < 0.02 * np.abs(expected).max()
    if reason is not None:
        assert not after.functions
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(after.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert "Conv" in kinds
        assert not {"Cast", "Mul", *QDQ} & set(kinds)  # folded: the time of float weights


def test_a_filter_of_zeros_and_convolutions_that_share_a_weight():
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 2, 6, 6] x) => (float[N, 2, 6, 6] y) { h = Conv (x, w)
      y = Conv (h, w) }"""
    model = parser.parse_model(text)
    for node, name in zip(model.graph.node, ("one", "two"), strict=True):
        node.name = name
    weight = np.array([[1, -0.5], [0, 0]], np.float32).reshape(2, 2, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    images = np.random.default_rng(0).standard_normal((4, 2, 6, 6)).astype(np.float32)
    after, found = quantize_rest(model, [images])
    assert found.weights == 4
    one, two = quantized(after)
    assert one.input[1] == two.input[1]
    assert one.input[2] != two.input[2]
    np.testing.assert_array_equal(initializers(after)[one.input[1]].reshape(2, 2), [[127, -64], [0, 0]])
    assert attributes(one)["x_scale"] != attributes(two)["x_scale"]
    found = run(after, images)
    np.testing.assert_allclose(found, run(model, images), atol=0.05)
    assert not found[:, 1].any()


def test_the_reference_computes_what_onnx_runtime_does():
    """Exactly, as far as our operators go; the classifier's input may round to a neighbouring code."""
    _, after = pair("small")
    images = small_batches()[1]
    expected = evaluator(after).run(None, {"image": images})[0]
    np.testing.assert_allclose(run(after, images), expected, atol=0.02 * np.abs(expected).max())


def test_inputs_too_large_for_float32_are_an_error():
    conv = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="stem")
    with pytest.raises(SimanError, match="--int8: stem: its inputs, 1.0e\\+38 a step, are too large to be quantized"):
        quantized_conv(conv, None, np.full((1, 1, 1, 1), 1e4, np.float32), Range(np.float32(1e38), 0))


@both
def test_stock_onnx_runtime_runs_it_at_any_batch_size(which):
    _, after = pair(which)
    onnx.checker.check_model(after, full_check=True)
    images = digit_images(slice(200, 203)) if which == "timm" else small_batches()[1]
    logits = run(after, images)
    assert logits.shape == (3, {"small": 5, "timm": 10}[which])
    np.testing.assert_allclose(run(after, images[:1]), logits[:1], rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_a_trained_model_keeps_its_accuracy():
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)
    before, held_out, labels = trained(images, digits.target), images[1400:], digits.target[1400:]
    after, _ = quantize_rest(before, [images[:100], images[100:200]])
    expected, found = run(before, held_out), run(after, held_out)
    assert len(binary(after)) == 1
    assert np.abs(found - expected).max() > 1e-3  # or nothing was quantized
    assert np.mean(expected.argmax(1) == labels) > 0.8  # or it learned nothing
    assert np.mean(expected.argmax(1) == found.argmax(1)) > AGREEMENT
    assert np.corrcoef((expected - expected.mean(0)).ravel(), (found - found.mean(0)).ravel())[0, 1] > CORRELATION


def trained(images, labels):
    """A convolution, a binary one and a classifier, after some seconds of Adam, exported."""
    torch.manual_seed(0)
    stem, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    binarized = [stem, nn.ReLU(), SiMaNConv2d.from_float(second), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*binarized, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    x, y = torch.from_numpy(images[:1400]), torch.from_numpy(labels[:1400])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seven times as fast as two threads on a busy machine
    for step in range(120):
        batch = torch.arange(step * 64, step * 64 + 64) % 1400
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    plan = make_plan(timm.create_model("test_resnet"), name="test_resnet")
    preprocess = Preprocess((1, 8, 8), "bicubic", (0.5,), (0.5,), 1.0, "center")
    classes = tuple("0123456789")
    packed = describe(freeze(model), Description("small", plan, preprocess, classes, "best", "x", None, "0.1.0"))
    return build_onnx(packed)[0]


def test_the_small_model_stays_within_its_rounding():
    before, after = pair("small")
    images = small_batches()[0]
    expected, found = run(before, images), run(after, images)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()  # 0.046; a lost bias is 0.3


def test_no_integer_kernel_saturates():
    """Inputs and weights near the end of their range: with all 8 bits, kernels of CPUs without VNNI are off by 30 %."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 64] x) => (float[N, 8] y) { y = Gemm <transB = 1> (x, w) }"""
    model = parser.parse_model(text)
    model.graph.node[0].name = "fc"
    rng = np.random.default_rng(0)
    model.graph.initializer.append(numpy_helper.from_array(rng.uniform(0.8, 1, (8, 64)).astype(np.float32), "w"))
    images = rng.uniform(0.8, 1, (4, 64)).astype(np.float32)
    assert np.abs(run(quantize_rest(model, [images])[0], images) / run(model, images) - 1).max() < 0.02


def test_the_same_bytes_in_a_fresh_process(tmp_path):
    onnx.save(small_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "batches.npz", *small_batches())
    code = (
        "import hashlib, numpy as np, onnx; from siman_convert.onnx_int8 import quantize_rest;"
        "int8, _ = quantize_rest(onnx.load('model.onnx'), np.load('batches.npz').values());"
        "print(hashlib.sha256(int8.SerializeToString()).hexdigest())"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == hashlib.sha256(pair("small")[1].SerializeToString()).hexdigest()


def test_float16_weights_count_as_float():
    halved = small_model()
    (weight,) = [tensor for tensor in halved.graph.initializer if tensor.name == "wide_weight"]
    rounded = numpy_helper.to_array(weight).astype(np.float16)
    reference = small_model()
    for model, dtype in ((halved, np.float16), (reference, np.float32)):
        (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "wide_weight"]
        weight.CopyFrom(numpy_helper.from_array(rounded.astype(dtype), "wide_weight"))
    halved.graph.node[0].input[1] = "wide_weight/float32"
    cast = onnx.helper.make_node("Cast", ["wide_weight"], ["wide_weight/float32"], name="Cast", to=1)
    halved.graph.node.insert(0, cast)
    onnx.checker.check_model(halved, full_check=True)
    assert quantize_rest(halved, small_batches()) == quantize_rest(reference, small_batches())


def test_nothing_is_printed_logged_or_changed(capfd, caplog, monkeypatch):
    model = small_model()
    quantize_rest(model, small_batches())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert model == small_model()
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a program that set up none
    quantize_rest(model, small_batches())
    assert (logging.root.handlers, logging.root.manager.disable) == ([], logging.NOTSET)


def test_a_model_without_float_weights_is_refused():
    model, done = pair("small")
    with pytest.raises(InputError, match="--int8: nothing to quantize"):
        quantize_rest(done, small_batches())
    with pytest.raises(InputError, match="at least one batch"):
        quantize_rest(model, [])


def test_images_that_do_not_fit_are_errors():
    with pytest.raises(SimanError, match="--int8: ONNX Runtime's quantize_static failed: .*image"):
        quantize_rest(small_model(), [np.zeros((1, 4, 5, 5), np.float32)])
    with pytest.raises(InputError, match="--int8: .*not finite"):
        quantize_rest(small_model(), [np.full((1, 4, 6, 6), np.nan, np.float32)])


def test_an_error_of_the_batches_is_passed_on():
    def batches():
        yield small_batches()[0]
        raise InputError("no such image")

    with pytest.raises(InputError, match="^no such image$"):
        quantize_rest(small_model(), batches())


def spoiled(monkeypatch, spoil):
    """quantize_static, and after it `spoil` on the model it wrote."""
    original = onnx_int8.quantize_static

    def quantize(source, target, reader, **options):
        original(source, target, reader, **options)
        onnx.save(spoil(onnx.load(target)), target)

    monkeypatch.setattr(onnx_int8, "quantize_static", quantize)


def without_functions(model):
    del model.functions[:]
    return model


def newer(model):
    model.opset_import[0].version += 1
    return model


def with_another_relu(model):
    (relu,) = [node for node in model.graph.node if node.name == "Relu_3"]
    relu.input[0] = "side"
    return model


@pytest.mark.parametrize("spoil", [onnx.inliner.inline_local_functions, without_functions, with_another_relu])
def test_what_else_quantize_static_does_to_the_graph_does_not_matter(monkeypatch, spoil):
    expected = pair("small")[1]
    spoiled(monkeypatch, spoil)
    assert quantize_rest(small_model(), small_batches())[0] == expected


def test_other_operator_sets_are_an_error(monkeypatch):
    spoiled(monkeypatch, newer)
    with pytest.raises(SimanError, match="changed the model's operator sets to .*21"):
        quantize_rest(small_model(), small_batches())


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("fc", "int8 weights in every Conv and Gemm, these kept theirs: fc$"),
        ("deep", "quantize_static gave no range for r, which deep reads$"),
    ],
)
def test_a_node_that_quantize_static_leaves_out_is_an_error(monkeypatch, left_out, message):
    original = onnx_int8.quantize_static
    names = sorted({"side", "deep", "deeper", "fc"} - {left_out})
    partly = lambda *files, **options: original(*files, **{**options, "nodes_to_quantize": names})  # noqa: E731
    monkeypatch.setattr(onnx_int8, "quantize_static", partly)
    with pytest.raises(SimanError, match=message):
        quantize_rest(small_model(), small_batches())


def test_a_relu_that_is_not_folded_as_planned_is_an_error(monkeypatch):
    monkeypatch.setattr(onnx_int8, "followers", lambda *_: Followers(None, None))
    with pytest.raises(SimanError, match=r"--int8: expected Quantization\(.*relus=\('deep',\).*got .*relus=\(\)"):
        quantize_rest(small_model(), small_batches())


def test_a_gemm_with_a_beta_is_an_error():
    """quantize_static drops the factor: the logits would be off by the bias."""
    model = small_model()
    (beta,) = [attribute for attribute in model.graph.node[-1].attribute if attribute.name == "beta"]
    beta.f = 2
    with pytest.raises(SimanError, match="Gemm with beta, as of fc"):
        quantize_rest(model, small_batches())


def sharing_a_bias(name, index):
    """The small model, of four classes: that node reads the classifier's bias."""
    model, rng = small_model(), np.random.default_rng(4)
    node = named(model, name)
    node.input[index:] = ["fc_bias", *node.input[index + 1 :]]
    for shape, tensor in (((4,), "fc_bias"), ((4, 4), "fc_weight")):
        (old,) = [one for one in model.graph.initializer if one.name == tensor]
        old.CopyFrom(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), tensor))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    return model


@pytest.mark.parametrize(("name", "index"), [("BinaryConv2d_2", 3), ("wide", 2)])
def test_a_bias_that_another_node_shares_with_a_classifier_is_an_error(name, index):
    """It would be read dequantized."""
    with pytest.raises(SimanError, match="more than a Gemm reads fc_bias"):
        quantize_rest(sharing_a_bias(name, index), small_batches())


def test_a_bias_that_a_quantized_convolution_shares_with_a_classifier_stays_as_it_is():
    before = sharing_a_bias("deep", 2)
    after, _ = quantize_rest(before, small_batches())
    assert named(after, "deep").input[3] == "fc_bias"
    np.testing.assert_array_equal(initializers(after)["fc_bias"], initializers(before)["fc_bias"])
    expected = run(before, small_batches()[0])
    assert np.abs(run(after, small_batches()[0]) - expected).max() < 0.1 * np.abs(expected).max()
