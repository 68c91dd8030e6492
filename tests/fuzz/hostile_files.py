"""Files as nobody should write them: for each reader a table of names and makers, which start from its seed."""

import gzip
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from make_seeds import SEEDS, idx_bytes
from onnx import helper
from readers import RUN_FILES, SEPARATOR, forge_onnx, forge_packed

import numpy as np  # isort: skip

Bytes = Callable[[], bytes]
Change = Callable[[dict[str, Any]], object]
TRACE = "siman-was-here"  # the file that executed code would make, in the working directory

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
DEEP = "[" * 100_000 + "]" * 100_000


class Executed:
    """Pickles into a call that leaves TRACE."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {TRACE}",)


def seed(name: str) -> bytes:
    return (SEEDS / name).read_bytes()


# model.safetensors


def packed(change: Change, forge: bool = True) -> Bytes:
    """The seed with something changed in its header; with the digests computed anew, or not."""

    def make() -> bytes:
        data = seed("packed/float")
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        changed = struct.pack("<Q", len(text)) + text + data[8 + length :]
        return forge_packed(changed) if forge else changed

    return make


def described(**fields: Any) -> Bytes:
    """The seed with other entries in its description."""

    def change(header: dict[str, Any]) -> None:
        values = json.loads(header["__metadata__"]["siman"])
        header["__metadata__"]["siman"] = json.dumps(values | fields)

    return packed(change)


def tensor(name: str, **fields: Any) -> Bytes:
    return packed(lambda header: header[name].update(fields))


def payload(value: bytes) -> Bytes:
    """The seed with other last bytes of its tensors, forged."""
    return lambda: forge_packed(seed("packed/float")[: -len(value)] + value)


def unfinished(text: bytes, length: int | None = None) -> Bytes:
    return lambda: struct.pack("<Q", len(text) if length is None else length) + text


PACKED: Mapping[str, Bytes] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"1234567",
    "header of 2**63": unfinished(b"{}", 2**63),
    "header of 99 MB in a small file": unfinished(b"{}", 99_000_000),
    "header is no JSON": unfinished(b"\xff" * 64),
    "header is deep": unfinished(DEEP.encode()),
    "header is a list": unfinished(b"[1]"),
    "no metadata": packed(lambda header: header.pop("__metadata__")),
    "metadata is a text": packed(lambda header: header.update(__metadata__="siman")),
    "two metadata": packed(lambda header: header["__metadata__"].update(other="x"), forge=False),
    "metadata is deep": packed(lambda header: header["__metadata__"].update(siman=DEEP), forge=False),
    "metadata is no JSON": packed(lambda header: header["__metadata__"].update(siman="{"), forge=False),
    "metadata has a number without end": packed(
        lambda header: header["__metadata__"].update(siman=f"[{'9' * 9999}]"), forge=False
    ),
    "half of it": lambda: seed("packed/float")[:2000],
    "one bit flipped": lambda: seed("packed/float")[:-9] + b"\x01" + seed("packed/float")[-8:],
    "a pickle": lambda: pickle.dumps(Executed()),
    "architecture on the hub": described(architecture="hf-hub:someone/something"),
    "architecture in a folder": described(architecture="local-dir:/etc"),
    "architecture unknown": described(architecture="resnet1818"),
    "architecture of another size": described(architecture="test_resnet"),
    "architecture is a number": described(architecture=5),
    "no classes": described(classes=[], arguments={"num_classes": 0}),
    "other classes": described(classes=["a"], arguments={"num_classes": 1}),
    "a million classes": described(classes=["x"] * 1_000_000, arguments={"num_classes": 1_000_000}),
    "class that is not UTF-8": described(classes=["\ud800", "b"]),
    "plan of nothing": described(plan={}),
    "format 3": described(format=3),
    "format true": described(format=True),
    "accuracy without end": described(accuracy={"top1": 1e999, "top5": 1, "images": 1, "data": ""}),
    "input of 2**40 pixels": described(
        preprocess={"input_size": [3, 2**20, 2**20], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [1.0] * 3,
                    "crop_pct": 1.0, "crop_mode": "center", "pad_to_size": False}
    ),
    "unknown field": described(extra=1),
    "bfloat16": tensor("stem.weight", dtype="BF16"),
    "shape of 2**62": tensor("stem.weight", shape=[2**31, 2**31]),
    "negative shape": tensor("stem.weight", shape=[-4, -3, 3, 3]),
    "bytes beyond the end": tensor("stem.weight", data_offsets=[0, 2**40]),
    "bytes that overlap": tensor("stem.weight", data_offsets=[0, 432]),
    "tensor renamed": packed(lambda header: header.update(evil=header.pop("stem.weight"))),
    "infinite weights": payload(struct.pack("<4f", *[float("inf")] * 4)),
    "padding bits set": payload(b"\xff" * 1000),
}  # fmt: skip


# model.onnx


def graph(change: Callable[[onnx.ModelProto], object]) -> Bytes:
    """The seed with something changed, and its digest computed anew."""

    def make() -> bytes:
        model = onnx.ModelProto.FromString(seed("onnx/plain"))
        change(model)
        return forge_onnx(model.SerializeToString(deterministic=True))

    return make


def _binary(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.domain == "siman")


def _no_text() -> bytes:
    data = seed("onnx/plain")
    name = _binary(onnx.ModelProto.FromString(data)).input[0].encode()
    return forge_onnx(data.replace(name, b"\xff" + name[1:]))


def _attribute(name: str, value: Any) -> Bytes:
    def change(model: onnx.ModelProto) -> None:
        node = _binary(model)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return graph(change)


def _external(model: onnx.ModelProto) -> None:
    held = model.graph.initializer[0]
    held.data_location = onnx.TensorProto.EXTERNAL
    held.external_data.add(key="location", value="../../../../etc/passwd")


def _described_onnx(**fields: Any) -> Bytes:
    def change(model: onnx.ModelProto) -> None:
        held = next(prop for prop in model.metadata_props if prop.key == "siman")
        held.value = json.dumps(json.loads(held.value) | fields, sort_keys=True, separators=(",", ":"))

    return graph(change)


ONNX: Mapping[str, Bytes] = {
    "empty": lambda: b"",
    "garbage": lambda: b"\xff" * 5000,
    "half of it": lambda: seed("onnx/plain")[:4000],
    "one bit flipped": lambda: seed("onnx/plain")[:3000] + b"\x01" + seed("onnx/plain")[3001:],
    "no digest": graph(lambda model: model.metadata_props.pop()),
    "no metadata": graph(lambda model: model.metadata_props.pop(0)),
    "metadata twice": graph(lambda model: model.metadata_props.append(model.metadata_props[0])),
    "architecture on the hub": _described_onnx(architecture="hf-hub:someone/something"),
    "architecture unknown": _described_onnx(architecture="resnet1818"),
    "metadata is deep": graph(lambda model: setattr(model.metadata_props[0], "value", DEEP)),
    "input is a dance": _described_onnx(input="tango"),
    "other classes": _described_onnx(classes=["a"], arguments={"num_classes": 1}),
    "weights in another file": graph(_external),
    "shape of 2**62": graph(lambda model: model.graph.initializer[0].dims.extend([2**31, 2**31])),
    "negative shape": graph(lambda model: model.graph.initializer[0].dims.extend([-1])),
    "weights cut off": graph(lambda model: setattr(model.graph.initializer[0], "raw_data", b"123")),
    "type that is none": graph(lambda model: setattr(model.graph.initializer[0], "data_type", 999)),
    "operator of ours that is none": graph(lambda model: setattr(_binary(model), "op_type", "RunThis")),
    "operator that is none": graph(lambda model: setattr(model.graph.node[-1], "op_type", "RunThis")),
    "domain that is none": graph(lambda model: setattr(_binary(model), "domain", "simcn")),
    "operator that is none, in the function": graph(
        lambda model: setattr(model.functions[0].node[0], "op_type", "RunThis")
    ),
    "version 7": graph(lambda model: setattr(model.opset_import[-1], "version", 7)),
    "strides of 2**62": _attribute("strides", [2**62, 2**62]),
    "strides of 0": _attribute("strides", [0, 0]),
    "pads below 0": _attribute("pads", [-1, -1, -1, -1]),
    "three pads": _attribute("pads", [1, 1, 1]),
    "group 0": _attribute("group", 0),
    "center 2": _attribute("center", 2),
    "channels as text": _attribute("channels", "four"),
    "unknown attribute": _attribute("script", "import os"),
    "one input": graph(lambda model: _binary(model).input.__delitem__(slice(1, None))),
    "value that is none": graph(lambda model: _binary(model).input.__setitem__(0, "nowhere")),
    "value whose name is no text": _no_text,
    "value from itself": graph(lambda model: _binary(model).input.__setitem__(0, _binary(model).output[0])),
    "no function": graph(lambda model: model.ClearField("functions")),
    "function that calls itself": graph(
        lambda model: model.functions[0].node.append(helper.make_node("BinaryConv2d", ["X"], ["Z"], domain="siman"))
    ),
    "no output": graph(lambda model: model.graph.ClearField("output")),
    "no graph": graph(lambda model: model.ClearField("graph")),
}


# Recipes

RECIPES: Mapping[str, Bytes] = {
    "laughs": lambda: LAUGHS.encode(),
    "merges": lambda: MERGES.encode(),
    "deep": lambda: DEEP[:60_000].encode(),
    "object": lambda: b"!!python/object/apply:os.system ['touch " + TRACE.encode() + b"']",
    "field with an object": lambda: b"epochs: !!python/object/apply:os.system ['touch " + TRACE.encode() + b"']",
    "number of 5,000 digits": lambda: b"epochs: 0x" + b"f" * 5000,
    "number of base 60": lambda: b"epochs: " + b"1:" * 20_000 + b"1",
    "epochs of 2**70": lambda: b"epochs: 0x400000000000000000",
    "nothing but NUL": lambda: b"\0" * 100,
    "latin-1": lambda: "# f\u00fcr\nepochs: 1".encode("latin-1"),
    "list": lambda: b"- epochs",
    "unknown field": lambda: b"epocs: 1",
    "field of 60,000 letters": lambda: b"x" * 60_000 + b": 1",
    "deep value": lambda: b"keep: " + b"[" * 200 + b"]" * 200,
    "two megabytes": lambda: b"#" * 2_000_000,
    "infinite": lambda: b"lr: .inf",
    "date": lambda: b"lr: 2020-99-99",
    "key that is a list": lambda: b"? [1]\n: 2",
    "tab": lambda: b"epochs:\n\t- 1",
}


# Run folders: each maker changes one that is right


def write_run(folder: Path) -> Path:
    for name, content in zip(RUN_FILES, seed("run/run").split(SEPARATOR), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "state" / "000001" / "evaluated.safetensors").write_bytes(b"weights")
    return folder


def entries(name: str, **fields: Any) -> Callable[[Path], object]:
    """Other entries in one of its JSON files."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def content(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _linked_state(folder: Path) -> None:
    (folder / "state").rename(folder.parent / "elsewhere")
    (folder / "state").symlink_to(folder.parent / "elsewhere")


