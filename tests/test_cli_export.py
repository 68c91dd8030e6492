"""siman export, eval, predict and verify as a user types them: what is printed, what bad input gets, and that it is true."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
from exported_run import BINARY, Life, copied, digits_of_several_sizes, graphs_once, life, printed  # noqa: F401  fixtures
from onnx import helper
from packed_models import one_thread  # noqa: F401  a fixture
from PIL import Image
from sklearn.datasets import load_digits

from siman_convert import evaluate
from siman_convert.backends import BACKENDS
from siman_convert.cli import run as siman
from siman_convert.cli.int8_text import quantization_lines
from siman_convert.data import Preprocess, eval_transform, pixel_transform
from siman_convert.onnx_file import read_onnx, seal
from siman_convert.onnx_int8_plan import Quantization
from siman_convert.runtime import native

NO_SIMAN = "import sys; sys.modules['siman_convert'] = sys.modules['torch'] = None\n"  # importing either fails


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation digits as grey PNG files of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits().images[320:324] * 15.9
    for number, (pixels, side) in enumerate(zip(digits, (8, 32, 50, 31), strict=True)):
        Image.fromarray(pixels.astype(np.uint8)).resize((side, side)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def far(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported files in a folder of their own, as on another machine."""
    folder = tmp_path_factory.mktemp("far")
    for path in (life.onnx, life.safetensors):
        shutil.copy(path, folder)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert siman(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("siman: ")
    assert captured.out == "" or code == 3
    return lines[0]


# Three lines


def test_three_lines_without_naming_anything(life: Life) -> None:
    name = f"runs/{life.run.name}"
    assert f"wrote     {name}/model.onnx" in life.exported
    assert f"wrote     {name}/model.safetensors" in life.exported
    assert life.evaluated.startswith(f"{name}, best weights, 97 images:\n")
    best = max(record["top1"] for record in life.run.metrics() if record["phase"] == "binary")
    assert best > 60  # chance is 10
    assert f"top-1 {best:.2f} %" in life.evaluated
    assert f"accuracy  top-1 {best:.2f} % of 97 images of" in life.exported


def test_export_says_what_it_did(life: Life) -> None:
    lines = life.exported.splitlines()
    assert "folded    4 Add, 11 BatchNormalization, 11 Relu into 11 binary convolutions" in lines
    verified = [line for line in lines if line.startswith("verified  ")]
    assert verified[0].startswith("verified  11 of 11 operators equal in torch, onnxruntime,")
    assert "reference and onnxruntime: top-1 agrees on 4 of 4 images (100.00 %)" in verified[1]
    assert "torch and onnxruntime: top-1 agrees on " in verified[2]
    assert len(verified) == 3
    for path in (life.onnx, life.safetensors):
        assert any(line.endswith(f"{path.name}  {path.stat().st_size / 1e6:.2f} MB") for line in lines)
    assert all(f"\n{host} " in life.exported for host in ("C++", "C#", "JavaScript"))


def test_sizes_reconcile_byte_for_byte(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """What export prints, what inspect says, and what lies in the file."""
    (line,) = re.findall(r"weights   ([\d,]+) -> ([\d,]+) bytes", life.exported)
    before, after = (int(text.replace(",", "")) for text in line)
    assert siman(["inspect", str(life.run.folder), "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    totals = [(layer["bytes_before"], layer["bytes_after"]) for layer in inspected["layers"]]
    assert (before, after) == tuple(map(sum, zip(*totals, strict=True)))
    tensors = safetensors.torch.load_file(life.safetensors)
    assert after == sum(tensor.nbytes for tensor in tensors.values())
    by_layer = {layer["name"]: layer["bytes_after"] for layer in inspected["layers"]}
    for name in BINARY:
        assert by_layer[name] == tensors[f"{name}.weight_bits"].nbytes + tensors[f"{name}.scale"].nbytes


def test_export_json_is_one_document(copied: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["export", str(copied.run.folder), "--json", "--images", "8", "--output", str(tmp_path / "x")]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)  # NaN is not JSON
    (file,) = document["files"]
    assert (document["schema_version"], file["path"]) == (1, str(tmp_path / "x" / "model.onnx"))
    assert file["bytes"] == Path(file["path"]).stat().st_size
    assert document["verification"]["passed"] is True
    assert [check["layer"] for check in document["verification"]["operators"]] == list(BINARY)
    assert (document["half"], document["int8"], document["takes_images"]) == (False, False, False)
    assert document["folding"]["operators"] == 11
    assert document["accuracy"]["images"] == 97
    assert document["accuracy_change"] is None
    assert document["quantization"] is None
    assert "verifying on 8 images of" in captured.err


@pytest.mark.parametrize(("flag", "name"), [("--int8", "int8"), ("--half", "float16")])
def test_the_change_of_accuracy_is_printed(life: Life, flag: str, name: str, tmp_path: Path) -> None:
    out = printed("export", str(life.run.folder), flag, "--output", str(tmp_path), "--images", "97")
    (before, after) = re.findall(rf"^{name:<9} top-1 ([\d.]+) % -> ([\d.]+) % on 97 images$", out, re.MULTILINE)[0]
    assert f"top-1 {before} %" in life.evaluated
    assert f"{evaluate(tmp_path / 'model.onnx', data=life.run.info().data).top1:.2f}" == after


def test_what_is_in_8_bits_is_printed(life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By export, and by inspect of what it wrote."""
    arguments = ["export", str(life.run.folder), "--int8", "--images", "4", "--output", str(tmp_path)]
    assert siman([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    convolutions = ["conv1.0", *(f"layer{n}.0.downsample.1" for n in (2, 3, 4))]
    weights = document["quantization"]["weights"]
    assert document["quantization"] == {
        "convolutions": convolutions,
        "relus": ["conv1.0"],
        "pools": [],
        "weights_only": {},
        "classifiers": ["fc"],
        "weights": weights,
    }
    line = f"int8      4 8-bit convolutions, 1 Relu folded in; 1 8-bit classifier: {weights:,} weights of 1 byte, before 4\n"
    assert line in printed(*arguments)
    path = str(tmp_path / "model.onnx")
    assert line in printed("inspect", path)
    assert json.loads(printed("inspect", path, "--json"))["int8"] == document["quantization"]
    for plain in (life.onnx, life.safetensors):
        assert json.loads(printed("inspect", str(plain), "--json"))["int8"] is None
        assert "8-bit" not in printed("inspect", str(plain))


def test_convolutions_that_compute_in_float_all_the_same_are_named() -> None:
    found = Quantization((), (), (), {"a": "2 groups", "b": "dilation"}, ("fc", "fd"), 1234)
    assert list(quantization_lines(found)) == [
        "int8      2 8-bit classifiers; 8-bit weights alone of 2 convolutions: 1,234 weights of 1 byte, before 4",
        "int8      a computes in float32: 2 groups",
        "int8      b computes in float32: dilation",
    ]


# eval


def test_run_and_files_give_what_training_reported(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """The files lie beside the run: they need no --data."""
    expected = evaluate(life.run, device="cpu")
    for what, flags in (
        (life.onnx, []),
        (life.safetensors, []),
        (life.run.folder, ["--backend", "onnxruntime"]),
        (life.onnx, ["--backend", "onnxruntime", "-b", "7"]),
    ):
        assert siman(["eval", str(what), *flags, "--json", "--device", "cpu"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["top1"], document["top5"], document["images"]) == (expected.top1, expected.top5, 97)
        assert document["loss"] == pytest.approx(expected.loss, rel=1e-4)
        assert document["schema_version"] == 1


def test_backends_agree(life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 30 images: the reference takes its time."""
    digits_of_several_sizes(tmp_path, 30)
    found = {}
    for backend in BACKENDS:
        what = life.safetensors if backend == "torch" else life.onnx
        assert siman(["eval", str(what), "--backend", backend, "--data", str(tmp_path), "--json"]) == 0
        found[backend] = json.loads(capsys.readouterr().out)
    assert len({one["loss"] for one in found.values()}) > 1  # they are not one and the same
    for one in found.values():
        assert (one["images"], one["top1"], one["top5"]) == (30, found["torch"]["top1"], found["torch"]["top5"])
        assert one["loss"] == pytest.approx(found["torch"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_eval_far_from_the_run(
    life: Life, far: Path, digits: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(far / name)
    assert refused(["eval", file], capsys) == f"siman: {file} does not say where images are; name some with --data"
    top1 = re.findall(r"top-1 [\d.]+ %", life.evaluated)
    assert re.findall(r"top-1 [\d.]+ %", printed("eval", file, "--data", str(digits))) == top1
    assert re.findall(r"top-1 [\d.]+ %", printed("eval", file, "--data", str(digits), "-b", "5", "-j", "1")) == top1


def test_what_eval_refuses(life: Life, far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "other" / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "other" / split / name / "0.png")
    other = ["--data", str(tmp_path / "other")]
    for what in (str(far / "model.onnx"), str(far / "model.safetensors"), str(life.onnx), str(life.run.folder)):
        assert "its 2 classes are not the 10 that" in refused(["eval", what, *other], capsys)
    line = refused(["eval", str(life.onnx), "--backend", "torch"], capsys)
    assert "use --backend native, onnxruntime or reference, or name the run" in line
    assert "expected torch, native, onnxruntime, reference" in refused(
        ["eval", str(life.onnx), "--backend", "tvm"], capsys
    )
    assert "--last and --full-precision are for runs" in refused(["eval", str(life.onnx), "--last"], capsys)
    run = str(life.run.folder)
    line = refused(["eval", run, "--backend", "onnxruntime", "--full-precision"], capsys)
    assert "the full-precision one runs in torch" in line


def test_weights_of_an_unfinished_training_are_exported_with_a_word(
    copied: Life, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = copied.run.folder.glob("state/*/progress.json")
    progress = json.loads(file.read_text())
    assert siman(["export", str(copied.run.folder), "--images", "4"]) == 0
    assert "finished training" not in capsys.readouterr().out + (copied.run.folder / "README.md").read_text()
    file.write_text(json.dumps(progress | {"epoch": 0}))
    assert siman(["export", str(copied.run.folder), "--images", "4"]) == 0
    assert "is at binary epoch 0 of" in capsys.readouterr().out
    assert (
        "not the weights of a finished training: it was at binary epoch 0 of"
        in (copied.run.folder / "README.md").read_text()
    )


def test_a_file_of_other_classes_in_a_runs_folder(copied: Life, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers would mean nothing on the run's data."""
    file = read_onnx(copied.onnx)
    reversed_classes = replace(file.description, classes=file.description.classes[::-1])
    copied.onnx.write_bytes(seal(file.model, reversed_classes, file.variant))
    line = refused(["eval", str(copied.onnx)], capsys)
    assert f"its 10 classes are not the 10 that {copied.onnx} was trained on" in line


# predict


def test_predict_names_the_classes(life: Life, pictures: Path, far: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(pictures / f"{number}.png") for number in range(4)]
    assert siman(["predict", str(far / "model.onnx"), *images, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert [one["image"] for one in document["predictions"]] == images
    for one in document["predictions"]:
        probabilities = [guess["probability"] for guess in one["top"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.1 < probabilities[0] <= sum(probabilities) <= 1 + 1e-9
        assert all(guess["name"] == life.run.info().classes[guess["index"]] for guess in one["top"])
    best = [one["top"][0]["name"] for one in document["predictions"]]
    truth = [str(label) for label in load_digits().target[320:324]]
    assert sum(a == b for a, b in zip(best, truth, strict=True)) >= 2
    assert len(set(best)) > 1

    out = printed("predict", str(far / "model.safetensors"), *images, "--top", "1")
    assert [line.split()[-1] for line in out.splitlines()[1::2]] == best
    assert out.splitlines()[::2] == images


def test_predict_shows_no_more_classes_than_there_are(life: Life, pictures: Path) -> None:
    lines = printed("predict", str(life.onnx), str(pictures / "0.png"), "--top", "99").splitlines()[1:]
    assert sorted(line.split()[-1] for line in lines) == [str(digit) for digit in range(10)]
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(100, abs=0.06)


def test_what_is_missing_without_kernels_is_said_once(
    life: Life, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "variants", dict)
    for arguments in (["eval", str(life.onnx)], ["predict", str(life.onnx), str(pictures / "0.png")]):
        capsys.readouterr()
        assert siman(arguments) == 0
        assert capsys.readouterr().err == f"siman: {native.MISSING}\n"
        assert siman([*arguments, "--backend", "onnxruntime"]) == 0
        assert capsys.readouterr().err == ""  # it was asked for


def test_predict_takes_any_kind_of_image(life: Life, pictures: Path, tmp_path: Path) -> None:
    grey = Image.open(pictures / "1.png")
    kinds = {"L": grey, "RGB": grey.convert("RGB"), "P": grey.convert("P"), "RGBA": grey.convert("RGBA")}
    names = []
    for mode, image in kinds.items():
        assert image.mode == mode
        image.save(tmp_path / f"{mode}.png")
        names.append(str(tmp_path / f"{mode}.png"))
    lines = printed("predict", str(life.onnx), *names).splitlines()
    first, *others = (lines[start + 1 : start + 6] for start in range(0, 24, 6))
    assert len(others) == 3
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.png", b"not an image", "not an image that Pillow can identify; expected an image file"),
        ("cut.png", None, "truncated; expected an image file"),
        ("gone.png", b"", "No such file or directory; expected an image file"),
        ("folder.png", b"", "Is a directory; expected an image file"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(
    life: Life,
    pictures: Path,
    name: str,
    content: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if name == "folder.png":
        path.mkdir()
    elif name != "gone.png":
        whole = (pictures / "2.png").read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    line = refused(["predict", str(life.onnx), str(pictures / "0.png"), str(path)], capsys)
    assert line.startswith(f"siman: {path}: ")
    assert message in line


# The snippets that export prints, run as they are printed


@pytest.mark.parametrize(
    ("flags", "head", "name"),
    [
        ([], NO_SIMAN, "model.onnx"),
        (["--with-preprocess"], NO_SIMAN, "model.onnx"),
        (["--format", "safetensors"], "", "model.safetensors"),
    ],
    ids=["onnx", "with-preprocess", "safetensors"],
)
def test_the_printed_snippet_runs(
    life: Life,
    pictures: Path,
    flags: list[str],
    head: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "it's here" / name
    out = printed("export", str(life.run.folder), *flags, "--output", str(file.parent), "--images", "4")
    code = [line[4:] for line in out.splitlines() if line.startswith("    ")]
    assert len(code) == (6 if head == "" else 7)
    assert max(map(len, code)) < 130 + len(str(file))
    images = [str(pictures / "2.png"), str(pictures / "1.png")]  # to be resized; of the right size
    program = "\n".join(line.replace("photo.jpg", image) for image in images for line in code)
    assert all(image in program for image in images)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{head}{program}\nimport numpy; numpy.save('x.npy', x)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert siman(["predict", str(file), *images, "--top", "1", "--json"]) == 0
    best = [one["top"][0]["name"] for one in json.loads(capsys.readouterr().out)["predictions"]]
    assert done.stdout.splitlines() == best

    preprocess = Preprocess.from_dict(life.run.info().preprocess)
    transform = pixel_transform if "--with-preprocess" in flags else eval_transform
    expected = transform(preprocess)(Image.open(images[1]))[None].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=0, atol=1e-6)


# Files that are none of ours


def foreign_onnx(path: Path, _good: bytes) -> None:
    make = helper.make_tensor_value_info
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [make("x", 1, [1])], [make("y", 1, [1])])
    onnx.save(helper.make_model(graph), path)


def flipped_bit(path: Path, good: bytes) -> None:
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    path.write_bytes(damaged)


BAD: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "truncated": (lambda path, good: path.write_bytes(good[: len(good) // 2]), "damaged or not an ONNX file"),
    "flipped": (flipped_bit, "damaged, or changed after the export"),
    "foreign": (foreign_onnx, "not an ONNX file that siman exported"),
    "text": (lambda path, _: path.write_text("to be or not to be\n"), "damaged or not an ONNX file"),
    "empty": (lambda path, _: path.touch(), "not an ONNX file that siman exported"),
    "folder": (lambda path, _: path.mkdir(), "expected a folder with run.json"),
    "missing": (lambda *_: None, "no such file"),
}


@pytest.mark.parametrize("command", ["eval", "verify", "export", "predict"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line(
    life: Life, pictures: Path, command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[kind]
    path = tmp_path / "x.onnx"
    make(path, life.onnx.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    image = [str(pictures / "0.png")] if command == "predict" else []
    line = refused([command, str(path), *image], capsys)
    assert str(path) in line
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["eval", "verify", "export", "predict"])
@pytest.mark.parametrize("content", [b"", b"text", None], ids=["empty", "text", "truncated"])
def test_bad_packed_files_are_one_line(
    life: Life,
    pictures: Path,
    command: str,
    content: bytes | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(life.safetensors.read_bytes()[:100_000] if content is None else content)
    image = [str(pictures / "0.png")] if command == "predict" else []
    assert refused([command, str(path), *image], capsys).startswith(
        f"siman: {path}: not a safetensors file, or cut off"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "FILE", "--last"], "holds one network; --last is for runs"),
        (["verify", "FILE", "--last"], "holds one network; --last is for runs"),
        (["export", "gone"], "no run at gone"),
        (["verify", "gone"], "no run at gone"),
        (["predict", "gone", "IMAGE"], "no run at gone"),
        (["predict", "FILE"], "Missing argument 'IMAGE'"),
        (["predict", "FILE", "IMAGE", "--top", "0"], "--top"),
        (["export", "--images", "0"], "--images"),
        (["export", "FILE", "--format", "tflite"], "--format 'tflite': expected onnx, safetensors, all"),
        (["export", "RUN", "--half", "--int8"], "--half and --int8 are two ways"),
        (["export", "RUN", "--output", "x.safetensors"], "add --format safetensors"),
        (["verify", "FILE", "--data", "nowhere"], "no such path: nowhere"),
        (["export", "RUN", "--data", "nowhere"], "no such path: nowhere"),
        (["eval", "FILE", "--data", "nowhere"], "no such path: nowhere"),
    ],
)
def test_wrong_usage_is_one_line(
    life: Life,
    pictures: Path,
    far: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"FILE": str(far / "model.onnx"), "IMAGE": str(pictures / "0.png"), "RUN": str(life.run.folder)}
    assert message in refused([names.get(argument, argument) for argument in arguments], capsys)
    assert list(tmp_path.iterdir()) == []


def test_verify_json_is_one_document(life: Life, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["verify", str(life.onnx), "--images", "4", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)
    assert document["schema_version"] == 1
    assert list(document["subjects"]) == [str(life.onnx)]
    found = document["subjects"][str(life.onnx)]
    assert (found["passed"], found["failures"]) == (True, [])
    assert found["models"][1]["backends"] == ["torch", "onnxruntime"]
