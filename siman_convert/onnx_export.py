"""A packed model to an ONNX graph: torch's exporter, then our rewrite rules, then nothing but the network is left in it.

The exporter writes one siman.BinaryConv2d node for each packed layer (`PackedConv2d` asks for it) and ordinary operators for
the rest. onnxscript's optimizer folds constants and the BatchNorms of ordinary convolutions; `onnx_fold` folds what
follows the binary ones. The function that spells the operator out goes into the model with the model's own opset.
Dynamic batch, fixed channels, height and width.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import nn

from siman_convert.description import description_of
from siman_convert.errors import SimanError
from siman_convert.frozen import halved_names, packed_layers
from siman_convert.onnx_fold import Folding, fold
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, function_body
from siman_convert.plans import Size

OPSET = 20
INPUT, OUTPUT = "input", "logits"
_WIDENED = "/float32"  # what names a float16 weight's Cast


def build_onnx(model: nn.Module) -> tuple[onnx.ModelProto, Folding]:
    """The ONNX model of a packed model (input (N, C, H, W) float32, logits (N, classes)), and what was folded.

    Raises SimanError where torch's exporter cannot follow the model.
    """
    description = description_of(model)
    for name, layer in packed_layers(model).items():
        layer.name = name
    exported = _export(model, description.architecture, description.preprocess.input_size)
    graph = exported.graph
    if description.half:
        _store_as_half(graph, halved_names(model))
    # A BatchNorm behind a float16 weight stays: folding would round that weight once more. Hosts fold it when they open.
    onnxscript.optimizer.optimize_ir(exported, should_fold=lambda node: False if _is_widening(node) else None)
    report = fold(graph)
    finished = _finish(exported)
    opsets = {opset.domain: opset.version for opset in finished.opset_import}
    assert opsets.get(DOMAIN) == VERSION, opsets
    finished.functions.append(function_body(opsets[""]))
    return finished, report


def build_float_onnx(model: nn.Module, name: str, size: Size) -> onnx.ModelProto:
    """The ONNX model of an ordinary torch model called `name`, on images of `size` (C, H, W); inputs as `build_onnx`'s.

    The BatchNorms that follow its convolutions are folded into them. Raises SimanError as `build_onnx` does.
    """
    exported = _export(model, name, size)
    onnxscript.optimizer.optimize_ir(exported)
    return _finish(exported)


def _export(model: nn.Module, name: str, size: Size) -> ir.Model:
    batch = torch.export.Dim("batch")
    image = torch.zeros(2, *size)
    with _quiet(), _plain_attention(model), torch.no_grad():
        try:
            program = torch.onnx.export(
                model.cpu().eval(), (image,), dynamo=True, optimize=False, verbose=False, opset_version=OPSET,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: batch},),
            )  # fmt: skip
        except Exception as error:  # the exporter's errors share no base class
            cause = error.__cause__ or error  # its own text only says which step failed
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            module = _culprit(error, {id(module): path for path, module in model.named_modules()})
            where = f"{name}: {module}" if module else name
            raise SimanError(f"{where}: torch's ONNX exporter failed: {reason}") from error
    assert program is not None  # dynamo=True returns a program
    return program.model


def _culprit(error: BaseException | None, paths: dict[int, str]) -> str:
    """The innermost module (of `paths`: id -> name) that the exporter was at when `error` was raised; "" where it does not say.

    Its messages do not name modules. But the frames of the traceback hold the module whose forward ran while the network was
    captured, or the node of the captured graph that could not be translated, which knows where it came from.
    """
    if error is None:
        return ""
    found, trace = "", error.__traceback__
    while trace:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, nn.Module):
                found = paths.get(id(value)) or found
            elif isinstance(value, torch.fx.Node) and (stack := value.meta.get("nn_module_stack")):
                found = str([*stack.values()][-1][0]).removeprefix("L['self'].") or found
        trace = trace.tb_next
    return found or _culprit(error.__cause__ or error.__context__, paths)


def _store_as_half(graph: ir.Graph, names: set[str]) -> None:
    """Keep these weights, which are float16 values already, as float16, with a Cast to float32 before their readers."""
    for name in sorted(names & graph.initializers.keys()):
        wide = graph.initializers[name]
        assert wide.const_value is not None
        readers = list(wide.uses())
        if not readers:
            continue
        wide.name = f"{name}{_WIDENED}"
        half = ir.tensor(wide.const_value.numpy().astype(np.float16), name=name)
        narrow = ir.Value(name=name, shape=wide.shape, type=ir.TensorType(half.dtype), const_value=half)
        cast = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT}, name=wide.name)
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = wide.name, wide.shape, wide.type
        wide.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[wide.name]
        graph.register_initializer(narrow)
        graph.insert_before(graph[0], cast)


def _is_widening(node: ir.Node) -> bool:
    return node.op_type == "Cast" and (node.name or "").endswith(_WIDENED)


def _name_nodes(graph: ir.Graph) -> None:
    """A node with a weight `x.weight` is called `x`, any other after its type, and values after the node they come from.

    The exporter's own names count its steps, and depend on its version.
    """
    used = {node.name for node in graph if node.domain == DOMAIN}
    for node in graph:
        if node.domain == DOMAIN:
            continue
        owners = [value.name.rpartition(".") for value in node.inputs if value is not None and value.name]
        owner = next((name for name, _, last in owners if last.startswith("weight")), "")
        base = owner if owner and not _is_widening(node) else node.op_type
        # A module may be called as the second node of another would be: the next free number.
        node.name = next(name for name in _numbered(base) if name not in used)
        used.add(node.name)
    for node in graph:
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}/out{index or ''}"


def _numbered(base: str) -> Iterator[str]:
    yield base
    yield from (f"{base}_{number}" for number in count(2))


def _finish(exported: ir.Model) -> onnx.ModelProto:
    """The graph without what nothing reads, its nodes named after their layers, as protobuf."""
    passes.RemoveUnusedNodesPass()(exported)
    passes.RemoveUnusedOpsetsPass()(exported)
    _name_nodes(exported.graph)
    model = ir.serde.serialize_model(exported)
    _strip(model)
    model.producer_name, model.producer_version, model.graph.name = "siman", "", "siman"
    return model


def _strip(message: Any) -> None:
    """Take the exporter's notes (source lines, its own names) off a protobuf message and everything in it.

    onnx_ir's pass for it leaves those of the values.
    """
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                _strip(part)


def binary_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The siman.BinaryConv2d nodes of a graph, in its order."""
    return [node for node in operator_nodes(model) if node.op_type == OP_NAME]


def operator_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of all operators of ours, siman.BinaryConv2d and siman.QuantizedConv2d, in the graph's order."""
    return [node for node in model.graph.node if node.domain == DOMAIN]


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """timm's attention as matrix products and softmax: of the fused operator torch translates 4 dimensions only, NesT has 5."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter reports on stdout and stderr, in warnings and in logs; what matters is raised."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
