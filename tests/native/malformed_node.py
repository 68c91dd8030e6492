"""A node of one of our operators with something changed in it, as a model, and what must come of it.

`attempt` is called in another process: the library may bring it down there.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from siman_convert.onnx_op import ATTRIBUTES, DOMAIN, INPUTS, OP_NAME, VERSION, function_body
from siman_convert.onnx_quantized_op import NO_POOL, QUANTIZED_INPUTS, QUANTIZED_OP, quantized_body
from siman_convert.runtime.reference import binary_conv2d, quantized_conv2d

INTS = ("strides", "pads", "dilations", *NO_POOL)
ANY_IMAGES = ("N", None, None, None)


@dataclass(frozen=True, eq=False)
class Operator:
    name: str
    inputs: tuple[str, ...]
    attributes: dict[str, type]  # all of them; a list is one of integers
    may_be_fed: frozenset[str]  # inputs that need not be constant
    body: Callable[[int], Any]
    reference: Callable[..., np.ndarray]
    defaults: dict[str, Any] = field(default_factory=dict)  # of attributes that may be left out


BINARY = Operator(
    OP_NAME,
    INPUTS,
    {name: list if name in INTS else int for name in ATTRIBUTES},
    frozenset({"X", "residual"}),
    function_body,
    binary_conv2d,
)
QUANTIZED = Operator(
    QUANTIZED_OP,
    QUANTIZED_INPUTS,
    {"strides": list, "pads": list, "x_scale": float, "x_zero_point": int} | dict.fromkeys(NO_POOL, list),
    frozenset({"X"}),
    quantized_body,
    quantized_conv2d,
    NO_POOL,
)


@dataclass
class Node:
    """Starts as one that is right; the functions of CHANGES take one part each."""

    operator: Operator
    arrays: dict[str, np.ndarray | None]  # None: an empty name in the list of inputs
    attributes: dict[str, Any]
    inputs: list[str] = field(init=False)
    outputs: tuple[str, ...] = ("y",)
    declared: Sequence[Any] | None = ANY_IMAGES  # X's shape in the model; None: not even its rank
    fed: set[str] = field(default_factory=lambda: {"X"})
    overridable: set[str] = field(default_factory=set)  # initializers that are graph inputs as well

    def __post_init__(self) -> None:
        self.inputs = list(self.operator.inputs)

    @property
    def meant(self) -> dict[str, Any]:
        """The attributes of the operator; None for one that is missing."""
        given = {name: value for name, value in self.attributes.items() if value is not None}
        return dict.fromkeys(self.operator.attributes) | self.operator.defaults | given

    @property
    def is_refused(self) -> bool:
        """By what the reference is not handed: it takes arrays and numbers, and does not see where they come from."""
        kinds, meant = self.operator.attributes, self.meant
        return (
            any(not isinstance(meant[name], kind) for name, kind in kinds.items())
            or any(isinstance(value, float) for name in INTS if name in kinds for value in meant[name])
            or any(array is None for array in self.arrays.values())
            or (self.inputs, self.outputs) != (list(self.operator.inputs), ("y",))
            or not self.fed | self.overridable <= self.operator.may_be_fed
        )

    @property
    def may_be_refused(self) -> bool:
        """Where ONNX Runtime may refuse what the operator could do."""
        return self.declared != ANY_IMAGES or "extra" in self.attributes


def right_node(group: int, center: int) -> Node:
    rng = np.random.default_rng(3)
    channels, filters, kernel = 5, 6, (2, 3)
    weights = rng.random((filters, *kernel, channels)) < 0.5
    arrays: dict[str, np.ndarray | None] = {
        "X": rng.standard_normal((2, channels * group, 6, 7)).astype(np.float32),
        "W": np.packbits(weights, axis=-1, bitorder="little"),
        "residual": np.zeros((1, 1, 1, 1), np.float32),
    }
    arrays |= {name: rng.standard_normal(filters).astype(np.float32) for name in ("scale", "bias", "slope")}
    geometry = {"strides": [1, 2], "pads": [1, 0, 2, 1], "dilations": [1, 1]}
    return Node(BINARY, arrays, {"channels": channels, "group": group, "center": center, **geometry})


def right_quantized_node() -> Node:
    rng = np.random.default_rng(3)
    channels, filters, kernel = 5, 6, (2, 3)
    arrays: dict[str, np.ndarray | None] = {
        "X": rng.standard_normal((2, channels, 6, 7)).astype(np.float32),
        "W": rng.integers(-127, 128, (filters, channels, *kernel)).astype(np.int8),
    }
    arrays |= {name: rng.standard_normal(filters).astype(np.float32) for name in ("scale", "bias", "slope")}
    steps = {"x_scale": 0.015625, "x_zero_point": 100}
    pool = {"pool_kernel": [3, 2], "pool_strides": [2, 1], "pool_pads": [1, 0, 2, 1]}
    return Node(QUANTIZED, arrays, {"strides": [1, 2], "pads": [1, 0, 2, 1], **steps, **pool})


def attribute(node: Node, name: str, value: Any) -> None:
    """None: there is no such attribute."""
    node.attributes[name] = value


def shape(node: Node, name: str, dims: Sequence[int]) -> None:
    old = node.arrays[name]
    if old is not None:
        node.arrays[name] = np.resize(old, dims).astype(old.dtype)


def dtype(node: Node, name: str, other: str) -> None:
    old = node.arrays[name]
    if old is not None:
        with np.errstate(invalid="ignore"):  # a NaN as an integer
            node.arrays[name] = old.astype(other)


def fill(node: Node, name: str, value: float) -> None:
    old = node.arrays[name]
    if old is not None and old.dtype.kind == "f":
        node.arrays[name] = np.full_like(old, value)


def absent(node: Node, name: str) -> None:
    node.arrays[name] = None


def number_of_inputs(node: Node, count: int) -> None:
    node.inputs = [*node.operator.inputs, *node.operator.inputs][:count]


def outputs(node: Node, names: Sequence[str]) -> None:
    node.outputs = tuple(names)


def fed(node: Node, name: str) -> None:
    node.fed.add(name)


def overridable(node: Node, name: str) -> None:
    node.overridable.add(name)


def declared(node: Node, dims: Sequence[Any] | None) -> None:
    node.declared = dims


CHANGES = {
    change.__name__: change
    for change in (
        attribute, shape, dtype, fill, absent, number_of_inputs, outputs, fed, overridable, declared,
    )
}  # fmt: skip


def model_of(node: Node) -> tuple[bytes, dict[str, np.ndarray]]:
    """The model, and what to feed it. Nothing is checked here."""
    graph_inputs, initializers, feeds = [], [], {}
    for name, array in node.arrays.items():
        if array is None or name not in node.inputs:
            continue
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if name in node.fed:
            dims = node.declared if name == "X" else list(array.shape)
            graph_inputs.append(helper.make_tensor_value_info(name, kind, dims))
            feeds[name] = array
        else:
            initializers.append(numpy_helper.from_array(array, name))
            if name in node.overridable:
                graph_inputs.append(helper.make_tensor_value_info(name, kind, list(array.shape)))
    names = ["" if node.arrays[name] is None else name for name in node.inputs]
    proto = helper.make_node(node.operator.name, names, list(node.outputs), domain=DOMAIN, name="node")
    for name, value in node.attributes.items():
        if value == []:
            proto.attribute.append(AttributeProto(name=name, type=AttributeProto.INTS))
        elif value is not None:
            proto.attribute.append(helper.make_attribute(name, value))
    same = helper.make_node("Identity", [node.outputs[0] if any(node.outputs) else "X"], ["out"])
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph([proto, same], "g", graph_inputs, [result], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[node.operator.body(20)], ir_version=10)
    return model.SerializeToString(), feeds


def attempt(library: str, model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray | str:
    """The output, or what ONNX Runtime says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)[0]
    except Exception as error:  # its exceptions share no public base class
        return str(error)


def attempt_with_little_memory(mebibytes: int, *arguments: Any) -> np.ndarray | str:
    """The same, where the process may take so much more than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return attempt(*arguments)


def new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
