"""What changes around the binary convolutions, and why: shortcuts, PReLU in place of ReLU, learned shifts. Changes nothing.

A binary convolution passes on little of its input. Bi-Real Net (arXiv 1808.00278) adds the input to what the BatchNorm
behind the convolution gives, ReActNet (arXiv 2003.03488) learns thresholds before the sign and shifts around a PReLU:

    norm(conv(sign(x - threshold))) + x   then   PReLU(y - before) + after

The decisions look at the dataflow graph (`trace`) and at types of modules, never at names, and no forward is rewritten:
the shortcut goes from the convolution's input around the convolution and the BatchNorm that alone reads it, so everything else
of the network still sees one tensor of the same shape in the same place. That is also how it is for pre-activation blocks,
norm - act - conv - norm - act - conv: around conv - norm, where the input is an activation's output, and so, with PReLU,
carries both signs. From before the activation it would have to pass three modules of the block, and the sum would no longer
be one operator: a BatchNorm behind an addition cannot be folded into the convolution before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from timm.layers import BatchNormAct2d
from torch import nn

from siman_convert.errors import InputError
from siman_convert.trace import Node, Trace

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Shortcut:
    """Whether the input of a binary convolution is added to what the BatchNorm behind it gives."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    conv: str
    norm: str | None  # that BatchNorm; None where nothing is added
    reason: str


@dataclass(frozen=True)
class Activation:
    """Whether an activation behind a binary convolution becomes a PReLU.

    `name`: the module, or where it is a function the module that calls it. `slope`: the PReLU's first, of negative inputs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    prelu: bool
    channels: Count
    slope: float
    reason: str


@dataclass(frozen=True)
class Topology:
    """A decision for every binary convolution (none where no shortcuts were asked for) and every activation behind one.

    `shifts`: each binary convolution compares with a learned threshold of each channel instead of the sample's mean, and
    each of these PReLUs has a learned shift before and one after it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    shifts: bool
    shortcuts: tuple[Shortcut, ...]
    activations: tuple[Activation, ...]

    @property
    def norm_of(self) -> dict[str, str]:
        """Convolution with a shortcut -> the BatchNorm that is inside it."""
        return {shortcut.conv: shortcut.norm for shortcut in self.shortcuts if shortcut.norm is not None}

    @property
    def prelus(self) -> list[Activation]:
        return [activation for activation in self.activations if activation.prelu]


PLAIN = Topology(shifts=False, shortcuts=(), activations=())


def decide_topology(
    model: nn.Module,
    graph: Trace,
    binarized: Sequence[str],
    *,
    shortcuts: bool = False,
    prelu: bool = False,
    shifts: bool = False,
) -> Topology:
    """Decide for the `binarized` convolutions of `model`, whose forward is `graph`; InputError for shifts without PReLU."""
    if shifts and not prelu:
        raise InputError("shifts go before the sign and around PReLUs; they need prelu")
    if not (shortcuts or prelu):
        return PLAIN
    facts = _Facts(graph, dict(model.named_modules()))
    return Topology(
        shifts,
        tuple(_shortcut(name, facts) for name in binarized) if shortcuts else (),
        _activations(binarized, facts) if prelu else (),
    )


