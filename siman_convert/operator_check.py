"""Each operator of ours by itself: torch, ONNX Runtime, our kernels and the reference compute it from the same recorded input.

Equal values are expected, every one. One difference is none: the mean that a siman.BinaryConv2d takes may be summed in another
order and round to the neighbouring float32 (about one sample in ten million), so a sample that is right for a threshold one
float apart is counted, not refused. A siman.QuantizedConv2d has no form in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from siman_convert.frozen import integer_conv
from siman_convert.layers import Geometry
from siman_convert.onnx_export import INPUT, operator_nodes
from siman_convert.onnx_op import INPUTS, OP_NAME
from siman_convert.onnx_quantized_op import QUANTIZED_INPUTS
from siman_convert.runtime import native, reference

Floats = npt.NDArray[np.float32]
Values = dict[str, Any]  # arrays by name
COMPUTED = ("X", "residual")  # inputs of an operator; the others are constants


@dataclass
class OperatorCheck:
    """One operator on recorded inputs: outputs compared, and in each backend how many differ from the reference.

    neighbouring: those of samples whose mean rounded to the float beside the reference's; `different` leaves them out.
    """

    layer: str
    outputs: int
    different: dict[str, int] = field(default_factory=dict)
    neighbouring: dict[str, int] = field(default_factory=dict)
    operator: str = OP_NAME

    def failures(self) -> Iterator[str]:
        """A line for each backend that differs."""
        for backend, count in self.different.items():
            if count:
                yield f"{self.layer}: {backend} differs from the reference in {count:,} of {self.outputs:,} outputs"


def check_operators(core: onnx.ModelProto, tapped: onnx.ModelProto, images: Tensor) -> Iterator[OperatorCheck]:
    """Each operator, on the inputs it gets in ONNX Runtime for these images. ONNX Runtime takes the file's own function."""
    names = [value.name for value in tapped.graph.output]
    values: Values = dict(
        zip(names, native.open_session(tapped.SerializeToString()).run(names, {INPUT: images.numpy()}), strict=True)
    )
    values[INPUT] = images.numpy()
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in core.graph.initializer}
    for node in operator_nodes(core):
        inputs = {name: values[value] for name, value in named_inputs(node).items()}
        check = _check_binary if node.op_type == OP_NAME else _check_quantized
        yield check(core, node, inputs)


def named_inputs(node: onnx.NodeProto) -> dict[str, str]:
    """The values that a node of ours reads, by the names that its operator has for them."""
    return dict(zip(INPUTS if node.op_type == OP_NAME else QUANTIZED_INPUTS, node.input, strict=True))


def _check_quantized(core: onnx.ModelProto, node: onnx.NodeProto, inputs: Values) -> OperatorCheck:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    expected = reference.quantized_conv2d(*inputs.values(), **attributes)
    check = OperatorCheck(node.name, expected.size, operator=node.op_type)
    for backend, result in _in_sessions(core, node, inputs).items():
        check.different[backend] = int((~_equal(result, expected)).sum())
        check.neighbouring[backend] = 0
    return check


def _check_binary(core: onnx.ModelProto, node: onnx.NodeProto, inputs: Values) -> OperatorCheck:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    expected = reference.binary_conv2d(*inputs.values(), **attributes)
    check = OperatorCheck(node.name, expected.size)
    for backend, result in ({"torch": _in_torch(inputs, attributes)} | _in_sessions(core, node, inputs)).items():
        wrong = _different_samples(result, expected)
        beside = [n for n in wrong if _is_neighbouring(result[n], _sample(inputs, n), attributes)]
        counts = {n: int((~_equal(result[n], expected[n])).sum()) for n in wrong}
        check.neighbouring[backend] = sum(counts[n] for n in beside)
        check.different[backend] = sum(counts.values()) - check.neighbouring[backend]
    return check


def _in_torch(inputs: Values, attributes: dict[str, Any]) -> Floats:
    """The operator in torch, with the convolution that packed layers use."""
    X, W, scale, bias, residual, slope = (torch.from_numpy(np.array(value)) for value in inputs.values())
    top, left, bottom, right = attributes["pads"]
    (sy, sx), (dy, dx) = attributes["strides"], attributes["dilations"]
    geometry = Geometry((sy, sx), (left, right, top, bottom), (dy, dx), attributes["group"])
    acc = integer_conv(X, W, attributes["channels"], geometry, bool(attributes["center"]))
    scale, bias, slope = (vector.view(-1, 1, 1) for vector in (scale, bias, slope))
    v = scale * acc + bias + residual
    y: Floats = torch.where(v >= 0, v, slope * v).numpy()
    return y


def _in_sessions(core: onnx.ModelProto, node: onnx.NodeProto, inputs: Values) -> dict[str, Floats]:
    results = {"onnxruntime": _in_onnxruntime(core, node, inputs)}
    if native.variant() is not None:
        results["native"] = _in_onnxruntime(core, node, inputs, use_kernels=True)
    return results


def _in_onnxruntime(core: onnx.ModelProto, node: onnx.NodeProto, inputs: Values, use_kernels: bool = False) -> Floats:
    """The operator alone in a graph, its constants still constants; by the file's function, or by our kernels."""
    fed = [name for name in COMPUTED if name in inputs]
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[:], alone.output[:]
    alone.input.extend(inputs)
    alone.output.append("Y")
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    constants = [numpy_helper.from_array(value, name) for name, value in inputs.items() if name not in fed]
    graph = onnx.helper.make_graph(
        [alone],
        "one",
        [make(name, kind, inputs[name].shape) for name in fed],
        [make("Y", kind, None)],
        constants,
    )
    model = onnx.helper.make_model(
        graph, opset_imports=core.opset_import, functions=core.functions, ir_version=core.ir_version
    )
    session = native.open_session(model.SerializeToString(), use_kernels=use_kernels)
    y: Floats = session.run(None, {name: inputs[name] for name in fed})[0]
    return y


def _equal(a: Floats, b: Floats) -> npt.NDArray[np.bool_]:
    """By value: the sign of a zero is not part of the operator, and NaN is NaN."""
    return np.equal(a, b) | (np.isnan(a) & np.isnan(b))


def _different_samples(a: Floats, b: Floats) -> list[int]:
    return [n for n in range(len(a)) if not _equal(a[n], b[n]).all()]


def _sample(inputs: Values, n: int) -> Values:
    """The inputs of one sample."""
    of_one = {name: inputs[name][n : n + 1] for name in COMPUTED if len(inputs[name]) > 1}
    return inputs | of_one


def _is_neighbouring(result: Floats, inputs: Values, attributes: dict[str, Any]) -> bool:
    """Whether one sample's result is the reference's for the threshold one float below or above its own."""
    X, m = inputs["X"], reference.sample_mean(inputs["X"])
    if not attributes["center"]:
        return False
    for towards in (-np.inf, np.inf):
        signs = np.where(np.nextafter(m, np.float32(towards)) <= X, np.float32(1), np.float32(-1))
        given = reference.binary_conv2d(*{**inputs, "X": signs}.values(), **{**attributes, "center": 0})
        if _equal(given[0], result).all():
            return True
    return False
