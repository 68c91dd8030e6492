"""One forward of a model without computing anything: which tensor comes from which, and the shape every layer sees.

The forward runs on the meta device: for the length of one call (`torch.func.functional_call`) stand-ins that have only
a shape replace parameters and buffers, so the model is neither copied nor changed. A `TorchDispatchMode` writes down
every ATen operator that depends on the image, as a node with its input nodes; forward hooks tell which module was
running.
Operators below the module level are what is recorded, so nothing depends on how a model names or groups its parts.
A model whose Python code looks at values cannot run on meta; it gets one real forward on an image of zeros instead.

Limits: one image, eval mode. Operators on constants only (weight standardisation, position tables) are not nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from siman_convert.errors import InputError
from siman_convert.timm_convs import CONVOLUTIONS

Shape = tuple[int, ...]
Kind = Literal[
    "input",
    "conv",
    "linear",
    "norm",
    "activation",
    "add",
    "product",
    "affine",
    "pool",
    "resample",
    "layout",
    "cat",
    "other",
]

# ATen names without overload and trailing underscore. What is not here is "other": opaque, taken as nonlinear.
_NAMES: dict[Kind, str] = {
    "conv": "convolution _convolution cudnn_convolution mkldnn_convolution",
    "linear": "mm addmm bmm baddbmm linear",
    "norm": """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        _batch_norm_with_update native_layer_norm native_group_norm _fused_rms_norm""",
    "activation": """relu leaky_relu _prelu_kernel prelu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh
        sigmoid tanh softplus threshold clamp clamp_min clamp_max _softmax _safe_softmax _log_softmax""",
    "add": "add sub rsub",
    "product": "mul div",
    "pool": """avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d
        adaptive_max_pool2d mean sum amax max""",
    "resample": """upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa pixel_shuffle pixel_unshuffle""",
    "layout": """view _unsafe_view reshape _reshape_alias permute transpose t clone contiguous alias detach expand
        squeeze unsqueeze slice select split split_with_sizes unbind narrow chunk constant_pad_nd reflection_pad2d
        replication_pad2d _to_copy copy unfold roll flip as_strided channel_shuffle native_channel_shuffle
        lift_fresh""",
    "cat": "cat stack",
}
_KIND_OF: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class Node:
    """One operator of the forward whose result depends on the image."""

    index: int  # position in Trace.nodes; inputs always have smaller ones
    op: str  # "convolution", "relu_", ...: the ATen name without overload
    kind: Kind
    inputs: tuple[int, ...]  # nodes it reads, in argument order; constants (parameters) are left out
    shape: Shape  # of the (first) result, batch of one image included
    module: str  # innermost module that was running
    macs: int  # multiply-accumulates of one image; 0 for everything but convolutions and matrix products


@dataclass(frozen=True)
class Call:
    """One call of a convolution or Linear module."""

    input_shape: Shape
    output_shape: Shape


@dataclass(frozen=True)
class Trace:
    """The dataflow graph of one image and, for every convolution and Linear by name, its calls."""

    input_size: tuple[int, int, int]
    nodes: tuple[Node, ...]  # topological order; nodes[0] is the image
    calls: Mapping[str, tuple[Call, ...]]  # only modules that were called
    read_outside: frozenset[str]  # Conv2d modules whose parameters were read while they were not running


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Run `model` once on one image of `input_size` (C, H, W) and return what happened; the model is left as it was."""
    tensors = [*model.parameters(), *model.buffers()]
    real = next((t.device for t in tensors if not t.is_meta), None)
    unrolled = any(isinstance(module, nn.RNNBase) for module in model.modules())  # on meta step by step: minutes
    meta = [] if unrolled and real is not None else [torch.device("meta")]
    for device in [*meta, *([] if real is None else [real])]:
        try:
            return _trace_on(model, input_size, device)
        except Exception as raised:  # a model's Python code may raise anything
            error = raised
    c, h, w = input_size
    why = " ".join(str(error).split())[:160] or type(error).__name__
    raise InputError(
        f"{type(model).__name__} cannot run on an image of {c}x{h}x{w} ({why}); give the size it was made for (--img-size)"
    ) from error


