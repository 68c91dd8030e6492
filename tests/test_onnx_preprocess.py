"""Preprocessing in the graph against `eval_transform` on PIL images, in ONNX Runtime; differences in pixels (0..255)."""

import functools

import numpy as np
import onnx
import onnxruntime as ort
import PIL
import pytest
from onnx import helper, numpy_helper, parser
from PIL import Image

from siman_convert.bits import pack_weight_bits
from siman_convert.data.preprocess import Preprocess
from siman_convert.data.transforms import eval_transform
from siman_convert.errors import InputError
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, function_body
from siman_convert.onnx_preprocess import INPUT, MIN_OPSET, add_preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = [  # (C, H, W), crop_pct, crop_mode
    ((3, 56, 56), 0.875, "center"),  # torchvision's Resize, an even excess of 8
    ((1, 27, 27), 0.8, "center"),  # resized to 33
    ((3, 33, 47), 0.9, "center"),  # timm's ResizeKeepRatio
    ((1, 40, 24), 1.0, "center"),
    ((3, 31, 45), 0.9, "squash"),  # excess 3 and 5: halves go to the even side, once down and once up
    ((1, 32, 32), 1.0, "squash"),
]
SIZES = [(90, 61), (61, 90), (64, 64), (17, 150), (5, 3), (1, 1), (2, 40), (37, 33)]
PILLOW_MAJOR = int(PIL.__version__.split(".")[0])


def preprocess(size, interpolation="bicubic", crop_pct=0.875, crop_mode="center", **more):
    return Preprocess(size, interpolation, MEAN[: size[0]], STD[: size[0]], crop_pct, crop_mode, **more)


