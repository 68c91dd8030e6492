"""A session takes a large batch in pieces: the same results and errors, and never of a graph that may mix its images."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from test_native_sessions import two_layers
from test_onnx_op import in_reference, make_model

from siman_convert.description import KEY
from siman_convert.runtime import batches, native

X = np.random.default_rng(0).standard_normal((7, 70, 9, 10)).astype(np.float32)
pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native library was not built here")


def as_exported(model: onnx.ModelProto, size: Sequence[object] = X.shape[1:]) -> onnx.ModelProto:
    model.producer_name = "siman"
    model.metadata_props.add(key=KEY, value=json.dumps({"preprocess": {"input_size": size}}))
    return model


def opened(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    return native.open_session(model.SerializeToString(), threads, use_kernels=True)


def two() -> onnx.ModelProto:
    return as_exported(make_model(two_layers()))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the batches that ONNX Runtime is handed; two of X's images are a piece for one thread."""
    seen: list[int] = []
    run = onnxruntime.InferenceSession.run

    def counted(session, names, feed, options=None):
        seen.extend(len(array) for array in feed.values())
        return run(session, names, feed, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", counted)
    monkeypatch.setattr(batches, "PIECE", 2 * X[0].size)
    return seen


@pytest.mark.parametrize(
    ("threads", "count", "expected"),
    [(1, 7, [2, 2, 2, 1]), (1, 3, [2, 1]), (1, 2, [2]), (2, 7, [4, 3]), (2, 4, [4]), (4, 7, [7]), (1, 0, [0])],
)
@pytest.mark.parametrize("names", [None, [], ["y"]])
def test_pieces(sizes: list[int], threads: int, count: int, expected: list[int], names: list[str] | None) -> None:
    (got,) = opened(two(), threads).run(names, {"x": X[:count]})
    np.testing.assert_array_equal(got, in_reference(X[:count], two_layers()))
    assert sizes == expected


def test_images_larger_than_a_piece_go_one_by_one(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE", 1)
    (got,) = opened(two()).run(None, {"x": X})
    np.testing.assert_array_equal(got, in_reference(X, two_layers()))
    assert sizes == [1] * 7


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 7


def batch_of_another_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "M"


def softmax_over_images(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Softmax", ["y"], ["shares"], axis=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("shares", onnx.TensorProto.FLOAT, ("N", *[None] * 3)))


def made_by_another(model: onnx.ModelProto) -> None:
    model.producer_name = "onnx.quantize"


def metadata(value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.metadata_props[0].value = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        fixed_batch,
        batch_of_another_name,
        softmax_over_images,
        made_by_another,
        lambda model: model.ClearField("metadata_props"),
        *map(metadata, ["", "[1]", "{}", "[" * 100_000]),
        *(metadata(f'{{"preprocess": {{"input_size": {size}}}}}') for size in ('[3, "a"]', "[0.5]", "[3, -1, 5]")),
    ],
)
def test_what_is_no_export_is_run_as_it_is(sizes: list[int], change: Callable[[onnx.ModelProto], None]) -> None:
    model = two()
    change(model)
    np.testing.assert_array_equal(opened(model).run(None, {"x": X})[0], in_reference(X, two_layers()))
    assert sizes == [7]


def test_a_piece_is_of_what_the_network_sees(sizes: list[int]) -> None:
    """Not of the photos that a file with its preprocessing takes: seven of X are as small as two."""
    half = as_exported(make_model(two_layers()), (70, 9, 5))
    opened(half).run(None, {"x": X})
    assert sizes == [4, 3]


def error_of(run: Callable[..., Any], feed: dict[str, Any]) -> tuple[type[Exception], str]:
    try:
        run(None, feed)
    except Exception as error:  # ONNX Runtime's share no public base class
        return type(error), str(error)
    pytest.fail("it ran")


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    "feed", [{}, {"z": X}, {"x": X[0]}, {"x": X[:, :5]}, {"x": X.astype(np.float64)}, {"x": np.float32(1)}]
)
def test_errors_are_onnxruntimes(feed: dict[str, Any]) -> None:
    session = opened(two())
    assert error_of(session.run, feed) == error_of(super(batches.BatchSession, session).run, feed)


def test_the_key_is_that_of_the_description() -> None:
    assert batches.KEY == KEY


def test_lists_are_taken_whole(sizes: list[int]) -> None:
    (got,) = opened(two()).run(None, {"x": X.tolist()})
    np.testing.assert_array_equal(got, in_reference(X, two_layers()))
    assert sizes == [7]
