"""model.onnx with siman.QuantizedConv2d nodes: read back, and refused in one line where they are not what they should be."""

from typing import Any

import numpy as np
import onnx
import packed_models as pm
import pytest
from onnx import helper, numpy_helper
from packed_models import one_thread  # noqa: F401  a fixture
from test_onnx_file import Edit, attribute, forged, input_of, node_of, refusal, replaced, tensor_of, with_one

from siman_convert.description import description_of
from siman_convert.onnx_file import Variant, parse_onnx, seal
from siman_convert.onnx_int8 import quantize_rest
from siman_convert.onnx_op import OP_NAME
from siman_convert.onnx_quantized_op import QUANTIZED_ATTRIBUTES, QUANTIZED_OP

WEIGHT = "stem.weight_int8"


@pytest.fixture(scope="module")
def data() -> bytes:
    """HandNet's file, its stem and its head in 8 bits."""
    export = pm.hand_export()
    model, _ = quantize_rest(export.model, [pm.images(8, *pm.HAND_SIZE).numpy()])
    return seal(model, description_of(export.packed), Variant(int8=True))


def test_it_is_read_back(data: bytes) -> None:
    file = parse_onnx(data)
    assert file.variant == Variant(int8=True)
    assert node_of(file.model, "stem").op_type == QUANTIZED_OP
    assert [function.name for function in file.model.functions] == [OP_NAME, QUANTIZED_OP]
    logits = pm.ort_session(data).run(None, {"input": pm.images(3, *pm.HAND_SIZE).numpy()})[0]
    assert logits.shape == (3, pm.HAND_CLASSES)


def stem(name: str, value: Any) -> Edit:
    return attribute(name, value, "stem")


def weights_of_shape(*shape: int) -> Edit:
    return replaced(WEIGHT, lambda _: np.ones(shape, np.int8))


def without_the_second_function(model: onnx.ModelProto) -> None:
    del model.functions[1]


def of_an_attribute_twice(model: onnx.ModelProto) -> None:
    node_of(model, "stem").attribute.append(helper.make_attribute("x_scale", 1.0))


def weights_of_an_input(model: onnx.ModelProto) -> None:
    tensor = tensor_of(model, WEIGHT)
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.initializer.remove(tensor)


def with_pool(kernel: list[Any], pads: list[int] | None = None) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        values = {"pool_kernel": kernel, "pool_strides": [1, 1], "pool_pads": pads or [0] * 4}
        node_of(model, "stem").attribute.extend(helper.make_attribute(name, value) for name, value in values.items())

    return edit