def identity(channels=3, opset=20):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[N, {channels}, H, W] x) => (float[N, {channels}, H, W] y) {{ y = Identity (x) }}"""
    return parser.parse_model(text)


def session(model):
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def pixels_session(pre):
    return session(add_preprocess(identity(pre.input_size[0]), pre))


def images_of(size, channels, count=1):
    """Noise on blurred noise, full range: edges, plains and single pixels. (count, H, W, channels)"""
    rng = np.random.default_rng([*size, channels])
    coarse = rng.integers(0, 256, (count, -(-size[0] // 8), -(-size[1] // 8), channels))
    smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, : size[0], : size[1]]
    noisy = rng.integers(0, 256, (count, *size, channels))
    return np.where(rng.random((count, *size, 1)) < 0.3, noisy, smooth).astype(np.uint8)


def as_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def in_pillow(pre, images):
    return np.stack([eval_transform(pre)(as_pil(image)).numpy() for image in images])


def in_graph(pre, images):
    (got,) = pixels_session(pre).run(None, {INPUT: images})
    assert got.dtype == np.float32
    return got


def pixel_differences(pre, images):
    got, expected = in_graph(pre, images), in_pillow(pre, images)
    assert got.shape == expected.shape == (len(images), *pre.input_size)
    std = np.array(pre.std)[:, None, None]
    return np.abs(got.astype(np.float64) - expected) * std * 255


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_filters_differ_from_pillow_by_roundings_only(interpolation, case, size):
    shape, crop_pct, crop_mode = case
    pre = preprocess(shape, interpolation, crop_pct, crop_mode)
    if PILLOW_MAJOR < 13 and size in [(90, 61), (61, 90), (64, 64)]:
        pytest.skip("may lose over twice as many rows as columns; this Pillow still resizes columns first")
    differences = pixel_differences(pre, images_of(size, shape[0]))
    assert differences.max() < 1.001
    assert differences.mean() < 0.05


@pytest.mark.parametrize("size", [*SIZES, (150, 17), (211, 97)])
@pytest.mark.parametrize("case", CASES)
def test_nearest_is_exact(case, size):
    shape, crop_pct, crop_mode = case
    pre = preprocess(shape, "nearest", crop_pct, crop_mode)
    images = images_of(size, shape[0])
    np.testing.assert_array_equal(in_graph(pre, images), in_pillow(pre, images))


@pytest.mark.parametrize("shape", [(3, 50, 50), (3, 33, 47), (3, 47, 33)])
def test_sizes_and_offsets_are_exact_for_many_image_sizes(shape):
    """With nearest pixels and every pixel different, one row or column off anywhere shows."""
    pre = preprocess(shape, "nearest", 0.95)
    rng = np.random.default_rng(3)
    for height, width in rng.integers(1, 300, (60, 2)):
        images = images_of((int(height), int(width)), 3)
        np.testing.assert_array_equal(in_graph(pre, images), in_pillow(pre, images), err_msg=f"{height}x{width}")


@pytest.mark.skipif(PILLOW_MAJOR < 13, reason="Pillow resizes rows first from version 13 on")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(120, 50), (120, 20), (119, 71), (113, 71), (112, 71), (111, 71)])
def test_rows_go_first_when_over_twice_as_many_are_lost(size, interpolation):
    """(112, 71) to (32, 31) loses 80 rows, twice the 40 columns, so not first; black and white shows the order best."""
    pre = preprocess((3, 32, 31), interpolation, 1.0, "squash")
    images = images_of(size, 3) // 128 * 255
    differences = pixel_differences(pre, images)
    assert differences.max() < 1.001
    assert differences.mean() < 0.02


@pytest.mark.parametrize(
    ("shape", "crop_pct", "crop_mode", "size"),
    [
        ((3, 56, 56), 0.875, "center", (64, 81)),
        ((1, 56, 56), 0.875, "center", (99, 64)),
        ((3, 32, 32), 1.0, "center", (32, 32)),
        ((3, 30, 40), 1.0, "center", (30, 71)),
        ((3, 30, 41), 0.9, "squash", (33, 45)),
    ],
)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_an_image_of_the_right_size_passes_bit_for_bit(shape, crop_pct, crop_mode, size, interpolation):
    pre = preprocess(shape, interpolation, crop_pct, crop_mode)
    images = images_of(size, shape[0])
    np.testing.assert_array_equal(in_graph(pre, images), in_pillow(pre, images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_images_of_a_batch_do_not_mix(interpolation, channels):
    pre = preprocess((channels, 24, 24), interpolation)
    images = images_of((40, 31), channels, count=2)
    together = in_graph(pre, images)
    assert not np.array_equal(together[0], together[1])
    for i in range(2):
        np.testing.assert_array_equal(together[i], in_graph(pre, images[i : i + 1])[0])


def test_odd_means_and_stds_are_the_same_bits():
    pre = Preprocess((3, 8, 8), "bilinear", (-0.3, 1e-7, 0.12345678901), (1e-05, 3.0, 1 / 3), 1.0, "center")
    images = images_of((8, 8), 3)
    np.testing.assert_array_equal(in_graph(pre, images), in_pillow(pre, images))


@pytest.mark.parametrize("opset", [MIN_OPSET, 19, 22])
def test_other_opsets(opset):
    pre = preprocess((3, 24, 24), "bicubic")
    images = images_of((30, 41), 3)
    (got,) = session(add_preprocess(identity(opset=opset), pre)).run(None, {INPUT: images})
    np.testing.assert_array_equal(got, in_graph(pre, images))


def siman_model(opset=20):
    """One BinaryConv2d of 3 -> 8 channels with its function, and metadata."""
    rng = np.random.default_rng(11)
    arrays = {
        "W": pack_weight_bits(rng.random((8, 3, 3, 3)) < 0.5),
        "scale": rng.standard_normal(8).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
        "residual": np.zeros((1, 1, 1, 1), np.float32),
        "slope": np.full(8, 0.25, np.float32),
    }
    geometry = {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1]}
    node = helper.make_node(
        OP_NAME, ["x", *arrays], ["y"], domain=DOMAIN, name="conv", channels=3, group=1, center=1, **geometry
    )
    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", float_, ("N", 3, 24, 24))],
        [helper.make_tensor_value_info("y", float_, ("N", 8, 24, 24))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function_body(opset)], ir_version=10)
    helper.set_model_props(model, {"siman": "kept"})
    return model


def test_a_binary_model_keeps_all_else_and_gives_the_same_result():
    pre = preprocess((3, 24, 24), "bilinear")
    model = siman_model()
    before = model.SerializeToString(deterministic=True)
    result = add_preprocess(model, pre)
    assert model.SerializeToString(deterministic=True) == before
    for field in ("functions", "metadata_props", "opset_import", "ir_version"):
        assert getattr(result, field) == getattr(model, field)
    assert result.graph.initializer == model.graph.initializer
    assert result.graph.node[-1] == model.graph.node[0]
    images = images_of((40, 33), 3, count=2)
    (got,) = session(result).run(None, {INPUT: images})
    (expected,) = session(model).run(None, {"x": in_graph(pre, images)})
    np.testing.assert_array_equal(got, expected)


def dims_of(value):
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


def test_the_input_is_bytes_of_any_size_and_the_output_shares_its_batch():
    result = add_preprocess(siman_model(), preprocess((3, 24, 24)))
    (images,) = result.graph.input
    assert images.name == INPUT == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert dims_of(images) == ["batch", "height", "width", 3]
    assert dims_of(result.graph.output[0]) == ["batch", 8, 24, 24]


def test_a_fixed_batch_stays_fixed():
    model = siman_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    result = add_preprocess(model, preprocess((3, 24, 24)))
    assert dims_of(result.graph.input[0]) == [2, "height", "width", 3]


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_every_new_node_has_a_readable_name_of_its_own(interpolation):
    result = add_preprocess(siman_model(), preprocess((3, 24, 24), interpolation))
    names = [node.name for node in result.graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith("preprocess/") for name in names[:-1])
    assert {"preprocess/resize", "preprocess/crop", "preprocess/mean"} <= set(names)


COLLIDING = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[height, 3, batch, width] images) => (float[height, 3, batch, width] y)
<float[1] weight = {2.0}>
{
  [preprocess] resize = Mul (images, weight)
  is_bright = Constant <value = bool {1}> ()
  y = If (is_bright) <
    then_branch = b () => (float[height, 3, batch, width] sum) { sum = Add (images, resize) },
    else_branch = c () => (float[height, 3, batch, width] same) { same = Identity (images) }
  >
}
"""


