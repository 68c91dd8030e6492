"""model.onnx: what siman writes into it beside the graph, and reading it back strictly.

Metadata `siman` holds, as canonical JSON, what model.safetensors says of itself (`packed.to_metadata`) and `input`: "float32
NCHW" (normalised pixels) or "uint8 NHWC" (a decoded image), and `int8`. Metadata `siman.sha256` holds the SHA-256 of the
whole file, taken with 64 zeros in place of its own hexadecimal digits: graph, function and weights are all covered. Our
readers check it; stock ONNX Runtime cannot.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnx import numpy_helper

from siman_convert.bits import check_packed
from siman_convert.description import KEY, Description, canonical_json
from siman_convert.errors import InputError, one_line
from siman_convert.metadata import from_metadata, to_metadata
from siman_convert.onnx_op import ATTRIBUTES, DOMAIN, INPUTS, OP_NAME, VERSION
from siman_convert.onnx_quantized_op import NO_POOL, QUANTIZED_ATTRIBUTES, QUANTIZED_INPUTS, QUANTIZED_OP
from siman_convert.runtime.reference import check_attributes, check_int8_weights, check_quantized_attributes

DIGEST = "siman.sha256"
ZEROS = b"0" * 64
_BEFORE_DIGEST = DIGEST.encode() + b"\x12\x40"  # protobuf: field 2 (value) of 64 bytes follows the key
MAX_BYTES = 2**31 - 1  # protobuf's limit
_OPERATORS: dict[str, tuple[tuple[str, ...], ...]] = {  # inputs; attributes; those that are all there or none
    OP_NAME: (INPUTS, ATTRIBUTES, ()),
    QUANTIZED_OP: (QUANTIZED_INPUTS, QUANTIZED_ATTRIBUTES, tuple(NO_POOL)),
}
_COMPUTED = ("X", "residual")  # inputs; the others are constants
_KINDS = dict.fromkeys(("strides", "pads", "dilations", *NO_POOL), onnx.AttributeProto.INTS) | {
    "x_scale": onnx.AttributeProto.FLOAT
}
NORMALISED, IMAGE = "float32 NCHW", "uint8 NHWC"


@dataclass(frozen=True)
class Variant:
    """How the graph differs from the plain export. takes_images: uint8 (N, H, W, C) in; int8: the rest was quantized."""

    takes_images: bool = False
    int8: bool = False


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read and checked; `data` are its bytes, which sessions are opened from."""

    model: onnx.ModelProto
    description: Description
    variant: Variant
    data: bytes


def seal(model: onnx.ModelProto, description: Description, variant: Variant) -> bytes:
    """The file's bytes: `model` with its metadata. The same model and description give the same bytes."""
    sealed = onnx.ModelProto()
    sealed.CopyFrom(model)
    del sealed.metadata_props[:]
    values = to_metadata(description) | {"input": IMAGE if variant.takes_images else NORMALISED, "int8": variant.int8}
    for key, value in ((KEY, canonical_json(values)), (DIGEST, ZEROS.decode())):
        sealed.metadata_props.add(key=key, value=value)
    if sealed.ByteSize() > MAX_BYTES:
        raise InputError(f"the ONNX file would have {sealed.ByteSize():,} bytes, more than protobuf's 2 GiB")
    data: bytes = sealed.SerializeToString(deterministic=True)
    at = _digest_position(data)
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + len(ZEROS) :]


