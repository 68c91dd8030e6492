"""export: which files appear where, that they hold what they should, and that a failure leaves nothing behind."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import safetensors.torch
import torch
from exported_run import Life, copied, digits_of_several_sizes, graphs_once, life, printed, real_exporter, tamper  # noqa: F401  fixtures
from onnx import numpy_helper
from packed_models import one_thread  # noqa: F401  a fixture
from PIL import Image
from torch import nn

from siman_convert import InputError, MismatchError, SimanError, evaluate, export, exporting, load, onnx_export
from siman_convert.cli import run as siman
from siman_convert.description import as_half, description_of
from siman_convert.exporting import Exported
from siman_convert.frozen import halved_names
from siman_convert.onnx_file import Variant, read_onnx
from siman_convert.onnx_int8_plan import Quantization, read_quantization
from siman_convert.onnx_op import OP_NAME
from siman_convert.onnx_quantized_op import QUANTIZED_OP
from siman_convert.verification import Verification
from siman_convert.watch import Watcher


class Notes(Watcher):
    """Keeps what is worth knowing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder, which has no bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def verified_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of where files go."""
    monkeypatch.setattr(exporting, "verify_file", lambda *_: Verification([], [], None, []))


@pytest.fixture(scope="module")
def half(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """--half --format all."""
    return export(life.run.folder, format="all", half=True, output=tmp_path_factory.mktemp("half"), images=16)


@pytest.fixture(scope="module")
def int8(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(life.run.folder, int8=True, output=tmp_path_factory.mktemp("int8") / "small.onnx")


@pytest.fixture(scope="module")
def with_preprocess(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(life.run.folder, with_preprocess=True, output=tmp_path_factory.mktemp("pre"), images=16)


# Where files go


@pytest.mark.usefixtures("verified_at_once")
@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("run", {}, ["run/model.onnx"]),
        ("run", {"format": "safetensors"}, ["run/model.safetensors"]),
        ("run", {"format": "all"}, ["run/model.safetensors", "run/model.onnx"]),
        ("run", {"output": "a/b.c"}, ["a/b.c/model.onnx"]),
        ("run", {"output": "x.onnx"}, ["x.onnx"]),
        ("run", {"output": "a/b/x.safetensors", "format": "safetensors"}, ["a/b/x.safetensors"]),
        ("run", {"output": ".", "format": "all"}, ["model.safetensors", "model.onnx"]),
        ("file", {}, ["there/model.onnx"]),
        ("file", {"output": "here"}, ["here/model.onnx"]),
        ("file", {"output": "here.onnx"}, ["here.onnx"]),
        ("module", {}, ["model.onnx"]),
    ],
)
def test_files_go_where_they_are_wanted(
    copied: Life,
    source: str,
    options: dict[str, str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    (work / "there").mkdir(parents=True)
    shutil.copytree(copied.run.folder, work / "run")
    shutil.copy(copied.safetensors, work / "there" / "a.safetensors")
    for path in (*(work / "run").glob("model.*"), work / "run" / "README.md"):
        path.unlink()
    monkeypatch.chdir(work)
    what = {"run": "run", "file": "there/a.safetensors", "module": load("there/a.safetensors")}[source]
    before = tree(work)
    exported = export(what, **options)  # type: ignore[arg-type]
    files, card = exported.files, str(Path(expected[0]).with_name("README.md"))
    assert [str(path) for path in files] == expected
    assert str(exported.card) == card
    after = tree(work)
    assert {name for name in after.keys() - before.keys() if (work / name).is_file()} == {*expected, card}
    assert before.items() <= after.items()
    for path in files:
        data = copied.onnx if path.suffix == ".onnx" else copied.safetensors
        assert path.read_bytes() == data.read_bytes()


@pytest.mark.usefixtures("verified_at_once")
def test_the_newest_run_is_taken_where_none_is_named(copied: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    copied.onnx.unlink()
    monkeypatch.chdir(copied.folder)
    assert [path.resolve() for path in export().files] == [copied.onnx.resolve()]


@pytest.mark.usefixtures("verified_at_once")
def test_best_and_last(copied: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that were asked for, and what training measured for those."""
    last = safetensors.torch.load_file(copied.run.weights("last"))
    last["fc.bias"] += 1
    safetensors.torch.save_file(last, copied.run.weights("last"))
    metrics = copied.run.folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    record = json.loads(lines[-1]) | {"top1": 1.5}  # of the last epoch, not of the best
    metrics.write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    shutil.rmtree(copied.run.folder / "state")  # which knows that the record is another's
    graph = exporting.build_onnx(load(copied.safetensors))
    monkeypatch.setattr(exporting, "build_onnx", lambda _: graph)  # of the packed file nothing goes through it
    for which in ("best", "last"):
        found = export(copied.run.folder, format="safetensors", which=which)  # type: ignore[arg-type]
        assert found.description.weights == which
        assert found.description.accuracy is not None
        assert (found.description.accuracy.top1 == 1.5) == (which == "last")
        bias = safetensors.torch.load_file(copied.run.weights(which))["fc.bias"]
        assert torch.equal(load(copied.safetensors).state_dict()["fc.bias"], bias)


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "--format 'tflite': expected one of onnx, safetensors, all"),
        ({"half": True, "int8": True}, "--half and --int8 are two ways"),
        ({"int8": True, "format": "safetensors"}, "--int8 changes the ONNX graph"),
        ({"int8": True, "format": "all"}, "--int8 changes the ONNX graph"),
        ({"with_preprocess": True, "format": "safetensors"}, "--with-preprocess changes the ONNX graph"),
        ({"output": "x.safetensors"}, "does not fit --format onnx: add --format safetensors"),
        ({"output": "x.onnx", "format": "safetensors"}, "does not fit --format safetensors: add --format onnx"),
        ({"output": "x.onnx", "format": "all"}, "does not fit --format all: leave the suffix out"),
        ({"output": "a.txt"}, "a.txt is a file; expected a folder"),
        ({"output": "a.txt/x.onnx"}, "a.txt is a file; expected a folder"),
        ({"output": "taken"}, "model.onnx is a folder, a file is to be written there"),
        ({"data": "nowhere"}, "no such path: nowhere"),
        ({"data": "other"}, "its 2 classes are not the 10"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    life: Life,
    options: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    Path("taken/model.onnx").mkdir(parents=True)
    images_of_two_classes(Path("other"))
    monkeypatch.setattr(exporting, "build_onnx", pytest.fail)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        export(life.run.folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_an_onnx_file_is_not_exported_again(life: Life) -> None:
    with pytest.raises(InputError, match="is an ONNX file already; export a run or a .safetensors file"):
        export(life.onnx)


def test_a_module_that_is_not_packed_is_refused() -> None:
    with pytest.raises(InputError, match="Linear is not a packed model of siman; siman_convert.load gives one"):
        export(nn.Linear(2, 2))


@pytest.mark.usefixtures("verified_at_once")
def test_a_module_given_to_export_stays_as_it_is(life: Life, tmp_path: Path) -> None:
    model = load(life.safetensors)
    export(model, half=True, output=tmp_path)
    assert description_of(model).half is False
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load(life.safetensors).parameters(), strict=True))


