"""Rewrite rules: what follows a siman.BinaryConv2d node in an exported graph goes into its inputs.

    BatchNormalization   scale, bias      gamma / sqrt(var + eps) * (v - mean) + beta, any sign of gamma
    Add                  residual         the other operand, of exactly Y's shape
    Add, Sub             bias             a constant of each channel, before or after a residual
    Relu, LeakyRelu,     slope            Y = v >= 0 ? v : slope*v
    PRelu

The operator computes v = scale*acc + bias + residual and then the slope, so the rules apply in this order only, and each
asks first whether it may (`check` gives a reason why not) before it does anything. A binary convolution whose output is
also read elsewhere keeps it. Parameters are folded in float64 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from siman_convert.frozen import LAYER
from siman_convert.onnx_op import DOMAIN, INPUTS, OP_NAME

Vector = npt.NDArray[np.float64]  # (O,)
RESIDUAL = INPUTS.index("residual")
NO_RESIDUAL = "no_residual"  # the one (1, 1, 1, 1) zero that all operators without a residual share


class Refusal(NamedTuple):
    """Why an operator of the graph was not folded into the binary convolution before it."""

    layer: str
    node: str
    reason: str


@dataclass
class Folding:
    """What was folded, by operator type, into how many binary convolutions, and what was not."""

    operators: int = 0
    folded: Counter[str] = field(default_factory=Counter)
    refused: list[Refusal] = field(default_factory=list)


def fold(graph: ir.Graph) -> Folding:
    """Fold into every siman.BinaryConv2d node of `graph`, in place; its nodes are named after their layers."""
    report, operators = Folding(), list[_Operator]()
    names: Counter[str] = Counter()
    no_residual = _initializer(graph, NO_RESIDUAL, np.zeros((1, 1, 1, 1), np.float32))
    for node in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP_NAME)]:
        layer = node.attributes.pop(LAYER).as_string()
        names[layer] += 1
        node.name = layer if names[layer] == 1 else f"{layer}#{names[layer]}"  # a layer may be called again
        report.operators += 1
        operator = _Operator(graph, node, no_residual)
        while (follower := _foldable(operator)) is not None:
            _RULES[follower.op_type].rewrite(operator, follower)
            report.folded[follower.op_type] += 1
        operator.write()
        operators.append(operator)
    # Only now: an Add that reads two binary convolutions was folded into one of them and is no refusal of the other's.
    report.refused = [refusal for operator in operators for refusal in _refusals(operator)]
    return report


class _Operator:
    """A node with its parameters in float64. `residual` is None, `slope` all ones, as long as nothing took them."""

    def __init__(self, graph: ir.Graph, node: ir.Node, no_residual: ir.Value) -> None:
        self.graph, self.node, self.no_residual = graph, node, no_residual
        _, _, scale, bias, _, slope = node.inputs
        self.scale, self.bias, self.slope = (_constant(value).astype(np.float64) for value in (scale, bias, slope))
        self.residual: ir.Value | None = None

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def has_slope(self) -> bool:
        return bool(np.any(self.slope != 1))

    def absorb(self, follower: ir.Node) -> None:
        """Take the place of `follower`: its readers read this node, which moves to where it stood."""
        taken = follower.outputs[0]
        self.graph.remove(self.node)
        self.graph.insert_before(follower, self.node)
        name, is_output = taken.name, taken.is_graph_output()
        taken.replace_all_uses_with(self.output, replace_graph_outputs=True)
        self.graph.remove(follower, safe=True)
        if is_output:
            self.output.name = name

    def write(self) -> None:
        for name, values in (("scale", self.scale), ("bias", self.bias), ("slope", self.slope)):
            value = _initializer(self.graph, f"{self.node.name}/{name}", values.astype(np.float32))
            self.node.replace_input_with(INPUTS.index(name), value)
        self.node.replace_input_with(RESIDUAL, self.no_residual if self.residual is None else self.residual)


def _foldable(operator: _Operator) -> ir.Node | None:
    """The next node that may be folded."""
    return next((node for node in _followers(operator) if _check(operator, node) is None), None)


def _refusals(operator: _Operator) -> list[Refusal]:
    name = operator.node.name or ""
    return [
        Refusal(name, f"{node.op_type} {node.name}", reason)
        for node in _followers(operator)
        if (reason := _check(operator, node)) is not None
    ]


def _followers(operator: _Operator) -> list[ir.Node]:
    """The readers of the operator's output that some rule is about."""
    return [node for node in operator.output.consumers() if node.op_type in _RULES and node.domain in ("", "ai.onnx")]


def _check(operator: _Operator, node: ir.Node) -> str | None:
    return _check_output(operator) or _RULES[node.op_type].check(operator, node)


def _check_output(operator: _Operator) -> str | None:
    if operator.output.is_graph_output():
        return "the output before it is an output of the model"
    uses = len(list(operator.output.uses()))
    return None if uses == 1 else f"the output before it is used {uses} times"


# The rules. `check(operator, follower)` gives the reason not to, or None; `rewrite` never refuses.