def _as_pipe(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


STATE = "state/000001/progress.json"
RUNS: Mapping[str, Callable[[Path], object]] = {
    "run.json empty": content("run.json", b""),
    "run.json deep": content("run.json", DEEP.encode()),
    "run.json not UTF-8": content("run.json", b"\xff\xfe"),
    "run.json a list": content("run.json", b"[]"),
    "run.json of format 9": entries("run.json", format=9),
    "run.json of format text": entries("run.json", format="2"),
    "no classes": entries("run.json", classes=[]),
    "classes of numbers": entries("run.json", classes=[1, 2]),
    "model on the hub": entries("run.json", model="hf-hub:someone/something"),
    "model unknown": entries("run.json", model="resnet1818"),
    "preprocessing of nothing": entries("run.json", preprocess={}),
    "input of 2**40 pixels": entries("run.json", preprocess={"input_size": [3, 2**20, 2**20]}),
    "recipe that laughs": content("recipe.yaml", LAUGHS.encode()),
    "recipe with an object": content("recipe.yaml", RECIPES["object"]()),
    "recipe is a pipe": _as_pipe("recipe.yaml"),
    "plan deep": content("plan.json", DEEP.encode()),
    "plan of nothing": content("plan.json", b"{}"),
    "plan is a pipe": _as_pipe("plan.json"),
    "progress deep": content(STATE, DEEP.encode()),
    "progress of stage 7": entries(STATE, stage=7),
    "progress of epoch -1": entries(STATE, epoch=-1),
    "progress of a phase that is none": entries(STATE, phase="tango"),
    "history of numbers": entries(STATE, history=[1]),
    "published beside the run": entries(STATE, publish=["../../beside"]),
    "published at the root": entries(STATE, publish=["/tmp/beside"]),
    "state is a link": _linked_state,
    "state without weights": lambda folder: (folder / "state/000001/evaluated.safetensors").unlink(),
}


# Data


def _cifar(batch: bytes, meta: bytes | None = None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        right = seed("cifar/protocol2").split(SEPARATOR)
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            (folder / name).write_bytes(batch)
        (folder / "batches.meta").write_bytes(right[0] if meta is None else meta)

    return write


def _hash_bomb() -> bytes:
    """A dictionary whose key is a tuple of the same tuple twice, 60 times over."""
    return b"\x80\x02})" + b"".join(b"q%c" % n + b"h%c\x86" % n for n in range(60)) + b"K\x01s."


def _idx(images: bytes, labels: bytes, ending: str = "") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for part in ("train", "t10k"):
            (folder / f"{part}-images-idx3-ubyte{ending}").write_bytes(images)
            (folder / f"{part}-labels-idx1-ubyte{ending}").write_bytes(labels)

    return write


def _idx_header(*dims: int) -> bytes:
    return struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims)


def _shards(*names: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        split = {"name": "x", "num_samples": 2, "filenames": list(names), "shard_lengths": [2] * len(names)}
        (folder / "_info.json").write_text(json.dumps({"splits": {"train": split, "validation": split}}))
        (folder / "classes.txt").write_text("a\nb\n")

    return write


def _tar(data: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        for name in ("train.tar", "val.tar"):
            (folder / name).write_bytes(data)

    return write


def _tar_size(size: int) -> bytes:
    info = tarfile.TarInfo("cat/1.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + b"image" + bytes(507)


_IMAGES, _LABELS = idx_bytes(np.zeros((2, 4, 4))), idx_bytes(np.array([0, 1]))
DATA: Mapping[str, Callable[[Path], object]] = {
    "an empty folder": lambda _folder: None,
    "IDX of nothing": _idx(b"", b""),
    "IDX of floats": _idx(b"\0\0\x0d\x03" + bytes(12), _LABELS),
    "IDX of 2**96 pixels": _idx(_idx_header(*[2**32 - 1] * 3), _LABELS),
    "IDX of 2**96 pixels, gzip": _idx(gzip.compress(_idx_header(*[2**32 - 1] * 3)), gzip.compress(_LABELS), ".gz"),
    "IDX of 3 GB, gzip": _idx(
        gzip.compress(_idx_header(3, 2**15, 2**15) + bytes(4_000_000)), gzip.compress(_LABELS), ".gz"
    ),
    "IDX that goes on, gzip": _idx(gzip.compress(_IMAGES + b"more"), gzip.compress(_LABELS), ".gz"),
    "IDX cut off, gzip": _idx(gzip.compress(_IMAGES)[:-12], gzip.compress(_LABELS), ".gz"),
    "IDX of other labels": _idx(_IMAGES, idx_bytes(np.zeros(3))),
    "IDX without images": _idx(_idx_header(0, 4, 4), _idx_header(0)),
    "IDX of one class": _idx(_IMAGES, idx_bytes(np.zeros(2))),
    "CIFAR of nothing": _cifar(b""),
    "CIFAR that runs a command": _cifar(pickle.dumps(Executed())),
    "CIFAR names that run a command": _cifar(seed("cifar/protocol2").split(SEPARATOR)[1], pickle.dumps(Executed())),
    "CIFAR with a buffer of 2**60": _cifar(b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"."),
    "CIFAR with a text of 2**60": _cifar(b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"."),
    "CIFAR with keys that take for ever": _cifar(_hash_bomb()),
    "CIFAR with a state for a function": _cifar(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(N}X\x0c\x00\x00\x00__defaults__N\x86b."
    ),
    "CIFAR that encodes for ever": _cifar(
        b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<I", 10_000) + b"x" * 10_000 + b"q\x01"
        + b"h\x00h\x01\x85R" * 20_000 + b"."
    ),
    "CIFAR with a set": _cifar(b"\x80\x04\x8f."),
    "CIFAR of another shape": _cifar(pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}, 2)),
    "CIFAR of labels that are texts": _cifar(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["0"]}, 2)),
    "CIFAR of label -1": _cifar(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, 2)),
    "tar of nothing": _tar(b""),
    "tar of garbage": _tar(b"\xff" * 2048),
    "tar cut off": _tar(seed("tar/gnu")[:700]),
    "tar with an image of 2**60 bytes": _tar(_tar_size(2**60)),
    "tar without images": _tar(tarfile.TarInfo("cat/").tobuf() + bytes(1024)),
    "image folder of text": lambda folder: [
        ((folder / split / name).mkdir(parents=True), (folder / split / name / "1.png").write_text("no image"))
        for split in ("train", "val") for name in ("a", "b")
    ],
}  # fmt: skip
SHARDS: Mapping[str, Callable[[Path], object]] = {
    "shards elsewhere": _shards("../../outside.tar"),
    "shards at the root": _shards("/tmp/outside.tar"),
    "shards that run a command": _shards(f"a.tar::pipe:touch {TRACE}"),
    "shards that are a command": _shards(f"pipe:touch {TRACE}"),
}
WEIGHTS: Mapping[str, Bytes] = {
    "empty": lambda: b"",
    "garbage": lambda: b"\xff" * 1000,
    "pickle that runs a command": lambda: pickle.dumps({"state_dict": Executed()}),
    "half a safetensors file": lambda: seed("packed/float")[:1000],
}