class _Facts:
    """The graph with its edges turned around."""

    def __init__(self, graph: Trace, modules: Mapping[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.readers: dict[int, list[Node]] = defaultdict(list)
        self.by_module: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            self.by_module[node.module].append(node)
            for index in dict.fromkeys(node.inputs):
                self.readers[index].append(node)

    def node_of(self, name: str) -> Node:
        """The convolution of a module that is called once."""
        (node,) = (node for node in self.by_module[name] if node.kind == "conv")
        return node

    def ancestors(self, node: Node) -> set[int]:
        """Every node that `node` depends on."""
        found = set(node.inputs)
        for index in range(node.index - 1, -1, -1):  # inputs always come before
            if index in found:
                found.update(self.graph.nodes[index].inputs)
        return found

    def descendants(self, node: Node) -> set[int]:
        """Every node that depends on `node`."""
        found = {node.index}
        for other in self.graph.nodes[node.index + 1 :]:
            if not found.isdisjoint(other.inputs):
                found.add(other.index)
        return found - {node.index}

    def reached(self, start: Node, through: frozenset[str]) -> list[Node]:
        """The first nodes of other kinds than `through` behind `start`, on every path, in the forward's order."""
        found: dict[int, Node] = {}
        seen, todo = {start.index}, [start]
        while todo:
            for node in self.readers[todo.pop().index]:
                if node.kind not in through:
                    found[node.index] = node
                elif node.index not in seen:
                    seen.add(node.index)
                    todo.append(node)
        return [found[index] for index in sorted(found)]


# What keeps a result recognisable on its way to a residual addition: normed, scaled, gated.
_STRAIGHT = frozenset({"norm", "affine", "product", "layout"})
# What lies between a convolution and its activation.
_TO_ACTIVATION = frozenset({"norm", "affine", "product", "layout", "add", "pool"})


def _shortcut(name: str, facts: _Facts) -> Shortcut:
    calls = len(facts.graph.calls[name])
    if calls > 1:
        return Shortcut(name, None, f"called {calls} times")
    node, conv = facts.node_of(name), facts.modules[name]
    assert isinstance(conv, nn.Conv2d)  # binarized
    reason = _shortcut_there(node, facts) or _other_shape(conv) or _no_norm(node, facts)
    if reason:
        return Shortcut(name, None, reason)
    (norm,) = facts.readers[node.index]
    return Shortcut(name, norm.module, "its output has its input's shape")


def _shortcut_there(node: Node, facts: _Facts) -> str | None:
    """Why the input already gets past this convolution."""
    own = facts.descendants(node) | {node.index}  # of an addition's operands: what does not depend on this convolution
    if any(add.kind == "add" and not own.issuperset(add.inputs) for add in facts.reached(node, _STRAIGHT)):
        return "its block adds a shortcut right behind it"
    before = facts.ancestors(node)
    cats = [reader for reader in facts.readers[node.index] if reader.kind == "cat"]
    if any(before.intersection(cat.inputs) for cat in cats):
        return "a concatenation keeps what it read: it needs none"
    return None


def _other_shape(conv: nn.Conv2d) -> str | None:
    """Why its output has another shape than its input, on images of some size."""
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} channels in, {conv.out_channels} out"
    if conv.stride != (1, 1):
        return f"stride {max(conv.stride)}"
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    (dy, dx), (kh, kw) = conv.dilation, conv.kernel_size
    if (top + bottom, left + right) != (dy * (kh - 1), dx * (kw - 1)):
        return "its padding changes the size of the map"
    return None


def _no_norm(node: Node, facts: _Facts) -> str | None:
    """Why there is no BatchNorm of its own that could be inside the shortcut."""
    readers = facts.readers[node.index]
    if len(readers) != 1:
        return f"its output is read {len(readers)} times"
    (reader,) = readers
    norm = facts.modules[reader.module]
    if reader.kind != "norm":
        return f"{reader.op.strip('_')} follows it, no BatchNorm that would bring it to the scale of its input"
    if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
        return f"the norm behind it is a {type(norm).__name__}, not a BatchNorm2d"
    calls = sum(node.kind == "norm" for node in facts.by_module[reader.module])
    if calls > 1:
        return f"the BatchNorm behind it is called {calls} times"
    return None


def _activations(binarized: Sequence[str], facts: _Facts) -> tuple[Activation, ...]:
    found: dict[int, Node] = {}
    for name in binarized:
        for conv in facts.by_module[name]:
            if conv.kind == "conv":
                behind = facts.reached(conv, _TO_ACTIVATION)
                found |= {node.index: node for node in behind if node.kind == "activation"}
    nodes = [found[index] for index in sorted(found)]
    by_name = {node.module: _activation(node, facts) for node in nodes}  # a module that is called again: once
    return tuple(by_name.values())


def _activation(node: Node, facts: _Facts) -> Activation:
    module, op = facts.modules[node.module], node.op.strip("_").removesuffix("_kernel")
    channels = node.shape[1] if len(node.shape) == 4 else 0
    calls = sum(other.kind == "activation" for other in facts.by_module[node.module])

    def keep(reason: str) -> Activation:
        return Activation(node.module, False, channels, 0.0, reason)

    if op == "prelu":
        return keep("a PReLU already")
    if op not in ("relu", "leaky_relu"):
        return keep(f"{op}: no PReLU is the same function")
    if type(module) not in (nn.ReLU, nn.LeakyReLU):
        return keep(f"{op} is a function that {type(module).__name__} calls, no module")
    if calls > 1:
        return keep(f"called {calls} times: each call would need slopes of its own")
    if not channels:
        return keep(f"its input is of shape {'x'.join(map(str, node.shape[1:]))}, no map")
    slope = float(getattr(module, "negative_slope", 0.0))
    return Activation(node.module, True, channels, slope, f"behind a binary convolution; starts at {op}'s slope")
