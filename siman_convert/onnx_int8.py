"""--int8: what a binary network keeps in full precision, its Conv and Gemm nodes, with int8 weights.

ONNX Runtime's quantize_static does the work, and is called directly: its pre-processing would inline the function of
siman.BinaryConv2d and lose the binary nodes. Each Conv and Gemm reads its weight, its bias and its input through a
DequantizeLinear, the input behind a QuantizeLinear whose range is the least and largest value of the calibration images.
Nothing else changes: binary nodes and all others read the very tensors they read before, and no output is quantized.
A binary node takes the sign of what it reads, and rounding near the mean would flip signs.

The choices, with figures of ONNX Runtime 1.32 on an AMD EPYC with AVX2 and without VNNI:
  * Weights per channel, symmetric, 7 of the 8 bits. There the kernels for uint8 times int8 add pairs of products in 16
    bits, which saturate: Conv-Relu-Conv-Gemm with random weights lost 1.2 % of its output to 8-bit rounding, but 3.7 %
    as the kernels compute it (5.6 % with int8 activations). 7 bits lose 2.4 %, with those kernels or without.
  * Activations uint8, asymmetric: the range is used whole where a Relu cuts it, and with int8 ones ONNX Runtime left most
    convolutions in float.
  * QDQ: ONNX Runtime then picks integer kernels itself. QOperator took as long and wants quantized outputs.
  * MinMax: it keeps two numbers a tensor and batch, while Percentile and Entropy keep every activation of every image.

This saves bytes, not time: ResNet-18 goes from 4.22 to 2.17 MB and takes about 4 % longer. Its stem with a quantized
output (so as an integer kernel) was no faster than in float either, 3.5 ms for 3.1, and its error more than doubled.
A test_resnet trained on digits kept its accuracy (90.2 % before, 90.4 % after, of 500 images; 96 % got the same class,
98 % with all 8 bits, 95 % with Percentile), and the number of images did not matter (256 or 1024).

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
from siman_convert.onnx_op import DOMAIN, OP_NAME

Images = npt.NDArray[np.float32]

QUANTIZED_OPS = ("Conv", "Gemm")
_WEIGHT = 1  # where both have their weight among their inputs


def quantize_rest(model: onnx.ModelProto, batches: Iterable[Images]) -> onnx.ModelProto:
    """A copy of `model` whose float Conv and Gemm weights are int8, calibrated on `batches`, each (N, C, H, W) float32.

    Float16 weights count as float. Raises InputError where there is nothing to quantize or no image to calibrate on,
    SimanError where the result is not what the module says.
    """
    source = _with_wide_weights(model)
    names = _quantizable(source)
    if not names:
        raise InputError("--int8: nothing to quantize, no Conv or Gemm of the model has stored float weights")
    quantized = _quantize_static(source, names, _Reader(source.graph.input[0].name, batches))
    _give_inputs_back(quantized.graph, names)
    _require_rest_unchanged(source, quantized, names)
    _require_int8(quantized.graph, names)
    nodes = _in_order_of(source.graph, quantized.graph)
    for field, values in (("node", nodes), ("initializer", quantized.graph.initializer)):
        source.graph.ClearField(field)
        getattr(source.graph, field).extend(values)
    return source


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
    kept = {node.input[i] for node, i in uses if node.op_type not in QUANTIZED_OPS or i != _WEIGHT}
    for node, i in uses:
        if node.input[i] not in kept:
            node.input[i] = casts[node.input[i]].input[0]
    for output in casts.keys() - kept:
        half = halves[casts[output].input[0]]
        half.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(half).astype(np.float32), half.name))
        graph.node.remove(casts[output])
    return wide


def _quantizable(model: onnx.ModelProto) -> set[str]:
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    nodes = [n for n in model.graph.node if n.op_type in QUANTIZED_OPS and n.input[_WEIGHT] in stored]
    scaled = [n.name for n in nodes for a in n.attribute if a.name == "beta" and a.f != 1]
    if scaled:  # torch exports none
        raise SimanError(f"--int8: ONNX Runtime 1.32 loses the factor of a Gemm with beta, as of {', '.join(scaled)}")
    return {node.name for node in nodes}


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
                op_types_to_quantize=list(QUANTIZED_OPS),
                nodes_to_quantize=sorted(names),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"OpTypesToExcludeOutputQuantization": list(QUANTIZED_OPS), "WeightSymmetric": True},
            )
        except SimanError:  # of the batches
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SimanError(f"--int8: ONNX Runtime's quantize_static failed: {reason}") from error
        return onnx.load(target)


def _give_inputs_back(graph: onnx.GraphProto, names: set[str]) -> None:
    """Let all nodes but the quantized ones read the tensor itself: quantize_static redirects every reader of it."""
    quantizers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    dequantizers = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in quantizers]
    origin = {node.output[0]: quantizers[node.input[0]].input[0] for node in dequantizers}
    for node in graph.node:
        if node.name not in names:
            node.input[:] = [origin.get(name, name) for name in node.input]


def _require_rest_unchanged(source: onnx.ModelProto, quantized: onnx.ModelProto, names: set[str]) -> None:
    before, after = _binary_nodes(source), _binary_nodes(quantized)
    if before.keys() != after.keys():
        lost = ", ".join(sorted(before.keys() ^ after.keys()))
        raise SimanError(
            f"--int8: expected {len(before)} {DOMAIN}.{OP_NAME} nodes, got {len(after)}; differing: {lost}"
        )
    if list(source.functions) != list(quantized.functions):
        found = [function.name for function in quantized.functions]
        raise SimanError(f"--int8: quantize_static changed the model's functions, it left {found}")
    if list(source.opset_import) != list(quantized.opset_import):
        found = [f"{opset.domain or 'ai.onnx'} {opset.version}" for opset in quantized.opset_import]
        raise SimanError(f"--int8: quantize_static changed the model's operator sets to {found}")
    rest = {node.output[0]: node for node in quantized.graph.node if node.name not in names}
    changed = [n.name for n in source.graph.node if n.name not in names and rest.get(n.output[0]) != n]
    if changed:
        raise SimanError(f"--int8: quantize_static changed nodes that are not to be quantized: {', '.join(changed)}")
    dequantized = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    shared = {value.name for value in quantized.graph.output} | {
        name for n in source.graph.node for name in _kept(n, names)
    }
    if shared & dequantized:
        raise SimanError(f"--int8: more than a Conv or Gemm reads {', '.join(sorted(shared & dequantized))}")


def _kept(node: onnx.NodeProto, names: set[str]) -> list[str]:
    """What a node goes on reading as it is."""
    return [] if node.name in names else list(node.input)


def _binary_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_NAME)}


def _require_int8(graph: onnx.GraphProto, names: set[str]) -> None:
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    stored = {n.output[0]: types.get(n.input[0]) for n in graph.node if n.op_type == "DequantizeLinear"}
    weights = {n.name: stored.get(n.input[_WEIGHT]) for n in graph.node if n.op_type in QUANTIZED_OPS}
    left = sorted(name for name in names if weights.get(name) != onnx.TensorProto.INT8)
    if left:
        raise SimanError(f"--int8: expected int8 weights in every Conv and Gemm, these kept theirs: {', '.join(left)}")


def _in_order_of(source: onnx.GraphProto, quantized: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in their old order, each behind the new ones it needs; quantize_static sorts them by its own rule."""
    makers = {node.output[0]: node for node in quantized.node}
    ordered: dict[str, onnx.NodeProto] = {}
    for old in source.node:
        node = makers[old.output[0]]
        needed = [makers[name] for name in node.input if name in makers]
        quantizers = [makers[n.input[0]] for n in needed if n.op_type == "DequantizeLinear" and n.input[0] in makers]
        for new in (*quantizers, *needed, node):
            ordered.setdefault(new.output[0], new)
    return list(ordered.values())


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
