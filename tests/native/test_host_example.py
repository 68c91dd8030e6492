"""examples/classify.cpp, built from its own declarations alone: the logits of `siman_convert.session`, and its errors."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from native_library import SOURCE, find_tool
from packed_models import HAND_CLASSES, HAND_SIZE, MEAN, STD, hand_export, images

from siman_convert.data import Preprocess
from siman_convert.onnx_file import read_onnx
from siman_convert.onnx_preprocess import add_preprocess
from siman_convert.runtime import native


def test_the_line_that_builds_it_is_the_one_it_states():
    source = (SOURCE / "examples" / "classify.cpp").read_text()
    assert f"//   {' '.join(BUILD)}\n" in source


BUILD = ["g++", "-std=c++20", "-O2", "classify.cpp", "-o", "classify", "-ldl"]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("host") / "classify"
    compiler = find_tool("c++", "g++", "clang++")
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = [compiler, *warnings, *(str(built) if word == "classify" else word for word in BUILD[1:])]
    done = subprocess.run(command, cwd=SOURCE / "examples", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def runtime() -> str:
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime has no shared object of its own")
    return str(found[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model.onnx takes float32, pixels.onnx uint8 of any size; x.raw and x.ppm are for them."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "model.onnx").write_bytes(hand_export().data)
    preprocess = Preprocess(HAND_SIZE, "bicubic", MEAN, STD, 0.95, "center")
    pixels = add_preprocess(read_onnx(folder / "model.onnx").model, preprocess)
    (folder / "pixels.onnx").write_bytes(pixels.SerializeToString())
    (folder / "x.raw").write_bytes(images(1, *HAND_SIZE).numpy().astype("<f4").tobytes())
    (folder / "x.ppm").write_bytes(b"P6\n# made by a test\n40 30 255\n" + random_pixels().tobytes())
    return folder


def random_pixels() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (1, 30, 40, 3), dtype=np.uint8)


def run(program, *arguments, isa=None):
    environment = {key: value for key, value in os.environ.items() if key != native.ISA}
    environment |= {} if isa is None else {native.ISA: isa}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, cwd=program.parent, env=environment
    )


def best(stdout: str) -> dict[int, np.float32]:
    """Class -> logit, in the order printed; nine digits are a float32, bit for bit."""
    return {int(line.split()[0]): np.float32(line.split()[1]) for line in stdout.splitlines()}


@pytest.mark.parametrize("threads", [[], ["1"], ["2"]])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_logits_are_those_of_a_session_in_python(program, runtime, library, folder, monkeypatch, kind, threads):
    monkeypatch.setattr(native, "find_library", lambda: Path(library.path))
    model, image, name, values = {
        "float32": ("model.onnx", "x.raw", "input", images(1, *HAND_SIZE).numpy()),
        "uint8": ("pixels.onnx", "x.ppm", "images", random_pixels()),
    }[kind]
    done = run(program, runtime, folder / model, folder / image, library.path, *threads)
    assert (done.returncode, done.stderr) == (0, "")
    session = native.open_session(folder / model, use_kernels=True)
    expected = session.run(None, {name: values})[0][0]
    assert len(expected) == HAND_CLASSES == len(best(done.stdout))
    assert list(best(done.stdout)) == list(np.argsort(-expected))
    assert all(logit == expected[class_] for class_, logit in best(done.stdout).items())


def test_the_kernels_run_only_where_they_are_given(program, runtime, library, folder):
    """A variant that does not exist is their error; stock ONNX Runtime has never heard of it."""
    stock = [runtime, folder / "model.onnx", folder / "x.raw"]
    refused = run(program, *stock, library.path, isa="avx3")
    assert refused.returncode == 1
    assert "SIMAN_ISA or variant: unknown name" in refused.stderr
    without = run(program, *stock, isa="avx3")
    assert (without.returncode, without.stderr) == (0, "")
    with_kernels = best(run(program, *stock, library.path, isa="scalar").stdout)
    assert best(without.stdout).keys() == with_kernels.keys()
    for class_, logit in best(without.stdout).items():
        assert logit == pytest.approx(with_kernels[class_], abs=1e-5)


WRONG = {
    "nothing": ([], 2, "usage: classify"),
    "no runtime": (["none.so", "model.onnx", "x.raw"], 2, "none.so: cannot open"),
    "another library as runtime": (["LIBRARY", "model.onnx", "x.raw"], 2, "OrtGetApiBase is missing"),
    "no model": (["RUNTIME", "none.onnx", "x.raw"], 1, "none.onnx"),
    "not a model": (["RUNTIME", "x.raw", "x.raw"], 1, "Protobuf parsing failed"),
    "no image": (["RUNTIME", "model.onnx", "none.raw"], 2, "none.raw: No such file"),
    "image is a folder": (["RUNTIME", "model.onnx", "."], 1, "directory"),
    "image too large": (["RUNTIME", "model.onnx", "x.ppm"], 2, "bytes as 1x3x16x13 do not fit"),
    "image too short": (["RUNTIME", "pixels.onnx", "short.ppm"], 2, "bytes as 1x30x40x3 do not fit"),
    "image of one channel": (["RUNTIME", "pixels.onnx", "grey.pgm"], 2, "uint8 1x?x?x3"),
    "not an image": (["RUNTIME", "pixels.onnx", "x.raw"], 2, "not a binary PPM or PGM"),
    "damaged image": (["RUNTIME", "pixels.onnx", "damaged.ppm"], 2, "damaged header"),
    "empty image": (["RUNTIME", "pixels.onnx", "empty"], 2, "not a binary PPM"),
    "no kernels": (["RUNTIME", "model.onnx", "x.raw", "none.so"], 1, "none.so"),
    "another library as kernels": (["RUNTIME", "model.onnx", "x.raw", "RUNTIME"], 1, "RegisterCustomOps"),
    "threads": (["RUNTIME", "model.onnx", "x.raw", "LIBRARY", "two"], 2, "THREADS must be"),
    "one argument too many": (["RUNTIME", "model.onnx", "x.raw", "LIBRARY", "1", "1"], 2, "usage: classify"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(program, runtime, library, folder, case):
    names, code, message = WRONG[case]
    pixels = random_pixels().tobytes()
    (folder / "short.ppm").write_bytes(b"P6 40 30 255\n" + pixels[:-1])
    (folder / "grey.pgm").write_bytes(b"P5 40 90 255\n" + pixels)
    (folder / "damaged.ppm").write_bytes(b"P6 40 x30 255\n" + pixels)
    (folder / "empty").write_bytes(b"")
    known = {"RUNTIME": runtime, "LIBRARY": library.path, "two": "two", "1": "1"}
    done = run(program, *(known.get(name, folder / name) for name in names))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.startswith("classify: ")
    assert done.stderr.count("\n") == 1