def test_names_do_not_collide():
    """The model's own input is `images`, a branch reads it, its dimensions and a node have the names to be used."""
    model = parser.parse_model(COLLIDING)
    model.graph.node[2].name = "preprocess/crop"
    pre = preprocess((3, 24, 24))
    result = add_preprocess(model, pre)
    names = [node.name for node in result.graph.node]
    assert names[-3:] == ["preprocess", "", "preprocess/crop"]
    assert all(name.startswith("preprocess_2/") for name in names[:-3])
    assert dims_of(result.graph.output[0]) == ["batch", 3, "preprocess_2/batch", "preprocess_2/width"]
    images = images_of((40, 33), 3)
    (got,) = session(result).run(None, {INPUT: images})
    np.testing.assert_array_equal(got, 3 * in_graph(pre, images))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interpolation": "lanczos"}, "interpolation 'lanczos'"),
        ({"interpolation": "box"}, "interpolation 'box'"),
        ({"interpolation": "hamming"}, "interpolation 'hamming'"),
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"pad_to_size": True}, "pad_to_size"),
    ],
)
def test_what_the_graph_cannot_do_is_refused_with_a_way_out(changes, words):
    with pytest.raises(InputError, match=f"{words}.*Export without --with-preprocess.*metadata"):
        add_preprocess(identity(), preprocess((3, 24, 24), **changes))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("(float[N, 1, 24, 24] x) => (float[N, 1, 24, 24] y)", r"x is FLOAT \(N, 1, 24, 24\): expected .*3, 24, 24"),
        ("(float[N, 3, 24, 32] x) => (float[N, 3, 24, 32] y)", r"expected FLOAT \(batch, 3, 24, 24\)"),
        ("(float[N, 3] x) => (float[N, 3] y)", r"x is FLOAT \(N, 3\)"),
        ("(uint8[N, 3, 24, 24] x) => (uint8[N, 3, 24, 24] y)", "x is UINT8"),
        ("(float[N, 3, 24, 24] x, float z) => (float[N, 3, 24, 24] y)", "one input, got 2: x, z"),
        ("(float[N, 3, 24, 24] x) => (float[N, 3, 24, 24] images)", "output is called 'images'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(header, message):
    output = "images" if header.endswith("images)") else "y"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g {header} {{ {output} = Identity (x) }}'
    with pytest.raises(InputError, match=message):
        add_preprocess(parser.parse_model(text), preprocess((3, 24, 24)))


def test_an_old_opset_is_refused():
    with pytest.raises(InputError, match="opset 18 or later, got 17"):
        add_preprocess(identity(opset=17), preprocess((3, 24, 24)))
