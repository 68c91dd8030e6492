"""The installed native library: found, chosen, registered, and what is said where it is missing."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_onnx_op import in_reference, layer, make_model

import siman_convert
from siman_convert import InputError
from siman_convert.backends import default_onnx_backend, open_backend
from siman_convert.runtime import native
from siman_convert.subjects import Subject

needs_library = pytest.mark.skipif(native.find_library() is None, reason="the native library was not built here")


def two_layers():
    rng = np.random.default_rng(3)
    return [layer(rng, 70, 24, slope=0), layer(rng, 24, 11, strides=[2, 2])]


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "two.onnx"
    path.write_bytes(make_model(two_layers()).SerializeToString())
    return path


def test_the_library_is_there_where_it_has_to_be() -> None:
    if os.environ.get("SIMAN_REQUIRE_NATIVE") == "1":
        assert native.find_library() is not None
        assert native.variant() in native.variants()


@needs_library
@pytest.mark.parametrize("variant", [name for name, supported in native.variants().items() if supported])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_runs_every_variant(
    variant: str, threads: int, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function body is taken out of the file: nothing but the kernels can run it."""
    monkeypatch.setenv("SIMAN_ISA", variant)
    model = onnx.load(model_path)
    model.ClearField("functions")
    onnx.save(model, model_path)
    X = np.random.default_rng(0).standard_normal((3, 70, 9, 10)).astype(np.float32)
    for given in (model_path, str(model_path), model_path.read_bytes()):
        session = siman_convert.session(given, threads=threads)
        np.testing.assert_array_equal(session.run(None, {"x": X})[0], in_reference(X, two_layers()))
    assert native.variant() == variant


@needs_library
def test_an_unusable_variant_is_one_line(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMAN_ISA", "sse9")
    with pytest.raises(InputError, match="SIMAN_ISA=sse9: there is no such variant; expected one of .*scalar"):
        siman_convert.session(model_path)


@pytest.mark.parametrize("threads", [-1, 20_000, 2**40, 1.5, "2", True])
def test_a_number_of_threads_that_none_can_have_is_one_line(threads: int, model_path: Path) -> None:
    with pytest.raises(InputError, match="threads=.*: expected a whole number in 0..1024"):
        siman_convert.session(model_path, threads=threads)


def test_no_threads_are_as_many_as_onnxruntime_likes(model_path: Path) -> None:
    X = np.ones((1, 70, 5, 5), np.float32)
    given = (0, None, 1, np.int64(1))
    results = [siman_convert.session(model_path, threads=threads).run(None, {"x": X})[0] for threads in given]
    np.testing.assert_array_equal(results[1:], [results[0]] * 3)


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("no")
    with pytest.raises(InputError, match="ONNX Runtime cannot open the graph"):
        siman_convert.session(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "cannot be read .no such file"),
        ("nowhere.onnx", r"^nowhere.onnx: cannot be read \(no such file or directory\); expected an ONNX file"),
        ("a" * 5000, "cannot be read .*too long."),
        ("a\0b", r"^a\\x00b: cannot be read \(embedded null byte\)"),
        (Path(), "^.: not a file; expected an ONNX file"),
        (None, "NoneType: expected the path of an ONNX file, or the file's bytes"),
        (bytearray(b"x"), "bytearray: expected the path"),
        (onnx.ModelProto(), "ModelProto: expected the path"),
    ],
)
def test_what_is_neither_a_path_nor_bytes_is_one_line(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        siman_convert.session(given)


@needs_library
def test_an_empty_variant_is_none(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = native.variant()
    monkeypatch.setenv("SIMAN_ISA", "")
    assert native.variant() == best
    X = np.ones((1, 70, 5, 5), np.float32)
    np.testing.assert_array_equal(
        siman_convert.session(model_path).run(None, {"x": X})[0], in_reference(X, two_layers())
    )


def test_without_the_library(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function body runs; asking for the kernels says what is missing and what that costs."""
    monkeypatch.setattr(native, "find_library", lambda: None)
    assert native.variant() is None
    assert default_onnx_backend() == "onnxruntime"
    X = np.random.default_rng(0).integers(-64, 64, (2, 70, 9, 10)).astype(np.float32)
    got = siman_convert.session(model_path).run(None, {"x": X})[0]
    np.testing.assert_array_equal(got, in_reference(X, two_layers()))
    with pytest.raises(InputError, match="native kernels are not installed .* install a compiler"):
        open_backend(Subject("x", Path(), None, None), "native")
