"""A session takes a large batch in pieces: the same results and errors, and never of a graph that may mix its images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from test_native_sessions import two_layers
from test_onnx_op import in_reference, make_model

from siman_convert.runtime import batches, native

X = np.random.default_rng(0).standard_normal((7, 70, 9, 10)).astype(np.float32)
pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native library was not built here")


def opened(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    return native.open_session(model.SerializeToString(), threads, use_kernels=True)


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
    (got,) = opened(make_model(two_layers()), threads).run(names, {"x": X[:count]})
    np.testing.assert_array_equal(got, in_reference(X[:count], two_layers()))
    assert sizes == expected


def test_images_larger_than_a_piece_go_one_by_one(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PIECE", 1)
    (got,) = opened(make_model(two_layers())).run(None, {"x": X})
    np.testing.assert_array_equal(got, in_reference(X, two_layers()))
    assert sizes == [1] * 7


def batch_of(value: onnx.ValueInfoProto) -> onnx.TensorShapeProto.Dimension:
    return value.type.tensor_type.shape.dim[0]


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        batch_of(value).dim_value = 7


def batch_of_another_name(model: onnx.ModelProto) -> None:
    batch_of(model.graph.output[0]).dim_param = "M"


def sum_over_images(model: onnx.ModelProto) -> None:
    """Asked for together with what has images it is not to be made of pieces."""
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, ()))


@pytest.mark.parametrize("change", [fixed_batch, batch_of_another_name, sum_over_images])
def test_where_the_batch_may_not_be_cut(sizes: list[int], change) -> None:
    model = make_model(two_layers())
    change(model)
    session = opened(model)
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], in_reference(X, two_layers()))
    assert sizes == [7]
    session.run(["y"], {"x": X})
    assert sizes[1:] == ([2, 2, 2, 1] if change is sum_over_images else [7])


def error_of(run: Callable[..., Any], feed: dict[str, Any]) -> tuple[type[Exception], str]:
    try:
        run(None, feed)
    except Exception as error:
        return type(error), str(error)
    pytest.fail("it ran")


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(
    "feed", [{}, {"z": X}, {"x": X[0]}, {"x": X[:, :5]}, {"x": X.astype(np.float64)}, {"x": np.float32(1)}]
)
def test_errors_are_onnxruntimes(feed: dict[str, Any]) -> None:
    session = opened(make_model(two_layers()))
    assert error_of(session.run, feed) == error_of(super(batches.BatchSession, session).run, feed)


def test_lists_are_taken_whole(sizes: list[int]) -> None:
    (got,) = opened(make_model(two_layers())).run(None, {"x": X.tolist()})
    np.testing.assert_array_equal(got, in_reference(X, two_layers()))
    assert sizes == [7]
