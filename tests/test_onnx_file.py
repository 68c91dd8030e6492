"""model.onnx: the same bytes for the same model, and one line for whatever else is in a file, forged digests included."""

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packed_models as pm
import pytest
from onnx import helper, numpy_helper
from packed_models import Export, one_thread  # noqa: F401  a fixture

from siman_convert.description import KEY, Accuracy, canonical_json, description_of
from siman_convert.errors import InputError
from siman_convert.onnx_file import DIGEST, IMAGE, MAX_BYTES, NORMALISED, Variant, parse_onnx, read_onnx, seal
from siman_convert.onnx_op import ATTRIBUTES, DOMAIN, INPUTS, OP_NAME
from siman_convert.packed import to_metadata

VARIANTS = [Variant(images, int8) for images in (False, True) for int8 in (False, True)]
Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def export() -> Export:
    return pm.hand_export()


def restamp(data: bytes) -> bytes:
    """The digest computed anew, after the docstring of `onnx_file`: what a forger would do."""
    key = DIGEST.encode()
    at = data.index(key) + len(key) + 2  # protobuf: a field's number and its length
    zeroed = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(zeroed).hexdigest().encode() + data[at + 64 :]


def forged(data: bytes, edit: Edit) -> bytes:
    model = onnx.ModelProto.FromString(data)
    edit(model)
    return restamp(model.SerializeToString(deterministic=True))


def refusal(data: bytes) -> str:
    """The one line that `parse_onnx` refuses with."""
    with pytest.raises(InputError) as caught:
        parse_onnx(data)
    message = str(caught.value)
    assert message.isprintable()
    assert 0 < len(message) < 1000
    return message


# What is written


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_sealed_is_read_back(export: Export, variant: Variant) -> None:
    description = description_of(export.packed)
    data = seal(export.model, description, variant)
    file = parse_onnx(data)
    assert file.description == description
    assert file.variant == variant
    assert file.data == data
    del file.model.metadata_props[:]
    assert file.model == export.model


def test_the_description_is_kept_whole(export: Export) -> None:
    description = dataclasses.replace(
        description_of(export.packed),
        accuracy=Accuracy(61.25, 88.5, 400, "digits"),
        classes=("\u732b", 'a "b"\n', "", "c", "d"),
        half=True,
        weights="last",
    )
    assert parse_onnx(seal(export.model, description, Variant())).description == description


def test_same_bytes_and_nothing_else_changed(export: Export) -> None:
    before = export.model.SerializeToString(deterministic=True)
    description = description_of(export.packed)
    once = seal(export.model, description, Variant())
    assert once == seal(export.model, description, Variant()) == export.data
    assert export.model.SerializeToString(deterministic=True) == before
    assert seal(parse_onnx(once).model, description, Variant()) == once  # old metadata is replaced
    assert seal(export.model, description, Variant(int8=True)) != once


def test_the_metadata(export: Export) -> None:
    """Two keys, the second over the whole file."""
    data = seal(export.model, description_of(export.packed), Variant(takes_images=True))
    model = onnx.ModelProto.FromString(data)
    assert [prop.key for prop in model.metadata_props] == ["siman", "siman.sha256"] == [KEY, DIGEST]
    text, digest = (prop.value for prop in model.metadata_props)
    values = json.loads(text)
    assert values == to_metadata(description_of(export.packed)) | {"input": "uint8 NHWC", "int8": False}
    assert values["format"] == 2
    assert text == canonical_json(values)
    assert (NORMALISED, IMAGE) == ("float32 NCHW", "uint8 NHWC")
    model.metadata_props[1].value = "0" * 64
    assert hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest() == digest
    assert restamp(data) == data  # so the forger's digests below are right


def test_reading_a_path(export: Export, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(export.data)
    assert read_onnx(path) == parse_onnx(export.data)


# What is not a file of ours


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    """One line that begins with the path; a pipe is not waited for, what is too large not read."""
    pipe, large, damaged = tmp_path / "pipe", tmp_path / "large.onnx", tmp_path / "damaged.onnx"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: no disk is used
    damaged.write_bytes(b"\x08")
    cases = {
        tmp_path / "none.onnx": "cannot be read (no such file or directory)",
        tmp_path: "not a file; expected the model.onnx that `siman export` wrote",
        pipe: "not a file; expected the model.onnx that `siman export` wrote",
        large: "larger than 2 GiB, not an ONNX file",
        damaged: "damaged or not an ONNX file; export it again",
    }
    for path, message in cases.items():
        with pytest.raises(InputError) as caught:
            read_onnx(path)
        assert str(caught.value) == f"{path}: {message}"


def without_metadata() -> bytes:
    return helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ONNX file that siman exported"),
        (b"hello, world", "damaged or not an ONNX file"),
        (bytes(1000), "damaged or not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "damaged or not an ONNX file"),
        (without_metadata(), "not an ONNX file that siman exported (no `siman` metadata); `siman export` writes one"),
    ],
)
def test_other_files(data: bytes, message: str) -> None:
    assert refusal(data).startswith(message)


