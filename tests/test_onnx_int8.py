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
from siman_convert.onnx_op import DOMAIN, OP_NAME, function_body
from siman_convert.plans import make_plan
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
    return quantize_rest(timm_model(), [digit_images(slice(0, 64)), digit_images(slice(64, 128))]).SerializeToString()


def pair(which):
    """A model and its int8 form."""
    if which == "timm":
        return timm_model(), onnx.load_from_string(_timm_int8_bytes())
    return small_model(), quantize_rest(small_model(), small_batches())


def run(model, images, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {model.graph.input[0].name: images})[0]


def binary(model):
    return [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_NAME)]


both = pytest.mark.parametrize("which", ["small", "timm"])


@both
def test_every_conv_and_gemm_weight_is_int8_and_no_float_copy_is_left(which):
    before, after = pair(which)
    stored = {tensor.name: tensor for tensor in after.graph.initializer}
    sources = {node.output[0]: node.input for node in after.graph.node if node.op_type == "DequantizeLinear"}
    weights = {node.name: node.input[1] for node in before.graph.node if node.op_type in ("Conv", "Gemm")}
    assert (
        len(weights) == {"small": 5, "timm": sum(n.op_type in ("Conv", "Gemm") for n in before.graph.node)}[which] > 1
    )
    for node in after.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight, scale, zero_point = (stored[name] for name in sources[node.input[1]])
            assert weight.data_type == onnx.TensorProto.INT8
            assert scale.dims == weight.dims[:1]
            assert not numpy_helper.to_array(zero_point).any()
            values = numpy_helper.to_array(weight)
            assert 60 <= np.abs(values.astype(int)).max() <= 64  # 7 bits
            assert weights.pop(node.name) not in stored
    assert not weights
    zero_points = [stored[node.input[2]] for node in after.graph.node if node.op_type == "QuantizeLinear"]
    assert {tensor.data_type for tensor in zero_points} == {onnx.TensorProto.UINT8}


@both
def test_nothing_else_of_the_graph_changes(which):
    before, after = pair(which)
    assert binary(after) == binary(before)
    assert binary(after)
    assert list(after.functions) == list(before.functions)
    assert list(after.opset_import) == list(before.opset_import)
    assert (after.ir_version, after.producer_name) == (before.ir_version, before.producer_name)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    kept = [node for node in after.graph.node if node.op_type not in QDQ]
    assert [node.name for node in kept] == [node.name for node in before.graph.node]
    assert not any(node.doc_string or node.metadata_props for node in after.graph.node)
    for old, new in zip(before.graph.node, kept, strict=True):
        assert old == new or new.op_type in ("Conv", "Gemm")


@both
def test_only_conv_and_gemm_read_dequantized_values(which):
    _, after = pair(which)
    dequantized = {node.output[0] for node in after.graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in after.graph.node if dequantized & set(node.input)}
    assert readers == {"Conv", "Gemm"}
    assert not dequantized & {value.name for value in after.graph.output}


def test_a_tensor_that_both_a_conv_and_a_binary_node_read_reaches_the_binary_node_as_it_is():
    _, after = pair("small")
    (node,) = binary(after)
    assert (node.input[0], node.input[4]) == ("h", "side")
    quantized = [n.input[0] for n in after.graph.node if n.op_type == "QuantizeLinear"]
    assert quantized == ["image", "h", "r", "rr", "flat"]


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
    after = quantize_rest(before, [images[:100], images[100:200]])
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
    assert np.abs(run(quantize_rest(model, [images]), images) / run(model, images) - 1).max() < 0.02


def test_the_same_bytes_in_a_fresh_process(tmp_path):
    onnx.save(small_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "batches.npz", *small_batches())
    code = (
        "import hashlib, numpy as np, onnx; from siman_convert.onnx_int8 import quantize_rest;"
        "int8 = quantize_rest(onnx.load('model.onnx'), np.load('batches.npz').values());"
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
    model, quantized = pair("small")
    with pytest.raises(InputError, match="--int8: nothing to quantize"):
        quantize_rest(quantized, small_batches())
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


def shared_bias(model):
    """A node that is not quantized reads what a DequantizeLinear writes."""
    (dequantized,) = [node.output[0] for node in model.graph.node if node.output[0] == "wide_bias"]
    (relu,) = [node for node in model.graph.node if node.name == "Relu_3"]
    relu.input[0] = dequantized
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (onnx.inliner.inline_local_functions, "expected 1 siman.BinaryConv2d nodes, got 0; differing: BinaryConv2d_2"),
        (without_functions, "changed the model's functions"),
        (newer, "changed the model's operator sets to .*21"),
        (shared_bias, "changed nodes that are not to be quantized: Relu_3"),
    ],
)
def test_a_result_that_is_not_as_promised_is_an_error(monkeypatch, spoil, message):
    spoiled(monkeypatch, spoil)
    with pytest.raises(SimanError, match=message):
        quantize_rest(small_model(), small_batches())


def test_a_weight_left_in_float_is_an_error(monkeypatch):
    original = onnx_int8.quantize_static
    names = ["side", "deep", "deeper", "fc"]
    partly = lambda *files, **options: original(*files, **{**options, "nodes_to_quantize": names})  # noqa: E731
    monkeypatch.setattr(onnx_int8, "quantize_static", partly)
    with pytest.raises(SimanError, match="int8 weights in every Conv and Gemm, these kept theirs: wide$"):
        quantize_rest(small_model(), small_batches())


def test_a_gemm_with_a_beta_is_an_error():
    """quantize_static drops the factor: the logits would be off by the bias."""
    model = small_model()
    (beta,) = [attribute for attribute in model.graph.node[-1].attribute if attribute.name == "beta"]
    beta.f = 2
    with pytest.raises(SimanError, match="Gemm with beta, as of fc"):
        quantize_rest(model, small_batches())


def test_a_bias_that_a_binary_node_shares_is_an_error():
    """It would be read dequantized."""
    model = small_model()
    (node,) = binary(model)
    node.input[3] = "wide_bias"
    with pytest.raises(SimanError, match="more than a Conv or Gemm reads wide_bias"):
        quantize_rest(model, small_batches())
