"""What is fuzzed: for each reader a function of any bytes. InputError is an answer; every other exception is a finding.

Files with digests are read as they are, and once more with the digests that a forger would compute. A folder or a set of
files is one string of bytes, cut at SEPARATOR.
"""

import contextlib
import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from timm.models import register_model
from torch import Tensor, nn

from siman_convert.data import Preprocess, cifar, idx, open_source, tar
from siman_convert.errors import InputError
from siman_convert.metadata import seal
from siman_convert.onnx_export import operator_nodes
from siman_convert.onnx_file import DIGEST
from siman_convert.onnx_int8_plan import read_quantization
from siman_convert.packed import _arrays, load, read_description, tensors_digest
from siman_convert.recipe import build_recipe, parse_assignments, parse_recipe
from siman_convert.runs import EVALUATED, Run
from siman_convert.runtime import reference
from siman_convert.subjects import _accuracy, open_file
from siman_convert.verification import tapped_graph

SEPARATOR = b"\n=====\n"
RUN_FILES = ("run.json", "recipe.yaml", "plan.json", "metrics.jsonl", "state/000001/progress.json")
IDX_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
CIFAR_FILES = ("batches.meta", *(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
SIDE = 8

_kept = tempfile.TemporaryDirectory(prefix="siman-fuzz-")
SCRATCH = Path(_kept.name)


class Tiny(nn.Module):
    """Of a file that holds few bytes: a stem, a binary convolution with its BatchNorm, a classifier."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "first_conv": "stem", "classifier": "fc"}
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.stem(x))).relu()
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


@register_model
def siman_fuzz(pretrained: bool = False, num_classes: int = 2, **_: object) -> nn.Module:
    """Known to timm in this process, so that a file may name it."""
    assert not pretrained
    return Tiny(num_classes)


def fuzz_packed(data: bytes) -> None:
    for content in dict.fromkeys((data, forge_packed(data))):
        path = _file("model.safetensors", content)
        with contextlib.suppress(InputError):
            read_description(path)
        with contextlib.suppress(InputError):
            load(path)


def forge_packed(data: bytes) -> bytes:
    """The same with right digests, where it is a safetensors file with metadata that are JSON."""
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        values = json.loads(header["__metadata__"]["siman"])
        values.pop("sha256", None)
        header["__metadata__"]["siman"] = seal(values, tensors_digest(_arrays(data)))
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        return data
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def fuzz_onnx(data: bytes) -> None:
    for content in dict.fromkeys((data, forge_onnx(data))):
        with contextlib.suppress(InputError):
            file = open_file(_file("model.onnx", content)).onnx
            assert file is not None
            read_quantization(file.model.graph)
            operator_nodes(file.model)
            tapped_graph(file.model)
            reference.evaluator(file.model)


def forge_onnx(data: bytes) -> bytes:
    key = DIGEST.encode()
    at = data.find(key) + len(key) + 2  # protobuf: a field's number and its length
    if data.count(key) != 1 or at + 64 > len(data):
        return data
    zeroed = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(zeroed).hexdigest().encode() + data[at + 64 :]


def fuzz_recipe(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(InputError):
        recipe = build_recipe(parse_recipe(text, "fuzz"), "fuzz")
        assert build_recipe(parse_recipe(recipe.to_yaml(), "its own"), "its own") == recipe
        recipe.digest()
    with contextlib.suppress(InputError):
        build_recipe(parse_assignments(text.splitlines()), "fuzz")


def fuzz_run(data: bytes) -> None:
    """A run folder, and that publishing from its state changes nothing beside it."""
    parent = SCRATCH / "parent"
    folder = _folder(parent / "run", RUN_FILES, data)
    (folder / "state/000001" / EVALUATED).write_bytes(b"weights")
    run = Run(folder)
    readers: tuple[Callable[[], object], ...] = (
        lambda: Preprocess.from_dict(run.info().preprocess),
        run.plan,
        lambda: _accuracy(run, run.metrics(), "best"),
        lambda: run.progress().finished(run.recipe()),
        lambda: [run.progress().top1("binary"), run.progress().re_estimated],
        run.publish,
    )
    for read in readers:
        with contextlib.suppress(InputError):
            read()
    assert [path.name for path in parent.iterdir()] == ["run"]


def fuzz_idx(data: bytes) -> None:
    with contextlib.suppress(InputError):
        idx.read_array(_file("one", data), dimensions=1 + data[:1].count(3) * 2)
    with contextlib.suppress(InputError):
        open_source(str(_folder(SCRATCH / "idx", IDX_FILES, data)))


def fuzz_cifar(data: bytes) -> None:
    with contextlib.suppress(InputError):
        cifar.load(_file("one", data))
    with contextlib.suppress(InputError):
        open_source(str(_folder(SCRATCH / "cifar", CIFAR_FILES, data)))


def fuzz_tar(data: bytes) -> None:
    with contextlib.suppress(InputError):
        tar.scan(_file("train.tar", data), "train")


READERS: Mapping[str, Callable[[bytes], None]] = {
    "packed": fuzz_packed,
    "onnx": fuzz_onnx,
    "recipe": fuzz_recipe,
    "run": fuzz_run,
    "idx": fuzz_idx,
    "cifar": fuzz_cifar,
    "tar": fuzz_tar,
}


def _file(name: str, content: bytes) -> Path:
    path = SCRATCH / name
    path.write_bytes(content)
    return path


def _folder(folder: Path, names: tuple[str, ...], data: bytes) -> Path:
    """The parts of `data` as files of these names; the last part is that of all names that are left."""
    parts = data.split(SEPARATOR)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parts[min(number, len(parts) - 1)])
    return folder