# Damage


def test_a_file_that_is_cut_off(export: Export) -> None:
    """At every place: a prefix of protobuf is often a valid message."""
    for length in range(len(export.data)):
        refusal(export.data[:length])


def test_a_single_bit(export: Export) -> None:
    """One bit of every third byte, and every bit of the last 200 bytes, where the digest stands."""
    size = len(export.data)
    flips = {(at, at * 5 % 8) for at in range(0, size, 3)} | {
        (at, bit) for at in range(size - 200, size) for bit in range(8)
    }
    assert export.data.index(DIGEST.encode()) < size - 64 < size
    for at, bit in flips:
        damaged = bytearray(export.data)
        damaged[at] ^= 1 << bit
        refusal(bytes(damaged))


@pytest.mark.parametrize("more", [b"\x00", b"more", b"\x08\x0a", "itself"])
def test_something_appended(export: Export, more: bytes | str) -> None:
    """Protobuf merges what follows into what was read."""
    refusal(export.data + (export.data if isinstance(more, str) else bytes(more)))


def test_another_graph_under_the_same_metadata(export: Export) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[0].name = "other"

    model = onnx.ModelProto.FromString(export.data)
    edit(model)
    assert "SHA-256 does not fit" in refusal(model.SerializeToString(deterministic=True))
    assert parse_onnx(forged(export.data, edit))  # integrity, not authenticity: a forger's digest fits


# Files whose digest fits


def node_of(model: onnx.ModelProto, name: str = "grouped") -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """The initializer with other values."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model, name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))

    return edit


def with_one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[-1] = value
        return array

    return change


def external(find: Callable[[onnx.ModelProto], onnx.TensorProto], location: str = "secret") -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = find(model)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def constant_in_the_function(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(a.t for node in model.functions[0].node for a in node.attribute if a.HasField("t"))


def constant_in_a_branch(model: onnx.ModelProto) -> onnx.TensorProto:
    branches = [a.g for node in model.functions[0].node for a in node.attribute if a.HasField("g")]
    return next(a.t for branch in branches for node in branch.node for a in node.attribute if a.HasField("t"))


def attribute(name: str, value: Any, of: str = "grouped") -> Edit:
    """The node's attribute, replaced; None takes it away."""

    def edit(model: onnx.ModelProto) -> None:
        node = node_of(model, of)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return edit


def dims(name: str, *values: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model, name)
        del tensor.dims[:]
        tensor.dims.extend(values)

    return edit


