"""A run trained until it means something, exported as users do; and ways to change what was exported.

torch's exporter takes seconds: for the modules that import `graphs_once` it runs once for equal weights. What is tested about
the exporter itself asks for `real_exporter`.
"""

import contextlib
import functools
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from siman_convert import backends, exporting, onnx_export
from siman_convert.cli import run as siman
from siman_convert.description import description_of
from siman_convert.onnx_file import read_onnx, seal
from siman_convert.onnx_fold import Folding
from siman_convert.onnx_op import INPUTS
from siman_convert.runs import Run

TRAINING = [
    "--fp-epochs", "3", "--epochs", "3", "--opt", "adamw", "--lr", "0.01", "--fp-lr", "0.01", "--set", "no_aug=true", "-b", "32",
    "--distill-weight", "0", "--label-weight", "1",
    "--set", "calibration_images=64", "--device", "cpu",
]  # fmt: skip
BINARY = (
    "conv1.3", "conv1.6", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1",
    "layer3.0.conv2", "layer3.0.conv3", "layer4.0.conv1", "layer4.0.conv2",
)  # fmt: skip

_graphs: dict[str, tuple[bytes, Folding]] = {}


@dataclass(frozen=True)
class Life:
    """Three lines, typed in `folder`: convert, export --format all, eval. `exported`, `evaluated`: what two of them printed."""

    folder: Path
    run: Run
    exported: str
    evaluated: str

    @property
    def onnx(self) -> Path:
        return self.run.folder / "model.onnx"

    @property
    def safetensors(self) -> Path:
        return self.run.folder / "model.safetensors"


@functools.cache
def live(data: Path, folder: Path) -> Life:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed("convert", "test_resnet", "--data", str(data), "--weights", "none", *TRAINING)
        exported = printed("export", "--format", "all")
        evaluated = printed("eval", "--device", "cpu")
    (found,) = (folder / "runs").glob("*/run.json")
    return Life(folder, Run(found.parent), exported, evaluated)


@pytest.fixture(scope="module")
def life(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Of the one trained run; nobody changes its folder. What is autouse comes first."""
    folder = tmp_path_factory.getbasetemp() / "life"
    folder.mkdir(exist_ok=True)
    return live(digits, folder)


@pytest.fixture
def copied(life: Life, tmp_path: Path) -> Life:
    """The same, in a folder of the test's own."""
    shutil.copytree(life.folder, tmp_path / "life")
    return Life(tmp_path / "life", Run(tmp_path / "life" / "runs" / life.run.name), life.exported, life.evaluated)


@pytest.fixture(scope="module", autouse=True)
def graphs_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (exporting, backends):
            patch.setattr(module, "build_onnx", _build_once)
        yield


@pytest.fixture
def real_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exporting, backends):
        monkeypatch.setattr(module, "build_onnx", onnx_export.build_onnx)


def _build_once(model: nn.Module) -> tuple[onnx.ModelProto, Folding]:
    digest = hashlib.sha256(str(description_of(model)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    if digest.hexdigest() not in _graphs:
        built, folding = onnx_export.build_onnx(model)
        _graphs[digest.hexdigest()] = built.SerializeToString(), folding
    data, folding = _graphs[digest.hexdigest()]
    return onnx.ModelProto.FromString(data), folding


def printed(*arguments: str) -> str:
    """What a command that succeeds prints on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert siman(list(arguments)) == 0
    return out.getvalue()


def digits_of_several_sizes(folder: Path, count: int = 60) -> Path:
    """An image folder of so many validation digits, PNG files of 8x8 to 70x50 pixels."""
    digits = load_digits()
    for split, numbers in (("train", range(40)), ("val", range(320, 320 + count))):
        for name in range(10):
            (folder / split / str(name)).mkdir(parents=True)
        for number in numbers:
            image = Image.fromarray((digits.images[number] * 15.9).astype(np.uint8))
            size = [(8, 8), (16, 16), (50, 70), (33, 32)][number % 4]
            target = folder / split / str(digits.target[number]) / f"{number}.png"
            image.resize(size, Image.Resampling.BILINEAR).save(target)
    return folder


def tamper(path: Path, change: Callable[[onnx.ModelProto], None], target: Path | None = None) -> Path:
    """Change an exported graph and seal it again, as its exporter would have."""
    file = read_onnx(path)
    before = file.model.SerializeToString()
    change(file.model)
    assert file.model.SerializeToString() != before
    target = target or path
    target.write_bytes(seal(file.model, file.description, file.variant))
    return target


def edit(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """Change an initializer in place."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def operand(model: onnx.ModelProto, layer: str, which: str) -> str:
    """The name of a binary convolution's input."""
    (node,) = (node for node in model.graph.node if node.name == layer)
    return str(node.input[INPUTS.index(which)])


def replace_in_function(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """Other text for the operator's function body."""

    def change(model: onnx.ModelProto) -> None:
        text = onnx.printer.to_text(model.functions[0])
        assert text.count(old) == 1, text
        model.functions[0].CopyFrom(onnx.parser.parse_function(text.replace(old, new)))

    return change
