"""Which nodes of a graph are to be in 8 bits, or are: decided before anything is changed, and read back from the result."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper, numpy_helper

from siman_convert.errors import SimanError
from siman_convert.onnx_quantized_op import MAX_TAPS, QUANTIZED_INPUTS, QUANTIZED_OP

WEIGHT, BIAS = 1, 2  # where Conv and Gemm have them among their inputs
OPS = ("Conv", "Gemm")


@dataclass(frozen=True)
class Quantization:
    """What has 8-bit weights, by the names of the nodes, in the order of the graph.

    convolutions: siman.QuantizedConv2d. relus: those of them that a Relu is folded into; pools: a MaxPool, behind the Relu if
    there is one. weights_only: convolutions that compute in float32, and what keeps them from more. classifiers: Gemm nodes,
    quantized for ONNX Runtime. weights: how many.
    """

    convolutions: tuple[str, ...]
    relus: tuple[str, ...]
    pools: tuple[str, ...]
    weights_only: dict[str, str]
    classifiers: tuple[str, ...]
    weights: int

    @property
    def names(self) -> set[str]:
        """All nodes of it."""
        return {*self.convolutions, *self.weights_only, *self.classifiers}


def make_plan(graph: onnx.GraphProto) -> Quantization:
    """What `quantize_rest` makes of a graph's Conv and Gemm nodes whose weights are stored as float32."""
    stored = stored_floats(graph)
    nodes = [node for node in graph.node if node.op_type in OPS and node.input[WEIGHT] in stored]
    scaled = [n.name for n in nodes for a in n.attribute if a.name == "beta" and a.f != 1]
    if scaled:  # torch exports none
        raise SimanError(f"--int8: ONNX Runtime 1.32 loses the factor of a Gemm with beta, as of {', '.join(scaled)}")
    convs = [(node, why_not(node, stored[node.input[WEIGHT]].dims, stored)) for node in nodes if node.op_type == "Conv"]
    convolutions = [node for node, reason in convs if reason is None]
    outputs = {value.name for value in graph.output}
    followed = {node.name: followers(node, graph.node, outputs) for node in convolutions}
    return Quantization(
        convolutions=tuple(node.name for node in convolutions),
        relus=tuple(name for name, found in followed.items() if found.relu is not None),
        pools=tuple(name for name, found in followed.items() if found.pool is not None),
        weights_only={node.name: reason for node, reason in convs if reason is not None},
        classifiers=tuple(node.name for node in nodes if node.op_type == "Gemm"),
        weights=sum(math.prod(stored[name].dims) for name in {node.input[WEIGHT] for node in nodes}),
    )


def read_quantization(graph: onnx.GraphProto) -> Quantization:
    """What of a graph is in 8 bits; nothing of a graph that `quantize_rest` has not been at."""
    stored = stored_floats(graph)
    int8 = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    origin = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Cast", "Mul", "DequantizeLinear")
    }
    names: dict[str, list[str]] = {QUANTIZED_OP: [], "Conv": [], "Gemm": []}
    relus, pools, reasons, weights = list[str](), list[str](), dict[str, str](), set[str]()
    for node in graph.node:
        weight = node.input[WEIGHT] if node.op_type in names else ""
        while weight in origin:
            weight = origin[weight]
        if weight not in int8:
            continue
        weights.add(weight)
        names[node.op_type].append(node.name)
        if node.op_type == "Conv":
            reasons[node.name] = why_not(node, int8[weight].dims, stored) or ""
        elif node.op_type == QUANTIZED_OP:
            slope = stored[node.input[QUANTIZED_INPUTS.index("slope")]]
            relus += [] if numpy_helper.to_array(slope).any() else [node.name]
            pools += [node.name] if "pool_kernel" in attributes_of(node) else []
    count = sum(math.prod(int8[name].dims) for name in weights)
    convolutions, classifiers = tuple(names[QUANTIZED_OP]), tuple(names["Gemm"])
    return Quantization(convolutions, tuple(relus), tuple(pools), reasons, classifiers, count)


def why_not(conv: onnx.NodeProto, weight: Iterable[int], stored: Container[str]) -> str | None:
    """What keeps a Conv, of a stored weight of that shape, from becoming a QuantizedConv2d; None where nothing does."""
    attributes, dims = attributes_of(conv), list(weight)
    if len(dims) != 4:
        return f"a convolution of {len(dims) - 2} dimensions"
    if attributes.get("group", 1) != 1:
        return f"{attributes['group']} groups"
    if any(dilation != 1 for dilation in attributes.get("dilations", ())):
        return "dilation"
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return "padding that depends on the image"
    if (taps := math.prod(dims[1:])) > MAX_TAPS:
        return f"{taps:,} products an output, more than {MAX_TAPS}"
    if (bias := bias_of(conv)) and bias not in stored:
        return "a bias that is computed"
    return None


@dataclass(frozen=True)
class Followers:
    """What a QuantizedConv2d takes over from the nodes behind the convolution."""

    relu: onnx.NodeProto | None
    pool: onnx.NodeProto | None

    def last(self, conv: onnx.NodeProto) -> onnx.NodeProto:
        """The node whose output becomes the convolution's."""
        return self.pool or self.relu or conv


def followers(conv: onnx.NodeProto, nodes: Iterable[onnx.NodeProto], outputs: set[str]) -> Followers:
    """A Relu, a MaxPool, or one behind the other, each the only reader before it; `outputs` are those of the graph."""
    nodes = list(nodes)
    relu = _only_reader(conv, "Relu", nodes, outputs)
    pool = _only_reader(relu or conv, "MaxPool", nodes, outputs)
    return Followers(relu, pool if pool is not None and _is_plain(pool) else None)


def _only_reader(
    node: onnx.NodeProto, kind: str, nodes: list[onnx.NodeProto], outputs: set[str]
) -> onnx.NodeProto | None:
    readers = [reader for reader in nodes if node.output[0] in reader.input]
    alone = len(readers) == 1 and readers[0].op_type == kind and node.output[0] not in outputs
    return readers[0] if alone else None


def _is_plain(pool: onnx.NodeProto) -> bool:
    """Whether the operator can be this pool: a window that moves by its stride, out of which comes a maximum."""
    attributes = attributes_of(pool)
    return (
        len(pool.output) == 1
        and len(attributes["kernel_shape"]) == 2
        and not attributes.get("ceil_mode", 0)
        and all(dilation == 1 for dilation in attributes.get("dilations", ()))
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    )


def stored_floats(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The float32 initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}


def bias_of(node: onnx.NodeProto) -> str:
    """The name of a Conv's bias, "" where it has none."""
    return str(node.input[BIAS]) if len(node.input) > BIAS else ""


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