def opset(version: int | None) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        kept = [o for o in model.opset_import if o.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        if version is not None:
            model.opset_import.append(helper.make_opsetid(DOMAIN, version))

    return edit


def metadata(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        values = json.loads(model.metadata_props[0].value)
        change(values)
        model.metadata_props[0].value = json.dumps(values)

    return edit


def text_of_metadata(text: str) -> Edit:
    return lambda model: setattr(model.metadata_props[0], "value", text)


def input_of(index: int, name: str, of: str = "grouped") -> Edit:
    return lambda model: node_of(model, of).input.__setitem__(index, name)


def as_bfloat16_nan(model: onnx.ModelProto) -> None:
    tensor = tensor_of(model, "head.bias")
    tensor.data_type, tensor.raw_data = onnx.TensorProto.BFLOAT16, b"\xc0\x7f" * 5


def weights_of_an_input(model: onnx.ModelProto) -> None:
    """W comes from whoever calls the model."""
    tensor = tensor_of(model, "grouped.weight_bits")
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.initializer.remove(tensor)


def of_another_operator(model: onnx.ModelProto) -> None:
    node_of(model).op_type = "Shell"


PADDING = "packed weights: padding bits beyond channel 2 must be 0, but 1 of 90 last bytes have some set"
HOSTILE: dict[str, tuple[Edit, str]] = {
    "external weights": (
        external(lambda m: tensor_of(m, "stem.weight")),
        "stem.weight: its values are in another file",
    ),
    "external bits": (
        external(lambda m: tensor_of(m, "grouped.weight_bits")),
        "grouped.weight_bits: its values are in another file",
    ),
    "external, in the function": (external(constant_in_the_function), "its values are in another file"),
    "external, in a branch of the function": (external(constant_in_a_branch), "its values are in another file"),
    "external data without saying so": (
        lambda m: tensor_of(m, "stem.bias").external_data.add(key="location", value="/etc/passwd"),
        "stem.bias: its values are in another file; siman writes one self-contained file",
    ),
    "NaN scale": (replaced("grouped/scale", with_one(np.nan)), "grouped/scale: holds values that are not finite"),
    "infinite bias": (replaced("grouped/bias", with_one(np.inf)), "grouped/bias: holds values that are not finite"),
    "infinite slope": (replaced("grouped/slope", with_one(-np.inf)), "grouped/slope: holds values that are not finite"),
    "NaN in an ordinary weight": (replaced("head.weight", with_one(np.nan)), "head.weight: holds values that are not"),
    "float16 infinity": (
        replaced("head.bias", lambda a: with_one(np.inf)(a.astype(np.float16))),
        "head.bias: holds values that are not finite",
    ),
    "bfloat16 NaN": (as_bfloat16_nan, "head.bias: holds values that are not finite"),
    "padding bit": (replaced("grouped.weight_bits", with_one(8)), f"grouped: {PADDING}"),
    "bits of another type": (
        replaced("grouped.weight_bits", lambda a: a.astype(np.int8)),
        "grouped: packed weights: expected dtype uint8, got int8",
    ),
    "bits of three dimensions": (
        replaced("grouped.weight_bits", lambda a: a[..., 0]),
        "grouped: packed weights: expected a",
    ),
    "bits of more bytes": (
        replaced("grouped.weight_bits", lambda a: np.repeat(a, 2, axis=3)),
        "grouped: packed weights: expected a non-empty (O, kH, kW, 1) for 3 channels per group, got shape (10, 3, 3, 2)",
    ),
    "no filters": (replaced("grouped.weight_bits", lambda a: a[:0]), "grouped: packed weights: expected a non-empty"),
    "fewer filters": (
        replaced("grouped.weight_bits", lambda a: a[:8]),
        "grouped: scale is float32 (10,), expected float32 (8,)",
    ),
    "short scale": (
        replaced("grouped/scale", lambda a: a[:1]),
        "grouped: scale is float32 (1,), expected float32 (10,)",
    ),
    "scale of two dimensions": (
        replaced("grouped/scale", lambda a: a[:, None]),
        "grouped: scale is float32 (10, 1), expected float32 (10,)",
    ),
    "float64 bias": (
        replaced("grouped/bias", lambda a: a.astype(np.float64)),
        "grouped: bias is float64 (10,), expected float32 (10,)",
    ),
    "long slope": (
        replaced("grouped/slope", lambda a: np.append(a, a)),
        "grouped: slope is float32 (20,), expected float32 (10,)",
    ),
    **{
        f"no {name}": (
            attribute(name, None),
            f"grouped: attributes {', '.join(sorted({*ATTRIBUTES} - {name}))}; expected",
        )
        for name in ATTRIBUTES
    },
    "an attribute of the exporter": (attribute("layer", "grouped"), "center, channels, dilations, group, layer, pads,"),
    "an attribute twice": (
        lambda m: node_of(m).attribute.append(helper.make_attribute("center", 0)),
        "grouped: attributes center, center, channels",
    ),
    "center 2": (attribute("center", 2), "grouped: BinaryConv2d: center must be 0 or 1, got 2"),
    "center 1.0": (attribute("center", 1.0), "grouped: attribute center is not of type INT"),
    "channels in a list": (attribute("channels", [3]), "grouped: attribute channels is not of type INT"),
    "strides in bytes": (attribute("strides", b"\x02\x01"), "grouped: attribute strides is not of type INTS"),
    "pads in floats": (attribute("pads", [1.0] * 4), "grouped: attribute pads is not of type INTS"),
    "an attribute of the caller's": (
        lambda m: setattr(next(a for a in node_of(m).attribute if a.name == "group"), "ref_attr_name", "group"),
        "grouped: attribute group is not of type INT",
    ),
    "huge strides": (
        attribute("strides", [2**31, 1]),
        "grouped: BinaryConv2d: strides must be 2 x integer in 1..2147483647",
    ),
    "stride 0": (attribute("strides", [0, 1]), "grouped: BinaryConv2d: strides must be 2 x integer"),
    "three strides": (attribute("strides", [1, 1, 1]), "grouped: BinaryConv2d: strides must be 2 x integer"),
    "negative pads": (attribute("pads", [1, 1, -1, 1]), "grouped: BinaryConv2d: pads must be 4 x integer in 0.."),
    "huge dilation": (attribute("dilations", [1, 2**62]), "grouped: BinaryConv2d: dilations must be 2 x integer"),
    "negative group": (attribute("group", -2), "grouped: BinaryConv2d: group must be 1 x integer in 1.."),
    "group that does not divide": (attribute("group", 3), "grouped: 10 filters cannot be split into 3 groups"),
    "no channels": (attribute("channels", 0), "grouped: BinaryConv2d: channels must be 1 x integer"),
    "other channels": (attribute("channels", 9), "grouped: packed weights: expected a non-empty (O, kH, kW, 2) for 9"),
    "a negative side": (dims("stem.bias", -6), "stem.bias: shape (-6,) is impossible"),
    "two negative sides": (dims("stem.bias", -2, -3), "stem.bias: shape (-2, -3) is impossible"),
    "sides whose product overflows": (
        dims("grouped/scale", 2**32, 2**32),
        "grouped/scale: shape (4294967296, 4294967296) is impossible in a file of 2 GiB",
    ),
    "a side beyond the data": (dims("stem.bias", 2**30), "stem.bias: its values do not fill its shape (1073741824,)"),
    "fewer values": (dims("stem.bias", 5), "stem.bias: its values do not fill its shape (5,)"),
    "a tensor of no type": (
        lambda m: setattr(tensor_of(m, "stem.bias"), "data_type", 0),
        "stem.bias: its values do not fill its shape (6,)",
    ),
    "no opset of ours": (opset(None), "its siman operators are of version None, this siman has 1"),
    "a later opset of ours": (opset(2), "its siman operators are of version 2, this siman has 1"),
    "computed weights": (input_of(1, "stem/out"), "grouped: W is not a constant of the file"),
    "weights from outside": (weights_of_an_input, "grouped: W is not a constant of the file"),
    "no scale": (input_of(2, ""), "grouped: scale is not a constant of the file"),
    "no slope": (input_of(5, "nowhere"), "grouped: slope is not a constant of the file"),
    "too few inputs": (
        lambda m: node_of(m).input.pop(),
        f"grouped: siman.BinaryConv2d of 5 inputs; expected {OP_NAME} of {len(INPUTS)}",
    ),
    "no function": (
        lambda m: m.ClearField("functions"),
        "grouped: the function siman.BinaryConv2d is missing or there twice; export it again",
    ),
    "two functions": (
        lambda m: m.functions.append(m.functions[0]),
        "grouped: the function siman.BinaryConv2d is missing or there twice",
    ),
    "another operator of ours": (of_another_operator, "grouped: siman.Shell of 6 inputs; expected BinaryConv2d of 6"),
    "a newer format": (metadata(lambda v: v.update(format=3)), "format 3, this siman reads up to 2: upgrade siman"),
    "an older format": (
        metadata(lambda v: v.update(format=1)),
        "format 1, this siman reads 2 only: read it with the siman that wrote it",
    ),
    "no format": (metadata(lambda v: v.pop("format")), "metadata: format: expected 2, found None"),
    "an unknown field": (metadata(lambda v: v.update(more=1)), "metadata: more: expected nothing, found 1"),
    "a missing field": (metadata(lambda v: v.pop("plan")), "plan: Field required"),
    "another kind of input": (
        metadata(lambda v: v.update(input="float16 NCHW")),
        "its metadata says input 'float16 NCHW', int8 False; expected 'float32 NCHW' or 'uint8 NHWC', a boolean",
    ),
    "no kind of input": (metadata(lambda v: v.pop("input")), "its metadata says input None"),
    "int8 as a number": (metadata(lambda v: v.update(int8=1)), "its metadata says input 'float32 NCHW', int8 1;"),
    "a list": (text_of_metadata("[1]"), "its `siman` metadata is not a JSON object"),
    "no JSON": (text_of_metadata("{"), "its `siman` metadata is not JSON"),
    "deep JSON": (text_of_metadata("[" * 100_000), "its `siman` metadata is not JSON"),
    "NaN in JSON": (metadata(lambda v: v.update(accuracy=np.nan)), "its metadata: "),
    "metadata twice": (
        lambda m: m.metadata_props.add(key=KEY, value=m.metadata_props[0].value),
        "not an ONNX file that siman exported",
    ),
    "no metadata": (lambda m: m.metadata_props.pop(0), "not an ONNX file that siman exported"),
    "no graph": (lambda m: m.ClearField("graph"), "not an ONNX file that siman exported"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_file(export: Export, name: str) -> None:
    edit, message = HOSTILE[name]
    assert message in refusal(forged(export.data, edit))


def test_a_digest_that_is_missing_twice_or_elsewhere(export: Export) -> None:
    def without(model: onnx.ModelProto) -> None:
        del model.metadata_props[1]

    def twice(model: onnx.ModelProto) -> None:
        model.metadata_props.add(key=DIGEST, value="0" * 64)

    for edit in (without, twice):
        model = onnx.ModelProto.FromString(export.data)
        edit(model)
        assert refusal(model.SerializeToString()).startswith("its checksum is missing or there twice")


@pytest.mark.parametrize("place", ["node", "tensor", "attribute"])
def test_names_that_are_no_text(export: Export, place: str) -> None:
    """Line breaks, terminal codes and bytes that are not UTF-8 do not reach the terminal."""
    plain = b"WWWWWWWWWWWW"

    def edit(model: onnx.ModelProto) -> None:
        node = node_of(model)
        if place == "node":
            node.name = plain.decode()
            node.input[1] = "nowhere"
        elif place == "tensor":
            external(lambda m: tensor_of(m, "stem.bias"))(model)
            tensor_of(model, "stem.bias").name = plain.decode()
        else:
            node.attribute[0].name = plain.decode()

    data = forged(export.data, edit)
    assert data.count(plain) == 1
    for hostile in (b"one\ntwo\r\x1b[2J", b"\xff\xfe\xfd\xfc\n\xf8\xc0\x80____"):
        assert len(hostile) == len(plain)
        refusal(restamp(data.replace(plain, hostile)))


def test_random_changes_under_a_fitting_digest(export: Export) -> None:
    """Whatever protobuf makes of them, the answer is a file or one line, never another exception."""
    rng = np.random.default_rng(0)
    answers = Counter(_answer(_changed(export.data, rng)) for _ in range(2000))
    assert {"read", "damaged or not an ONNX file; export it again"} < answers.keys()  # of each kind some
    assert len(answers) > 20


def _changed(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bits turned, some bytes taken out or put in, and the digest of the result."""
    protected = data.index(DIGEST.encode()) - 4
    changed = bytearray(data[:protected])
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(len(changed))), rng.integers(4)
        if kind < 2:
            changed[at] ^= 1 << int(rng.integers(8))
        else:
            changed[at : at + int(rng.integers(3))] = rng.bytes(int(rng.integers(3)))
    return restamp(bytes(changed) + data[protected:])


def _answer(data: bytes) -> str:
    try:
        parse_onnx(data)
    except InputError as error:
        assert str(error).isprintable()  # noqa: PT017  reading it is a right answer, too
        return str(error)
    return "read"


class _Watch:
    """Python has no way to take an audit hook off again: this one is there once, and mostly asleep."""

    def __init__(self) -> None:
        self.awake, self.opened = False, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.awake and event == "open":
            self.opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def watch() -> _Watch:
    return _Watch()


@pytest.fixture
def opened(watch: _Watch) -> Iterator[list[str]]:
    """The files that Python opens during the test."""
    watch.awake = True
    yield watch.opened
    watch.awake = False


def test_no_other_file_is_read(
    export: Export, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the one that a tensor points to is there, of the right size."""
    path, secret = tmp_path / "model.onnx", tmp_path / "secret"
    monkeypatch.chdir(tmp_path)
    secret.write_bytes(bytes(4096))
    for location in ("secret", str(secret), "../" + tmp_path.name + "/secret"):
        path.write_bytes(forged(export.data, external(lambda m: tensor_of(m, "stem.bias"), location)))
        opened.clear()
        with pytest.raises(InputError, match="model.onnx: stem.bias: its values are in another file"):
            read_onnx(path)
        assert opened == [str(path)]
    path.write_bytes(export.data)
    opened.clear()
    read_onnx(path)
    assert opened == [str(path)]


def test_too_large_for_protobuf(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(export.data)
    description = description_of(export.packed)
    monkeypatch.setattr("siman_convert.onnx_file.MAX_BYTES", size)
    assert seal(export.model, description, Variant()) == export.data
    monkeypatch.setattr("siman_convert.onnx_file.MAX_BYTES", size - 1)
    with pytest.raises(InputError, match=f"^the ONNX file would have {size:,} bytes, more than protobuf's 2 GiB$"):
        seal(export.model, description, Variant())


def test_the_file_holds_the_tensors_of_the_packed_model(export: Export) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in parse_onnx(export.data).model.graph.initializer}
    state = export.packed.state_dict()
    for name in ("stem.weight", "head.weight", "grouped.weight_bits", "uneven.weight_bits"):
        np.testing.assert_array_equal(tensors[name], state[name].numpy())
