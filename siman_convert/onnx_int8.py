"""--int8: what a binary network keeps in full precision, its Conv and Gemm nodes, in 8 bits.

A binary node takes the sign of what it reads, and rounding near the mean would flip signs. So no output is quantized: every
value that one node hands to another is float32 still, and nodes that have no weights of their own are left alone.

  * Conv, where siman.QuantizedConv2d can do it: that operator, with the Relu and the MaxPool behind it (`onnx_int8_conv`).
  * Conv otherwise (groups, dilation, more than 518 products an output): float arithmetic, 8-bit weights.
  * Gemm, the classifier: ONNX Runtime's quantize_static, whose QDQ nodes become its own integer kernel when a file is opened.

quantize_static calibrates for both: the range of a tensor is its least and largest value over the images, and 0. It is called
directly, since its pre-processing would inline our functions. Of its graph, which redirects every reader of a tensor that it
quantizes, only the ranges and the Gemm nodes are taken.

The choices, with figures of ONNX Runtime 1.32:
  * Not QDQ for Conv. It has no integer convolution with a float output: on a processor with VNNI ResNet-18 took 1.48 times
    as long as without --int8, computing in float with every input rounded. With a quantized output, QLinearConv, the stem
    was no faster than in float, its error more than doubled, and the signs behind it would be of rounded values.
  * Conv weights have all 8 bits, -127..127. A Gemm's have 7: the kernels of processors without VNNI add pairs of products of
    uint8 and int8 in 16 bits, which saturate. A chain of two Conv and a Gemm lost 1.2 % of its output to rounding to 8 bits,
    3.7 % as they computed it, 2.4 % with 7 bits.
  * Activations uint8, asymmetric: the range is used whole where a Relu cuts it.
  * A MaxPool behind the stem is part of the operator: ONNX Runtime's own put every value into another layout first. Without it
    ResNet-18 takes 0.94 of the time (AMD EPYC, AVX2, one thread).
  * MinMax keeps two numbers a tensor and batch, Percentile and Entropy every activation of every image. A test_resnet trained
    on digits agreed on 98 % of 500 images with it, on 95 % with Percentile; 256 images did as well as 1024.

ResNet-18 goes from 4.22 to 2.17 MB, ResNet-50 from 22.2 to 7.8. Stock ONNX Runtime, which computes the operator's function in
float, takes 2 to 6 % longer than without --int8 (an AMD EPYC, AVX2, no VNNI). Another test_resnet got 98.3 % of 359 digits
right in place of 98.1 %, and 99.7 % got the same class.

Limits: weights that are computed, not stored, stay float; so do MatMuls (timm's classifiers are Gemm nodes). The same
model and batches give the same bytes on one machine; on another, a range may differ in its last bit.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from siman_convert.errors import InputError, SimanError
from siman_convert.onnx_int8_conv import Arrays, Range, float_conv, quantized_conv
from siman_convert.onnx_int8_plan import (
    OPS,
    WEIGHT,
    Quantization,
    followers,
    make_plan,
    read_quantization,
    stored_floats,
)
from siman_convert.onnx_op import DOMAIN, VERSION
from siman_convert.onnx_quantized_op import quantized_body

Images = npt.NDArray[np.float32]


def quantize_rest(model: onnx.ModelProto, batches: Iterable[Images]) -> tuple[onnx.ModelProto, Quantization]:
    """A copy of `model` whose float Conv and Gemm weights are int8, calibrated on `batches`, each (N, C, H, W) float32.

    Float16 weights count as float. Raises InputError where there is nothing to quantize or no image to calibrate on,
    SimanError where the result is not what the module says.
    """
    source = _with_wide_weights(model)
    plan = make_plan(source.graph)
    integer = {*plan.convolutions, *plan.classifiers}
    if not plan.names:
        raise InputError("--int8: nothing to quantize, no Conv or Gemm of the model has stored float weights")
    reader = _Reader(source.graph.input[0].name, batches)
    static = _quantize_static(source, integer, reader) if integer else source
    if list(static.opset_import) != list(source.opset_import):
        found = [f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in static.opset_import]
        raise SimanError(f"--int8: quantize_static changed the model's operator sets to {found}")
    _rewrite(source.graph, static.graph, plan)
    _require(source.graph, plan)
    if plan.convolutions:
        _add_operator(source)
    return source, plan


class _Reader:
    """Hands batches to quantize_static, which asks for no more than `get_next`."""

    def __init__(self, input_name: str, batches: Iterable[Images]) -> None:
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise InputError("--int8: expected at least one batch of calibration images, got none")
        self._input_name, self._batches = input_name, chain([first], iterator)

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        if not np.isfinite(batch).all():
            raise InputError("--int8: the calibration images hold values that are not finite")
        return {self._input_name: batch}


def _with_wide_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose Conv and Gemm weights stored as float16 with a Cast behind them are float32 without it."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    halves = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast" and n.input[0] in halves}
    uses = [(node, i) for node in graph.node for i, name in enumerate(node.input) if name in casts]
    kept = {node.input[i] for node, i in uses if node.op_type not in OPS or i != WEIGHT}
    for node, i in uses:
        if node.input[i] not in kept:
            node.input[i] = casts[node.input[i]].input[0]
    for output in casts.keys() - kept:
        half = halves[casts[output].input[0]]
        half.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(half).astype(np.float32), half.name))
        graph.node.remove(casts[output])
    return wide


def _quantize_static(model: onnx.ModelProto, names: set[str], reader: _Reader) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="siman-") as folder, quiet_quantizer():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)  # of a ModelProto it would move the weights to a file that is gone afterwards
        try:
            quantize_static(
                source,
                target,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPS),
                nodes_to_quantize=sorted(names),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"OpTypesToExcludeOutputQuantization": list(OPS), "WeightSymmetric": True},
            )
        except SimanError:  # of the batches
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SimanError(f"--int8: ONNX Runtime's quantize_static failed: {reason}") from error
        return onnx.load(target)


def _rewrite(graph: onnx.GraphProto, static: onnx.GraphProto, plan: Quantization) -> None:
    """Replace the nodes of the plan, in place: Gemms by what `static` has for them, all others in our own way.

    quantize_static redirects every reader of a tensor and sorts the nodes by its own rule; of its graph nothing else is taken.
    """
    stored, ranges, outputs = stored_floats(graph), _ranges(static), {value.name for value in graph.output}
    nodes = dict[str, onnx.NodeProto]()  # by what they give
    made: Arrays = {}
    dequantized, folded = set[str](), set[str]()
    for node in graph.node:
        if node.output[0] in folded:
            continue
        new: list[onnx.NodeProto] = [node]
        arrays: Arrays = {}
        if node.name in plan.classifiers:
            new, arrays = _cluster(static, node.output[0])
            dequantized |= {n.output[0] for n in new if n.op_type == "DequantizeLinear"}
        elif node.name in plan.convolutions:
            behind, weight = followers(node, graph.node, outputs), numpy_helper.to_array(stored[node.input[WEIGHT]])
            if node.input[0] not in ranges:
                raise SimanError(f"--int8: quantize_static gave no range for {node.input[0]}, which {node.name} reads")
            replacement, arrays = quantized_conv(node, behind, weight, ranges[node.input[0]])
            new = [replacement]
            folded |= {one.output[0] for one in (behind.relu, behind.pool) if one is not None}
        elif node.name in plan.weights_only:
            new, arrays = float_conv(node, numpy_helper.to_array(stored[node.input[WEIGHT]]))
        made |= arrays
        for one in new:
            nodes.setdefault(one.output[0], one)  # Gemms may share a QuantizeLinear
    _require_unshared(graph, plan, dequantized)
    _replace(graph, list(nodes.values()), made)


def _ranges(static: onnx.GraphProto) -> dict[str, Range]:
    """How quantize_static would quantize the tensors that Conv and Gemm nodes read."""
    stored = {tensor.name: tensor for tensor in static.initializer}
    found = {}
    for node in static.node:
        if node.op_type == "QuantizeLinear":
            scale, zero_point = (numpy_helper.to_array(stored[name]).item() for name in node.input[1:])
            found[node.input[0]] = Range(np.float32(scale), zero_point)
    return found


def _cluster(static: onnx.GraphProto, output: str) -> tuple[list[onnx.NodeProto], Arrays]:
    """The node of that output behind the QuantizeLinear and DequantizeLinear nodes it reads through, and their initializers."""
    makers = {node.output[0]: node for node in static.node}
    node = makers[output]
    dequantizers = [
        makers[name] for name in node.input if name in makers and makers[name].op_type == "DequantizeLinear"
    ]
    quantizers = [makers[n.input[0]] for n in dequantizers if n.input[0] in makers]
    nodes = [*quantizers, *dequantizers, node]
    read = {name for one in nodes for name in one.input}
    return nodes, {t.name: numpy_helper.to_array(t) for t in static.initializer if t.name in read}


def _require_unshared(graph: onnx.GraphProto, plan: Quantization, dequantized: set[str]) -> None:
    """quantize_static gives a dequantized bias the name of the float one: nothing else may read that."""
    kept = {value.name for value in graph.output}
    kept |= {name for node in graph.node if node.name not in plan.classifiers for name in node.input}
    if kept & dequantized:
        raise SimanError(f"--int8: more than a Gemm reads {', '.join(sorted(kept & dequantized))}")


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], made: Arrays) -> None:
    """Give the graph these nodes and initializers, and take away what they leave unread."""
    before = {name for node in graph.node for name in node.input}
    read = {name for node in nodes for name in node.input}
    written = {name for node in nodes for name in node.output}
    tensors = [t for t in graph.initializer if t.name not in made and (t.name in read or t.name not in before)]
    tensors = [t for t in tensors if t.name not in written]
    tensors += [numpy_helper.from_array(array, name) for name, array in made.items()]
    values = [value for value in graph.value_info if value.name in read | written or value.name not in before]
    for field, new in (("node", nodes), ("initializer", tensors), ("value_info", values)):
        copies = [type(one).FromString(one.SerializeToString()) for one in new]  # clearing would take them along
        graph.ClearField(field)
        getattr(graph, field).extend(copies)


def _require(graph: onnx.GraphProto, plan: Quantization) -> None:
    """The graph is what was planned."""
    found = read_quantization(graph)
    if left := sorted(plan.names - found.names):
        raise SimanError(f"--int8: expected int8 weights in every Conv and Gemm, these kept theirs: {', '.join(left)}")
    if found != plan:
        raise SimanError(f"--int8: expected {plan}, got {found}")


def _add_operator(model: onnx.ModelProto) -> None:
    """The function of siman.QuantizedConv2d, and the import of its domain where no binary node has brought it."""
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if DOMAIN not in opsets:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    model.functions.append(quantized_body(opsets[""]))


@contextmanager
def quiet_quantizer() -> Iterator[None]:
    """quantize_static logs on the root logger, which sets that one up if it has no handler; all that matters is raised."""
    root, handler, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
