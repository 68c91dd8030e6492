import json

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from siman_convert.data import Augment, Preprocess, resolve_preprocess
from siman_convert.errors import InputError

RESNET = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def test_large_images_take_the_models_own_config():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    for source in (model, RESNET, {}):
        pre, note = resolve_preprocess(source, image_size=(375, 500))
        assert note is None
        assert pre.input_size == (3, 224, 224)
        assert pre.crop_pct == (0.875 if source == {} else 0.95)
    assert resolve_preprocess(model, image_size=(375, 500))[0] == resolve_preprocess(RESNET, image_size=(375, 500))[0]


@pytest.mark.parametrize(
    ("image", "side"),
    [((8, 8), 32), ((28, 28), 32), ((47, 47), 32), ((48, 48), 64), ((64, 64), 64), ((96, 80), 96), ((111, 111), 96)],
)
def test_small_images_take_the_nearest_multiple_of_32_whole(image, side):
    pre, note = resolve_preprocess(RESNET, image_size=image)
    assert pre.input_size == (3, side, side)
    assert pre.crop_pct == 1.0
    assert f"The images are {image[0]}x{image[1]}, under half" in note
    assert f"using {side}x{side} (--img-size 224" in note


@pytest.mark.parametrize("image", [(112, 112), (28, 200), (200, 28)])
def test_images_of_half_the_input_or_more_on_a_side_keep_it(image):
    pre, note = resolve_preprocess(RESNET, image_size=image)
    assert (pre.input_size, pre.crop_pct, note) == ((3, 224, 224), 0.95, None)


def test_what_is_given_wins():
    pre, note = resolve_preprocess(
        RESNET,
        image_size=(28, 28),
        img_size=48,
        mean=[0.5],
        std=(0.1, 0.2, 0.3),
        crop_pct=0.9,
        interpolation="bilinear",
    )
    assert note is None
    assert pre == Preprocess((3, 48, 48), "bilinear", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), 0.9, "center")
    assert resolve_preprocess(RESNET, image_size=(28, 28), img_size=32)[0].crop_pct == 1.0


def test_a_fixed_input_stays():
    pre, note = resolve_preprocess({**RESNET, "fixed_input_size": True}, image_size=(28, 28))
    assert (pre.input_size, note) == ((3, 224, 224), None)


def test_a_grey_model_has_one_mean():
    pre, _ = resolve_preprocess({**RESNET, "input_size": (1, 224, 224)}, image_size=(300, 300))
    assert (pre.input_size[0], len(pre.mean), len(pre.std)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 0}, "--img-size 0: expected"),
        ({"mean": (0.1, 0.2)}, "--mean: expected 1 or 3 values, got 2"),
        ({"std": (0.0,)}, "std .*: expected values above 0"),
        ({"crop_pct": 1.5}, "crop_pct 1.5: expected"),
        ({"crop_pct": 0.0}, "crop_pct 0.0: expected"),
        ({"interpolation": "sinc"}, "interpolation 'sinc': expected one of nearest, bilinear"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        resolve_preprocess(RESNET, image_size=(300, 300), **options)


shares = st.floats(0.01, 1.0)


@given(st.integers(1, 999), st.integers(1, 999), st.tuples(shares, shares, shares), shares, st.booleans())
def test_json_round_trip(height, width, values, crop_pct, pad):
    pre = Preprocess((3, height, width), "bicubic", values, values, crop_pct, "squash", pad)
    assert Preprocess.from_dict(json.loads(json.dumps(pre.to_dict()))) == pre


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharpness": 1}, "unknown entries: sharpness"),
        ({"mean": None}, "wrong type"),
        ({"input_size": [3, 32]}, "wrong type"),
        ({"crop_pct": "much"}, "wrong type"),
        ({"crop_mode": "star"}, "crop_mode 'star'"),
        ({"input_size": [4, 32, 32]}, "expected 1 or 3 channels"),
    ],
)
def test_from_dict_checks_what_it_reads(change, message):
    good = resolve_preprocess(RESNET, image_size=(300, 300))[0].to_dict()
    with pytest.raises(InputError, match=message):
        Preprocess.from_dict(good | change)
    with pytest.raises(InputError, match="missing or unknown entries: std"):
        Preprocess.from_dict({k: v for k, v in good.items() if k != "std"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"hflip": 1.5},
        {"reprob": -1},
        {"scale": (0.5, 0.1)},
        {"scale": (0.5, 2.0)},
        {"crop_padding": -1},
        {"ratio": (0, 1)},
    ],
)
def test_augment_checks_its_ranges(wrong):
    with pytest.raises(InputError, match="expected"):
        Augment(**wrong)
