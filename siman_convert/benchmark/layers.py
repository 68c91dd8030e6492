"""Where the time of a binary network goes: ONNX Runtime's own profiler, operator by operator.

Each operator's time is the median over many runs; where a run takes its batch in pieces (runtime/batches.py), of the sums
over them. The profiler counts whole microseconds and takes a little time itself; the sum, the time of a profiled run and
that of an unprofiled one are all given, so that one can see how much.

1-bit MACs of a binary convolution: output elements of the batch times kH * kW * C_in/group, padding taps included. Its
ceiling is what the kernels' inner step does on registers alone, on as many cores as there are threads.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime

from siman_convert.benchmark.contestants import Contestant, Images, open_quiet_session
from siman_convert.onnx_op import DOMAIN, OP_NAME
from siman_convert.onnx_quantized_op import QUANTIZED_OP

MIN_RUNS, MAX_RUNS = 10, 1000
Kind = Literal["binary", "8-bit", "convolution", "other"]
Shape = tuple[int, ...]
_KERNEL = "_kernel_time"
_ADDED = re.compile(r"(_nchwc|_token_\d+|_quant|_dq)+$")  # what ONNX Runtime's optimizer appends to names


@dataclass(frozen=True)
class Layer:
    """One row. A binary, 8-bit or other convolution by its name; other operators by type, `count` of them.

    share: of the time of all operators, 0 to 1. macs: 1-bit ones, of the batch; 0 for all but binary convolutions.
    8-bit: siman.QuantizedConv2d in our kernel; elsewhere it is ordinary operators.
    """

    name: str
    kind: Kind
    count: int
    output_shape: Shape | None
    microseconds: float
    share: float
    macs: int

    @property
    def macs_per_second(self) -> float:
        return self.macs / max(1e-9, self.microseconds * 1e-6)


@dataclass(frozen=True)
class LayerTimes:
    """layers: in order of execution, then the operators that are grouped by type, the slowest first.

    named: the binary convolutions have rows of their own, which only the native kernels give. ceiling: 1-bit MACs a second of
    `threads` cores, None without the kernels. run_ms: median of a profiled run.
    """

    threads: int
    batch_size: int
    layers: tuple[Layer, ...]
    run_ms: float
    ceiling: float | None

    @property
    def named(self) -> bool:
        return any(layer.kind == "binary" for layer in self.layers)

    @property
    def operators_ms(self) -> float:
        return sum(layer.microseconds for layer in self.layers) / 1e3

    def ceiling_share(self, layer: Layer) -> float | None:
        """Which part of the ceiling a binary convolution reaches, 0 to 1."""
        return layer.macs_per_second / self.ceiling if self.ceiling and layer.macs else None


@dataclass(frozen=True)
class Operator:
    """One operator of one session: its median time, and the shape of its first output."""

    name: str
    type: str
    output_shape: Shape
    microseconds: float


def layer_times(
    contestant: Contestant, threads: int, images: Images, seconds: float, ceiling: float | None
) -> LayerTimes:
    """Profile a contestant of ONNX Runtime on that batch, for about `seconds`. Writes beside its file, and cleans up."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(contestant.file.with_suffix(""))
    session = open_quiet_session(contestant, threads, options)
    name = session.get_inputs()[0].name
    started, runs = perf_counter(), 0
    while runs < MIN_RUNS or (perf_counter() - started < seconds and runs < MAX_RUNS):
        session.run(None, {name: images})
        runs += 1
    path = Path(session.end_profiling())
    operators, run_ms = read_profile(json.loads(path.read_text(encoding="utf-8")), runs)
    path.unlink()
    rows = layer_rows(operators, onnx.load(contestant.file).graph)
    return LayerTimes(threads, len(images), rows, run_ms, ceiling)


def read_profile(events: list[dict[str, Any]], runs: int) -> tuple[list[Operator], float]:
    """The operators in order of execution, and the median milliseconds of a run; the first run, which warms up, is left out.

    ONNX Runtime writes one `model_run` for each piece of a batch, equally many for each of the `runs`.
    """
    pieces = [event for event in events if event["name"] == "model_run"]
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            nodes[event["name"].removesuffix(_KERNEL)].append(event)
    operators = [
        Operator(name, found[0]["args"]["op_name"], _shape(found[: len(found) // runs]), _median(found, runs))
        for name, found in nodes.items()
    ]
    return operators, _median(pieces, runs) / 1e3


def _median(events: list[dict[str, Any]], runs: int) -> float:
    """Of the runs but the first: the microseconds of all that is one run's."""
    microseconds = np.array([event["dur"] for event in events]).reshape(runs, -1)
    return float(np.median(microseconds[1:].sum(axis=1)))


def _shape(events: list[dict[str, Any]]) -> Shape:
    """Of the first output for the whole batch; output_type_shape is [{"float": [1, 64, 56, 56]}, ...] for each piece of it."""
    outputs = [[shape for typed in event["args"]["output_type_shape"] for shape in typed.values()] for event in events]
    shapes = [shapes[0] if shapes else [] for shapes in outputs]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if all(shapes) else ()


def layer_rows(operators: list[Operator], graph: onnx.GraphProto) -> tuple[Layer, ...]:
    """The rows of a session's operators; `graph` is the one in the file, before ONNX Runtime optimized it."""
    total = max(1e-9, sum(operator.microseconds for operator in operators))
    taps = binary_taps(graph)
    rows, rest = list[Layer](), defaultdict[str, list[Operator]](list)
    for operator in operators:
        share = operator.microseconds / total
        shape, time = operator.output_shape, operator.microseconds
        if operator.type == OP_NAME and operator.name in taps:
            rows.append(Layer(operator.name, "binary", 1, shape, time, share, prod(shape) * taps[operator.name]))
        elif operator.type == QUANTIZED_OP:
            rows.append(Layer(operator.name, "8-bit", 1, shape, time, share, 0))
        elif "Conv" in operator.type and (name := source_name(operator.name, graph)):
            rows.append(Layer(name, "convolution", 1, shape, time, share, 0))
        else:
            rest[operator.type].append(operator)
    return (*rows, *_grouped(rest, total))


def _grouped(rest: dict[str, list[Operator]], total: float) -> Iterator[Layer]:
    sums = {type_: sum(operator.microseconds for operator in operators) for type_, operators in rest.items()}
    for type_, time in sorted(sums.items(), key=lambda item: -item[1]):
        yield Layer(type_, "other", len(rest[type_]), None, time, time / total, 0)


def binary_taps(graph: onnx.GraphProto) -> dict[str, int]:
    """kH * kW * C_in/group of every binary convolution of a graph, by its name."""
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_NAME):
            channels = next(attribute.i for attribute in node.attribute if attribute.name == "channels")
            found[node.name] = prod(shapes[node.input[1]][1:3]) * channels
    return found


def source_name(name: str, graph: onnx.GraphProto) -> str | None:
    """The convolution of the file's graph that an optimized one of that name is; None for a part of a binary one.

    ONNX Runtime calls a convolution after the value that it gives once what follows it is fused into it.
    """
    plain = _ADDED.sub("", name)
    if plain in {node.name for node in graph.node}:
        return plain
    makers = {output: node for node in graph.node for output in node.output}
    node = makers.get(plain)
    while node is not None and node.op_type != "Conv":
        node = makers.get(node.input[0]) if node.input else None
    return None if node is None else str(node.name)
