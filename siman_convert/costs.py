"""What a plan costs and saves: multiply-accumulates (MACs) of one image and bytes of the model, layer by layer.

MACs are those of one image at the plan's input size, all calls of a layer summed: output elements times the taps of
one filter. A binarized convolution's are 1-bit MACs, everything else's full-precision ones. Matrix products and
convolutions outside Conv2d and Linear modules (attention, blur filters) are one row; element-wise operators and recurrent
layers are not counted.

Bytes are those of the state_dict: what a model file holds, which is every parameter and persistent buffer once.
    before  the elements at the width they have now (float32: 4 bytes)
    after   a binarized convolution: ceil(C_in/groups/8) * kH * kW * C_out of bits, 4 * C_out of scale, its bias, with
            learned shifts 4 * C_in of thresholds; everything else as before, and the parameters of new PReLUs
So without new ones the totals equal the sum over the model's parameters and persistent buffers, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from siman_convert.layers import SiMaNConv2d
from siman_convert.plans import ConvDecision, Plan, tap_count
from siman_convert.timm_convs import CONVOLUTIONS
from siman_convert.trace import Trace, trace

MATRIX_PRODUCTS = "(matrix products)"
EVERYTHING_ELSE = "(everything else)"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCost:
    """One row. `decision` is set for convolutions; shapes are without the batch, None where the row has none."""

    name: str
    type: Literal["conv", "linear", "other"]
    decision: ConvDecision | None
    reason: str
    input_shape: Shape | None
    output_shape: Shape | None
    binary_macs: int
    float_macs: int
    bytes_before: int
    bytes_after: int

    @property
    def binarize(self) -> bool:
        return self.decision is not None and self.decision.binarize


@dataclass(frozen=True)
class Costs:
    """The rows of a model: convolutions and Linear layers in its own order, then the rest."""

    rows: tuple[LayerCost, ...]

    @property
    def binary_macs(self) -> int:
        return sum(row.binary_macs for row in self.rows)

    @property
    def float_macs(self) -> int:
        return sum(row.float_macs for row in self.rows)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def float_macs_share(self) -> float:
        """Share of all MACs left in full precision, 0 to 1."""
        return self.float_macs / max(1, self.float_macs + self.binary_macs)

    @property
    def float_bytes_share(self) -> float:
        """Share of the original bytes that stay as they are, 0 to 1."""
        kept = sum(row.bytes_before for row in self.rows if not row.binarize)
        return kept / max(1, self.bytes_before)


def plan_costs(model: nn.Module, plan: Plan) -> Costs:
    """The figures of `plan` for `model`, which may be converted already (then `before` leaves the scales out)."""
    graph = trace(model, plan.input_size)
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    held = _bytes_by_layer(model, layers)
    decisions = {decision.name: decision for decision in plan.decisions}
    shifts = plan.topology.shifts
    rows = [_layer_row(name, layer, decisions.get(name), graph, held[name], shifts) for name, layer in layers.items()]
    products = sum(node.macs for node in graph.nodes if node.module not in layers)
    if products:
        why = "outside Conv2d and Linear"
        rows.append(LayerCost(MATRIX_PRODUCTS, "other", None, why, None, None, 0, products, 0, 0))
    rest = held[""] if "" not in layers else 0
    why = "norms, other parameters, buffers"
    new = sum(4 * prelu.channels * (3 if shifts else 1) for prelu in plan.topology.prelus)
    rows.append(LayerCost(EVERYTHING_ELSE, "other", None, why, None, None, 0, 0, rest, rest + new))
    return Costs(tuple(rows))


def _layer_row(
    name: str, layer: Any, decision: ConvDecision | None, graph: Trace, held: int, shifts: bool
) -> LayerCost:
    calls = graph.calls.get(name, ())
    linear = isinstance(layer, nn.Linear)
    taps = layer.in_features if linear else tap_count(layer)  # of one output element
    macs = sum(prod(call.output_shape) for call in calls) * taps
    largest = max(calls, key=lambda call: prod(call.input_shape), default=None)
    binary = decision is not None and decision.binarize
    return LayerCost(
        name=name,
        type="linear" if linear else "conv",
        decision=decision,
        reason="not a convolution" if decision is None else decision.reason,
        input_shape=None if largest is None else largest.input_shape[1:],
        output_shape=None if largest is None else largest.output_shape[1:],
        binary_macs=macs if binary else 0,
        float_macs=0 if binary else macs,
        bytes_before=held,
        bytes_after=_packed_bytes(decision, layer, shifts) if decision is not None and decision.binarize else held,
    )


def _packed_bytes(decision: ConvDecision, layer: nn.Module, shifts: bool) -> int:
    bias = layer.bias
    bits = -(-(decision.in_channels // decision.groups) // 8) * prod(decision.kernel_size) * decision.out_channels
    vectors = decision.out_channels + (decision.in_channels if shifts else 0)
    return bits + 4 * vectors + (_size(bias) if isinstance(bias, Tensor) else 0)


def _bytes_by_layer(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of each layer's own tensors, "" has the rest; a tensor that two modules share counts for the first only."""
    held = {"": 0, **dict.fromkeys(layers, 0)}
    counted: set[int] = set()
    for path, tensor in model.state_dict(keep_vars=True).items():
        owner, _, attribute = path.rpartition(".")
        scale = attribute == "alpha" and isinstance(layers.get(owner), SiMaNConv2d)
        if isinstance(tensor, Tensor) and id(tensor) not in counted and not scale:
            counted.add(id(tensor))
            held[_layer_of(owner, layers)] += _size(tensor)
    return held


def _layer_of(owner: str, layers: Mapping[str, nn.Module]) -> str:
    """The layer that `owner` is or lies in (a parametrized layer has children), or ""."""
    while owner and owner not in layers:
        owner = owner.rpartition(".")[0]
    return owner


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