def _check_batch_norm(operator: _Operator, norm: ir.Node) -> str | None:
    if operator.has_slope:
        return "an activation is folded already"
    if operator.residual is not None:
        return "a residual is folded already"
    if norm.attributes.get_int("training_mode", 0):
        return "it is in training mode"
    if any(value is None or value.const_value is None for value in norm.inputs[1:]):
        return "its parameters are not constant"
    factor, offset = _affine(norm)
    if not np.isfinite(factor).all() or not np.isfinite(offset).all():
        return "its parameters are not finite"
    return None


def _fold_batch_norm(operator: _Operator, norm: ir.Node) -> None:
    factor, offset = _affine(norm)
    operator.scale = operator.scale * factor
    operator.bias = operator.bias * factor + offset
    operator.absorb(norm)


def _affine(norm: ir.Node) -> tuple[Vector, Vector]:
    """factor, offset with BatchNorm(v) = factor*v + offset."""
    gamma, beta, mean, var = (_constant(value).astype(np.float64) for value in norm.inputs[1:])
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        return factor, beta - mean * factor


def _check_add(operator: _Operator, add: ir.Node) -> str | None:
    if operator.has_slope:
        return "an activation is folded already"
    if _shift(operator, add) is not None:
        return None
    if operator.residual is not None:
        return "a residual is folded already"
    other = _other_operand(operator, add)
    if other.type != operator.output.type or not _same_shape(other.shape, operator.output.shape):
        return f"its operands' shapes {other.shape} and {operator.output.shape} are not provably equal"
    return None


def _fold_add(operator: _Operator, add: ir.Node) -> None:
    if _shift(operator, add) is not None:
        _fold_constant(operator, add)
        return
    operator.residual = _other_operand(operator, add)
    operator.absorb(add)


def _check_sub(operator: _Operator, sub: ir.Node) -> str | None:
    if operator.has_slope:
        return "an activation is folded already"
    if sub.inputs[0] is not operator.output:
        return "it is what is subtracted"
    return None if _shift(operator, sub) is not None else "what it subtracts is not one constant for each channel"


def _fold_constant(operator: _Operator, node: ir.Node) -> None:
    shift = _shift(operator, node)
    assert shift is not None  # checked
    operator.bias = operator.bias + (shift if node.op_type == "Add" else -shift)
    operator.absorb(node)


def _shift(operator: _Operator, node: ir.Node) -> Vector | None:
    """The other operand of an Add or Sub where it is a constant of each channel, (O,)."""
    other = _other_operand(operator, node)
    return None if other is operator.output else _by_channel(operator, other)


def _other_operand(operator: _Operator, add: ir.Node) -> ir.Value:
    first, second = add.inputs
    other = second if first is operator.output else first
    assert other is not None  # Add has two inputs
    return other


def _same_shape(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Equal rank, and every dimension the same number or the same named unknown."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(
        x == y if isinstance(x, int) or isinstance(y, int) else x.value is not None and x.value == y.value
        for x, y in zip(a, b, strict=True)
    )


def _check_activation(operator: _Operator, node: ir.Node) -> str | None:
    if operator.has_slope:
        return "an activation is folded already"
    if node.op_type == "PRelu" and node.inputs[0] is not operator.output:
        return "it is read as the slope"
    if _slope(operator, node) is None:
        return "its slope is not one constant for each channel"
    return None


def _fold_activation(operator: _Operator, node: ir.Node) -> None:
    slope = _slope(operator, node)
    assert slope is not None  # checked
    operator.slope = slope
    operator.absorb(node)


def _slope(operator: _Operator, node: ir.Node) -> Vector | None:
    """The slope of each channel, (O,), or None where there is no such thing."""
    channels = len(operator.scale)
    if node.op_type == "Relu":
        return np.zeros(channels)
    if node.op_type == "LeakyRelu":
        return np.full(channels, node.attributes.get_float("alpha", 0.01))
    return _by_channel(operator, node.inputs[1])


def _by_channel(operator: _Operator, value: ir.Value | None) -> Vector | None:
    """A constant that is broadcast to the operator's output as one number of each channel, (O,); None for any other."""
    if value is None or value.const_value is None:
        return None
    channels, array = len(operator.scale), _constant(value).astype(np.float64)
    shape = (1,) * (4 - array.ndim) + array.shape
    if array.ndim > 4 or shape not in ((1, 1, 1, 1), (1, channels, 1, 1)):
        return None
    return np.broadcast_to(array.reshape(-1), channels).copy()


class _Rule(NamedTuple):
    check: Callable[[_Operator, ir.Node], str | None]
    rewrite: Callable[[_Operator, ir.Node], None]


_ACTIVATION = _Rule(_check_activation, _fold_activation)
_RULES = {
    "BatchNormalization": _Rule(_check_batch_norm, _fold_batch_norm),
    "Add": _Rule(_check_add, _fold_add),
    "Sub": _Rule(_check_sub, _fold_constant),
    "Relu": _ACTIVATION,
    "LeakyRelu": _ACTIVATION,
    "PRelu": _ACTIVATION,
}


def _constant(value: ir.Value | None) -> npt.NDArray[np.float32]:
    assert value is not None
    assert value.const_value is not None
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.float32]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