SCALE = "stem: QuantizedConv2d: x_scale must be a finite float32 above 0, got "
HOSTILE: dict[str, tuple[Edit, str]] = {
    "no function": (
        without_the_second_function,
        "stem: the function siman.QuantizedConv2d is missing or there twice; export it again",
    ),
    **{
        f"no {name}": (
            stem(name, None),
            f"stem: attributes {', '.join(sorted({*QUANTIZED_ATTRIBUTES} - {name}))}; expected pads, strides, x_scale,",
        )
        for name in QUANTIZED_ATTRIBUTES
    },
    "an attribute of the other operator": (stem("group", 1), "stem: attributes group, pads, strides, x_scale, x_zero_"),
    "an attribute twice": (of_an_attribute_twice, "stem: attributes pads, strides, x_scale, x_scale, x_zero_point"),
    "a part of a pool": (stem("pool_kernel", [2, 2]), "stem: attributes pads, pool_kernel, strides, x_scale, x_zero_"),
    "a pool of no rows": (with_pool([0, 1]), "stem: QuantizedConv2d: pool_kernel must be 2 x integer in 1.."),
    "a pool of floats": (with_pool([2.0, 1.0]), "stem: attribute pool_kernel is not of type INTS"),
    "pool pads": (with_pool([1, 1], [0, 0, 1, 0]), "stem: QuantizedConv2d: pool_pads must be below pool_kernel [1, 1]"),
    "x_scale 0": (stem("x_scale", 0.0), SCALE + "0.0"),
    "negative x_scale": (stem("x_scale", -1.0), SCALE + "-1.0"),
    "x_scale NaN": (stem("x_scale", float("nan")), SCALE + "nan"),
    "infinite x_scale": (stem("x_scale", float("inf")), SCALE + "inf"),
    "x_scale as an integer": (stem("x_scale", 1), "stem: attribute x_scale is not of type FLOAT"),
    "x_zero_point as a float": (stem("x_zero_point", 1.0), "stem: attribute x_zero_point is not of type INT"),
    "x_zero_point 256": (
        stem("x_zero_point", 256),
        "stem: QuantizedConv2d: x_zero_point must be 1 x integer in 0..255",
    ),
    "x_zero_point -1": (stem("x_zero_point", -1), "stem: QuantizedConv2d: x_zero_point must be 1 x integer in 0..255"),
    "stride 0": (stem("strides", [0, 1]), "stem: QuantizedConv2d: strides must be 2 x integer in 1.."),
    "negative pads": (stem("pads", [0, 0, 0, -1]), "stem: QuantizedConv2d: pads must be 4 x integer in 0.."),
    "-128": (replaced(WEIGHT, with_one(-128)), "stem: QuantizedConv2d: W must be -127 to 127, it holds -128"),
    "uint8 weights": (
        replaced(WEIGHT, lambda a: a.astype(np.uint8)),
        "stem: QuantizedConv2d: W must be a non-empty int8 (O, C, kH, kW), got uint8 (6, 3, 3, 3)",
    ),
    "three dimensions": (weights_of_shape(6, 9, 3), "must be a non-empty int8 (O, C, kH, kW), got int8 (6, 9, 3)"),
    "no filters": (weights_of_shape(0, 3, 3, 3), "must be a non-empty int8 (O, C, kH, kW), got int8 (0, 3, 3, 3)"),
    "519 products": (weights_of_shape(6, 173, 3, 1), "stem: QuantizedConv2d: C*kH*kW must be at most 518, got 173*3*1"),
    "fewer filters": (
        replaced(WEIGHT, lambda a: a[:5]),
        "stem: scale is float32 (6,), expected float32 (5,)",
    ),
    "float64 slope": (
        replaced("stem/slope", lambda a: a.astype(np.float64)),
        "stem: slope is float64 (6,), expected float32 (6,)",
    ),
    "NaN bias": (replaced("stem.bias", with_one(np.nan)), "stem.bias: holds values that are not finite"),
    "computed weights": (input_of(1, "input", "stem"), "stem: W is not a constant of the file"),
    "weights from outside": (weights_of_an_input, "stem: W is not a constant of the file"),
    "no slope": (input_of(4, "", "stem"), "stem: slope is not a constant of the file"),
    "too few inputs": (
        lambda m: node_of(m, "stem").input.pop(),
        "stem: siman.QuantizedConv2d of 4 inputs; expected BinaryConv2d of 6 or QuantizedConv2d of 5",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_file(data: bytes, name: str) -> None:
    edit, message = HOSTILE[name]
    assert message in refusal(forged(data, edit))


def test_as_many_products_as_are_exact(data: bytes) -> None:
    assert parse_onnx(forged(data, weights_of_shape(6, 74, 7, 1)))


def test_the_file_holds_the_rounded_tensors(data: bytes) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in parse_onnx(data).model.graph.initializer}
    state = pm.hand_export().packed.state_dict()
    weight = state["stem.weight"].numpy()
    step = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    np.testing.assert_allclose(tensors[WEIGHT] * step, weight, atol=0.5001 * step.max())
    np.testing.assert_array_equal(tensors["stem.bias"], state["stem.bias"].numpy())
    np.testing.assert_array_equal(tensors["grouped.weight_bits"], state["grouped.weight_bits"].numpy())