def _trace_on(model: nn.Module, input_size: tuple[int, int, int], device: torch.device) -> Trace:
    state: dict[str, Tensor] = {}
    standin: dict[int, Tensor] = {}  # real tensor -> what replaces it; tied tensors share one
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if device.type == "meta":
            state[name] = torch.empty_like(tensor, device=device, requires_grad=False)
        else:  # buffers may be written by a forward; parameters are not
            state[name] = tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        standin[id(tensor)] = state[name]
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(standin[id(parameter)]), set()).add(name)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.zeros(1, *input_size, dtype=dtype, device=device)
    recorder = _Recorder(image, owners)
    with _left_as_it_was(model):
        model.eval()
        hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(recorder.entering(name)),
                module.register_forward_hook(recorder.leaving(name), with_kwargs=True),
            )
        ]
        try:
            with torch.no_grad(), recorder:
                functional_call(model, state, (image,), strict=False)
        finally:
            for hook in hooks:
                hook.remove()
    return Trace(
        input_size,
        tuple(recorder.nodes),
        MappingProxyType({name: tuple(calls) for name, calls in recorder.calls.items()}),
        frozenset(recorder.read_outside),
    )


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns the stream of operators into nodes.

    A tensor's producer is the later of two nodes: the one that returned it and the last one that wrote into its storage
    (in-place operators, assignment to a slice). All tensors stay alive while recording, so that ids remain unique.
    """

    def __init__(self, image: Tensor, owners: dict[int, set[str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = owners  # id of a parameter -> the Conv2d modules that hold it
        self.running = [""]
        self.calls: dict[str, list[Call]] = {}
        self.read_outside: set[str] = set()
        self.nodes = [Node(0, "input", "input", (), tuple(image.shape), "", 0)]
        self._alive = [image]
        self._returned = {id(image): 0}
        self._written: dict[int, int] = {}

    def entering(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.running.append(name)

        return hook

    def leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            while self.running.pop() != name:  # a forward that caught an exception leaves entries behind
                pass
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
                source = args[0] if args else kwargs["input"]
                self.calls.setdefault(name, []).append(Call(tuple(source.shape), tuple(result.shape)))

        return hook

    def _producer(self, tensor: Tensor) -> int:
        """Index of the node this tensor's values come from; -1 for a constant."""
        return max(self._returned.get(id(tensor), -1), self._written.get(_storage(tensor), -1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in read:
            self.read_outside |= self.owners.get(id(tensor), set()) - set(self.running)
        inputs = tuple(node for node in map(self._producer, read) if node >= 0)
        result = func(*args, **kwargs)
        if inputs:
            self._record(func, read, inputs, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
            for spec, value in zip(func._schema.arguments, args, strict=False):
                if isinstance(value, Tensor) and spec.alias_info is not None and spec.alias_info.is_write:
                    self._written[_storage(value)] = len(self.nodes) - 1
                    self._alive.append(value)
        return result

    def _record(self, func: Any, read: list[Tensor], inputs: tuple[int, ...], results: list[Tensor]) -> None:
        op = func._schema.name.removeprefix("aten::")
        shape = tuple(results[0].shape) if results else ()
        index = len(self.nodes)
        node = Node(index, op, _kind(op, inputs), inputs, shape, self.running[-1], _macs(op, func, read, shape))
        self.nodes.append(node)
        for tensor in results:
            self._returned[id(tensor)] = index
            self._alive.append(tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kind(op: str, inputs: tuple[int, ...]) -> Kind:
    kind = _KIND_OF.get(op.rstrip("_"), "other")
    if kind in ("add", "product") and len(inputs) == 1:
        return "affine"  # with a parameter or a number: a bias, a scale
    if kind == "linear" and len(inputs) > 1:
        return "product"  # of two results: attention
    return kind


def _macs(op: str, func: Any, read: list[Tensor], shape: Shape) -> int:
    kind = _KIND_OF.get(op.rstrip("_"))
    if kind == "conv":  # weight (O, I/groups, kH, kW); transposed (I, O/groups, kH, kW), every input element is used
        transposed = "transposed" in op
        return prod(read[0].shape if transposed else shape) * prod(read[1].shape[1:])
    if kind == "linear":  # the last two tensors are the factors, (..., n, k) and (..., k, m)
        return prod(shape) * int(read[-2].shape[-1])
    if func._schema.name.startswith("aten::_scaled_dot_product"):
        query, key, value = (t.shape for t in read[:3])  # (..., n, d), (..., m, d), (..., m, e)
        return prod(query) * int(key[-2]) + prod(query[:-1]) * prod(value[-2:])
    return 0


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what a forward leaves behind: training flags, and tables that some models cache on themselves."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    held: list[tuple[Any, Any]] = [
        (value, value.copy()) for _, attributes in before for value in attributes.values() if type(value) in _CONTAINERS
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


_CONTAINERS = (dict, list, set)


# Facts about the graph. They look at operators and edges only, never at names.

# What may lie on a shortcut: linear in its input, or a choice of its elements.
_PLAIN = frozenset({"conv", "norm", "pool", "resample", "layout", "affine"})
_NONLINEAR = frozenset({"activation", "product", "other"})
_WEIGHTED = frozenset({"conv", "linear"})


def image_readers(graph: Trace) -> frozenset[str]:
    """Modules with a convolution that sees the image with no other convolution or Linear module before it.

    A fixed transform of the image (space to depth, a DCT by matrices) does not count as a layer before it.
    """
    raw = [True]  # by node: derived from the image without any learned layer, on some path
    readers = set()
    for node in graph.nodes[1:]:
        sees = any(raw[i] for i in node.inputs)
        if sees and node.kind == "conv":
            readers.add(node.module)
        learned = node.kind == "conv" or (node.kind == "linear" and node.module in graph.calls)
        raw.append(sees and not learned)
    return frozenset(readers)


def shortcut_convs(graph: Trace) -> frozenset[str]:
    """Modules whose convolution lies on the shortcut side of a residual addition.

    Walk back from one operand of an addition along operators that are no nonlinearity and read one result. The first
    node that the other operand also descends from is the fork. What was walked is a shortcut if the other operand
    descends from the fork through a convolution (or linear map) and a nonlinearity. So parallel linear branches
    (RepVGG) are none, features of another resolution (HRNet) meet at no fork, and an identity shortcut meets it at
    once, with no convolution walked.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if node.kind == "add":
            a, b = node.inputs[:2]
            found |= _shortcut_side(graph.nodes, a, b) | _shortcut_side(graph.nodes, b, a)
    return frozenset(found)


def _shortcut_side(nodes: tuple[Node, ...], start: int, other: int) -> set[str]:
    ancestors = _ancestors(nodes, other)
    walked: set[str] = set()
    at = start
    while at not in ancestors:
        node = nodes[at]
        if node.kind not in _PLAIN or len(node.inputs) != 1:
            return set()
        if node.kind == "conv":
            walked.add(node.module)
        at = node.inputs[0]
    return walked if walked and _transforms(nodes, at, other) else set()


def _ancestors(nodes: tuple[Node, ...], of: int) -> set[int]:
    """`of` and every node it depends on."""
    seen, todo = {of}, [of]
    while todo:
        for i in nodes[todo.pop()].inputs:
            if i not in seen:
                seen.add(i)
                todo.append(i)
    return seen


def _transforms(nodes: tuple[Node, ...], fork: int, end: int) -> bool:
    """Whether one path from `fork` to `end` has both a weighted layer and a nonlinearity."""
    passed: dict[int, set[tuple[bool, bool]]] = {fork: {(False, False)}}  # node -> (weighted, nonlinear) over its paths
    for node in nodes[fork + 1 : end + 1]:
        states = set().union(*(passed[i] for i in node.inputs if i in passed))
        if states:
            w, n = node.kind in _WEIGHTED, node.kind in _NONLINEAR
            passed[node.index] = {(weighted or w, nonlinear or n) for weighted, nonlinear in states}
    return (True, True) in passed.get(end, set())