def images_of_two_classes(folder: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (8, 8), number).save(folder / split / name / f"{number}.png")


# Failures leave nothing behind


@contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """As on a disk with no room: writing beyond `size` bytes fails."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@contextmanager
def wrong_verification(patch: pytest.MonkeyPatch) -> Iterator[None]:
    wrong = Verification([], [], None, ["layer7: differs", "layer8: too"])
    patch.setattr(exporting, "verify_file", lambda *_: wrong)
    yield


@contextmanager
def failing_exporter(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported operator\nand more lines")

    patch.setattr(torch.onnx, "export", fail)
    patch.setattr(exporting, "build_onnx", onnx_export.build_onnx)
    yield


@contextmanager
def full_disk(_patch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_files_only(100_000):
        yield


@contextmanager
def disk_that_fails_at_the_second_file(patch: pytest.MonkeyPatch) -> Iterator[None]:
    write = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        if b"siman.sha256" in data:
            write(path, data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    patch.setattr(Path, "write_bytes", fail)
    yield


@contextmanager
def file_that_reads_back_wrong(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def wrong(path: Path) -> nn.Module:
        model = load(path)
        model.state_dict()["conv1.6.scale"][0] += 1
        return model

    patch.setattr(exporting, "load", wrong)
    yield


@contextmanager
def file_that_cannot_be_read_back(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def wrong(path: Path) -> nn.Module:
        raise InputError(f"{path}: damaged")

    patch.setattr(exporting, "load", wrong)
    yield


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            wrong_verification,
            MismatchError,
            r"the exported file is wrong, nothing was written: layer7: differs \(1 more\)",
        ),
        (failing_exporter, SimanError, "test_resnet: torch's ONNX exporter failed: unsupported operator$"),
        (full_disk, SimanError, r"model.safetensors: file too large; nothing that was written before is lost"),
        (disk_that_fails_at_the_second_file, SimanError, "model.onnx: no space left on device"),
        (
            file_that_reads_back_wrong,
            MismatchError,
            "the packed file is wrong, nothing was written: conv1.6.scale: not",
        ),
        (file_that_cannot_be_read_back, InputError, r"new/deep/model.safetensors: damaged"),
    ],
)
@pytest.mark.parametrize("where", ["new/deep", "old"])
@pytest.mark.usefixtures("verified_at_once")
def test_a_failure_leaves_everything_as_it_was(
    life: Life,
    failure: Callable[[pytest.MonkeyPatch], Iterator[None]],
    kind: type[SimanError],
    message: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.onnx").write_bytes(b"an older export")
    (tmp_path / "old" / "model.safetensors").write_bytes(b"and another")
    before = tree(tmp_path)
    with pytest.raises(SimanError, match=message.replace("new/deep", where)) as caught, failure(monkeypatch):
        export(life.run.folder, format="all", output=tmp_path / where)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert ".tmp-" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_file_that_is_wrong_exits_with_3(
    copied: Life, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real verification, of a graph that really is wrong."""
    build = exporting.build_onnx

    def wrong(model: nn.Module) -> object:
        graph, folding = build(model)
        (bits,) = (t for t in graph.graph.initializer if t.name == "layer3.0.conv2.weight_bits")
        values = numpy_helper.to_array(bits).copy()
        values[0, 0, 0, 0] ^= 1
        bits.CopyFrom(numpy_helper.from_array(values, bits.name))
        return graph, folding

    monkeypatch.setattr(exporting, "build_onnx", wrong)
    before = tree(copied.folder)
    assert siman(["export", str(copied.run.folder), "--images", "4"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "siman: the exported file is wrong, nothing was written: layer3.0.conv2: its bits in the file"
    )
    assert tree(copied.folder) == before


def test_ctrl_c_leaves_everything_as_it_was(life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_require_same", interrupt)
    monkeypatch.setattr(exporting, "verify_file", lambda *_: Verification([], [], None, []))
    with pytest.raises(KeyboardInterrupt):
        export(life.run.folder, format="all", output=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# What is in the files


@pytest.mark.usefixtures("real_exporter", "verified_at_once")
def test_run_to_safetensors_to_module_to_onnx_gives_the_same_bytes(life: Life, tmp_path: Path) -> None:
    export(load(life.safetensors), output=tmp_path / "module.onnx")
    assert (tmp_path / "module.onnx").read_bytes() == life.onnx.read_bytes()


@pytest.mark.usefixtures("real_exporter", "verified_at_once")
def test_the_same_round_trip_with_half(half: Exported, tmp_path: Path) -> None:
    packed, graph = half.files
    export(packed, output=tmp_path / "file.onnx")
    assert (tmp_path / "file.onnx").read_bytes() == graph.read_bytes()


@pytest.mark.usefixtures("verified_at_once")
def test_half_of_a_half_file_is_the_same_file(half: Exported, tmp_path: Path) -> None:
    packed, _ = half.files
    export(packed, output=tmp_path / "module.safetensors", format="safetensors", half=True)
    assert (tmp_path / "module.safetensors").read_bytes() == packed.read_bytes()


def test_half_rounds_the_weights_and_nothing_else(life: Life, half: Exported) -> None:
    packed, graph = half.files
    plain, rounded = load(life.safetensors), load(packed)
    assert description_of(rounded) == as_half(description_of(plain)) == half.description
    halved = halved_names(plain)
    before = plain.state_dict()
    differing = 0
    for name, tensor in rounded.state_dict().items():
        assert tensor.dtype == before[name].dtype
        expected = before[name].half().float() if name in halved else before[name]
        assert torch.equal(tensor, expected), name
        differing += not torch.equal(tensor, before[name])
    assert 0 < differing <= len(halved)
    assert packed.stat().st_size < life.safetensors.stat().st_size - 2 * sum(before[n].numel() for n in halved) + 2000
    stored = {t.name: t.data_type for t in read_onnx(graph).model.graph.initializer}
    assert {name for name, kind in stored.items() if kind == 10} == halved  # float16
    assert half.change is not None
    assert half.change.images == 16


def test_sizes_are_those_of_the_tensors(life: Life, tmp_path: Path) -> None:
    exported = export(life.run.folder, format="safetensors", output=tmp_path, images=4)
    tensors = safetensors.torch.load_file(exported.files[0])
    assert exported.costs.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    before = safetensors.torch.load_file(life.run.weights("full-precision"))
    assert exported.costs.bytes_before == sum(tensor.nbytes for tensor in before.values())


def test_int8_says_what_it_costs(life: Life, int8: Exported, digits: Path) -> None:
    assert (int8.variant, int8.description.half) == (Variant(int8=True), False)
    plain, quantized = (evaluate(path, data=str(digits)) for path in (life.onnx, int8.files[0]))
    change = int8.change
    assert change is not None
    assert (change.before, change.after, change.images) == (plain.top1, quantized.top1, 97)
    assert quantized.loss != plain.loss
    assert int8.files[0].stat().st_size < 0.75 * life.onnx.stat().st_size
    assert int8.verification.failures == []
    assert int8.verification.models[1].without_flip < 97  # int8 is not a rounding error: that is not judged


def test_int8_says_what_it_quantized(life: Life, int8: Exported, half: Exported) -> None:
    """And the file has it; every operator was compared."""
    graph, model = read_onnx(int8.files[0]).model.graph, read_onnx(life.onnx).model
    plain = model.graph
    convolutions = [node.name for node in plain.node if node.op_type == "Conv"]
    stored = {tensor.name: tensor for tensor in plain.initializer}
    weights = [stored[node.input[1]].dims for node in plain.node if node.op_type in ("Conv", "Gemm")]
    assert half.quantization is None
    assert int8.quantization == read_quantization(graph)
    assert int8.quantization == Quantization(
        tuple(convolutions), ("conv1.0",), (), {}, ("fc",), sum(prod(dims) for dims in weights)
    )
    kinds = {check.layer: check.operator for check in int8.verification.operators}
    assert [name for name, kind in kinds.items() if kind == QUANTIZED_OP] == convolutions
    binary = [node.name for node in onnx_export.binary_nodes(model)]
    assert [name for name, kind in kinds.items() if kind == OP_NAME] == binary


def test_int8_needs_images(life: Life, tmp_path: Path) -> None:
    shutil.copy(life.safetensors, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="int8 is calibrated on training images; name some with --data"):
        export(tmp_path / "model.safetensors", int8=True)
    assert tree(tmp_path) == before


def test_preprocessing_in_the_graph_takes_images_of_any_size(
    life: Life, with_preprocess: Exported, tmp_path: Path
) -> None:
    """The digits as PNG files of several sizes: decoded, resized and normalised in the graph as evaluation does."""
    folder = digits_of_several_sizes(tmp_path / "images")
    (path,) = with_preprocess.files
    assert read_onnx(path).variant == Variant(takes_images=True)
    in_graph = evaluate(path, data=str(folder))
    outside = evaluate(life.onnx, data=str(folder))
    in_torch = evaluate(life.run, data=str(folder), device="cpu")
    assert in_graph.images == outside.images == 60
    assert in_graph.top1 == outside.top1 == in_torch.top1
    assert in_graph.top1 > 50  # a network that knows something
    assert in_graph.loss == pytest.approx(outside.loss, rel=0.02)
    assert with_preprocess.verification.pixels is not None


def test_data_that_has_vanished(copied: Life, digits: Path, tmp_path: Path) -> None:
    """The file is verified on other images, and a note says so; nothing is measured on them."""
    info = copied.run.folder / "run.json"
    info.write_text(info.read_text().replace(str(digits), str(tmp_path / "gone")))
    notes = Notes()
    exported = export(copied.run.folder, half=True, output=tmp_path / "out", images=4, watcher=notes)
    (note,) = notes.notes
    assert str(tmp_path / "gone") in note
    assert note.endswith("verifying on scikit-learn's digits instead")
    assert exported.change is None
    assert exported.verification.models[1].images == 4
    with pytest.raises(InputError, match="int8 is calibrated on training images; name some with --data"):
        export(copied.run.folder, int8=True, output=tmp_path / "out")


def test_a_damaged_graph_does_not_pass_as_another_export(life: Life, tmp_path: Path) -> None:
    """`tamper` itself: sealed again, a changed file is one that siman could have written."""
    path = tamper(life.onnx, lambda model: model.graph.node[0].ClearField("name"), tmp_path / "x.onnx")
    assert read_onnx(path).description == read_onnx(life.onnx).description
    assert printed("eval", str(path), "--data", "digits")