def read_onnx(path: Path) -> OnnxFile:
    """Read and check a file that siman exported. Raises InputError, one line that starts with the path."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise InputError(f"{path}: not a file; expected the model.onnx that `siman export` wrote")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than 2 GiB, not an ONNX file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from error
    try:
        return parse_onnx(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_onnx(data: bytes) -> OnnxFile:
    """`read_onnx` of bytes."""
    try:
        return _parse(data)
    except InputError as error:
        raise InputError(one_line(str(error))) from None


def _parse(data: bytes) -> OnnxFile:
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise InputError("damaged or not an ONNX file; export it again") from None
    _check_text(model)
    found = [prop.value for prop in model.metadata_props if prop.key == KEY]
    if len(found) != 1 or not model.HasField("graph"):
        raise InputError("not an ONNX file that siman exported (no `siman` metadata); `siman export` writes one")
    _check_digest(data)
    description, variant = _metadata(found[0])
    _check_tensors(model)
    _check_operators(model)
    _check_others(model)
    return OnnxFile(model, description, variant, data)


def _digest_position(data: bytes) -> int:
    if data.count(_BEFORE_DIGEST) != 1:
        raise InputError("its checksum is missing or there twice; it was changed after the export; export it again")
    return data.index(_BEFORE_DIGEST) + len(_BEFORE_DIGEST)


def _check_digest(data: bytes) -> None:
    at = _digest_position(data)
    found = data[at : at + len(ZEROS)]
    if hashlib.sha256(data[:at] + ZEROS + data[at + len(ZEROS) :]).hexdigest().encode() != found:
        raise InputError("damaged, or changed after the export: its SHA-256 does not fit; export it again")


def _metadata(text: str) -> tuple[Description, Variant]:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("its `siman` metadata is not JSON") from None
    if not isinstance(values, dict):
        raise InputError("its `siman` metadata is not a JSON object")
    kind, int8 = values.pop("input", None), values.pop("int8", None)
    if kind not in (NORMALISED, IMAGE) or not isinstance(int8, bool):
        raise InputError(
            f"its metadata says input {kind!r}, int8 {int8!r}; expected {NORMALISED!r} or {IMAGE!r}, a boolean"
        )
    return from_metadata(values, "its metadata"), Variant(kind == IMAGE, int8)


def _check_text(message: Any) -> None:
    """Every string, of subgraphs and functions too, is UTF-8: protobuf reads others, as bytes, and writes none."""
    for field, value in message.ListFields():
        parts = value if field.is_repeated else (value,)
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            raise InputError(f"text in it ({field.name}) is not UTF-8; export it again")
        if field.message_type is not None:
            for part in parts:
                _check_text(part)


def _check_tensors(model: onnx.ModelProto) -> None:
    """Every initializer holds what its shape says, in the file itself, and is finite."""
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(f"{tensor.name}: its values are in another file; siman writes one self-contained file")
    for tensor in model.graph.initializer:
        array = _array(tensor)
        if array.dtype.kind in "fcV" and not np.isfinite(array).all():  # V: ONNX's types that numpy lacks, as bfloat16
            raise InputError(f"{tensor.name}: holds values that are not finite")


def _all_tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor of a protobuf message, those of attributes, subgraphs and functions too."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from _all_tensors(part)


def _array(tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    if any(side < 0 for side in tensor.dims) or math.prod(tensor.dims) > MAX_BYTES:
        raise InputError(f"{tensor.name}: shape {tuple(tensor.dims)} is impossible in a file of 2 GiB")
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{tensor.name}: its values do not fill its shape {tuple(tensor.dims)} ({error})") from None


def _check_operators(model: onnx.ModelProto) -> None:
    """Every node of our operators has its attributes, weights and vectors that fit them, and a function in the file."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if versions.get(DOMAIN) != VERSION:
        raise InputError(f"its {DOMAIN} operators are of version {versions.get(DOMAIN)}, this siman has {VERSION}")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    functions = [(function.domain, function.name) for function in model.functions]
    for node in model.graph.node:
        if node.domain == DOMAIN:
            try:
                _check_operator(node, tensors)
                if functions.count((DOMAIN, node.op_type)) != 1:
                    raise InputError(f"the function {DOMAIN}.{node.op_type} is missing or there twice; export it again")
            except InputError as error:
                raise InputError(f"{node.name or 'unnamed node'}: {error}") from None


def _check_others(model: onnx.ModelProto) -> None:
    """Every other node, those of functions and subgraphs too, is one of standard ONNX's."""
    for node in _all_nodes(model):
        known = node.op_type in _OPERATORS if node.domain == DOMAIN else _is_standard(node)
        if not known:
            what = one_line(f"{node.domain or 'ONNX'}.{node.op_type}")
            raise InputError(
                f"{node.name or 'unnamed node'}: no operator {what} is known; siman writes ONNX's own and {DOMAIN}'s"
            )


def _is_standard(node: onnx.NodeProto) -> bool:
    try:
        return bool(onnx.defs.has(node.op_type, node.domain)) and node.domain in ("", "ai.onnx")
    except (TypeError, UnicodeError):  # names that are not UTF-8 come as bytes
        return False


def _all_nodes(message: Any) -> Iterator[onnx.NodeProto]:
    """Every node of a protobuf message; no subgraph is passed over."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                if isinstance(part, onnx.NodeProto):
                    yield part
                yield from _all_nodes(part)


def _check_operator(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> None:
    inputs, names, optional = _OPERATORS.get(node.op_type, ((), (), ()))
    if not inputs or len(node.input) != len(inputs):
        expected = " or ".join(f"{name} of {len(inputs)}" for name, (inputs, *_) in _OPERATORS.items())
        raise InputError(f"{DOMAIN}.{node.op_type} of {len(node.input)} inputs; expected {expected}")
    attributes = _attributes(node, names, optional)
    (check_attributes if node.op_type == OP_NAME else check_quantized_attributes)(**attributes)
    constants = {name: value for name, value in zip(inputs, node.input, strict=True) if name not in _COMPUTED}
    missing = [name for name, value in constants.items() if value not in tensors]
    if missing:
        raise InputError(f"{missing[0]} is not a constant of the file")
    W = _array(tensors[constants["W"]])
    if node.op_type == QUANTIZED_OP:
        check_int8_weights(W)
    else:
        check_packed(W, attributes["channels"])
        if len(W) % attributes["group"]:
            raise InputError(f"{len(W)} filters cannot be split into {attributes['group']} groups")
    for name in ("scale", "bias", "slope"):
        vector = _array(tensors[constants[name]])
        if vector.dtype != np.float32 or vector.shape != W.shape[:1]:
            raise InputError(f"{name} is {vector.dtype} {vector.shape}, expected float32 {W.shape[:1]}")


def _attributes(node: onnx.NodeProto, expected: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """All that the operator has, each once and of its type; the optional ones all or none."""
    names = sorted(str(attribute.name) for attribute in node.attribute)  # a name that is not UTF-8 comes as bytes
    if names not in (sorted(expected), sorted({*expected, *optional})):
        raise InputError(f"attributes {', '.join(names)}; expected {', '.join(sorted(expected))}")
    for attribute in node.attribute:
        kind = _KINDS.get(attribute.name, onnx.AttributeProto.INT)
        if attribute.type != kind or attribute.ref_attr_name:
            raise InputError(
                f"attribute {attribute.name} is not of type {onnx.AttributeProto.AttributeType.Name(kind)}"
            )
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
