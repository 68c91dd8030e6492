import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from siman_convert.data import Augment, Preprocess, eval_transform, train_transform
from siman_convert.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pre(side: int = 32, **changes) -> Preprocess:
    return Preprocess(
        **{
            "input_size": (3, side, side),
            "interpolation": "bicubic",
            "mean": MEAN,
            "std": STD,
            "crop_pct": 0.875,
            "crop_mode": "center",
        }
        | changes
    )


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(40, 61), (28, 28), (300, 100)])
def test_evaluation_equals_timm_bit_for_bit(mode, size):
    timms = create_transform((3, 32, 32), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=0.875, crop_mode=mode)
    ours = eval_transform(pre(crop_mode=mode))(picture(*size))
    assert torch.equal(ours, timms(picture(*size)))
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()


@pytest.mark.parametrize("aug", [Augment(), Augment(vflip=0.5, color_jitter=0.4, reprob=1.0), Augment(no_aug=True)])
def test_training_equals_timm_for_the_same_random_draws(aug):
    timms = create_transform(
        (3, 32, 32),
        is_training=True,
        no_aug=aug.no_aug,
        vflip=aug.vflip,
        color_jitter=aug.color_jitter or None,
        re_prob=aug.reprob,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
    )
    from siman_convert.data.seeding import seed_generators

    for seed in range(5):
        results = []
        for transform in (train_transform(pre(), aug), timms):
            seed_generators(seed)
            results.append(transform(picture(50, 40)))
        assert torch.equal(*results)


def test_grey_images_become_three_equal_channels_and_rgb_becomes_grey():
    grey = picture(32, 32).convert("L")
    same = pre(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    three = eval_transform(same)(grey)
    assert three.shape == (3, 32, 32)
    assert torch.equal(three[0], three[2])
    one = pre(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0)
    assert torch.equal(eval_transform(one)(picture(32, 32))[0], three[0])


def black(p: Preprocess) -> torch.Tensor:
    return (torch.zeros(3) - torch.tensor(p.mean)) / torch.tensor(p.std)


def test_pad_to_size_centres_small_images_on_black():
    p = pre(pad_to_size=True)
    result = eval_transform(p)(picture(28, 26))
    whole = eval_transform(pre(crop_pct=1.0))
    canvas = Image.new("RGB", (32, 32))
    canvas.paste(picture(28, 26), (3, 2))
    assert torch.equal(result, whole(canvas))
    assert torch.equal(result[:, 0, 0], black(p))
    large = picture(50, 20)  # one side does not fit: resized as ever
    assert torch.equal(eval_transform(p)(large), eval_transform(pre())(large))


@pytest.mark.parametrize("pad_to_size", [False, True])
def test_crop_padding_shifts_by_at_most_the_padding(pad_to_size):
    p = pre(pad_to_size=pad_to_size, crop_pct=1.0)
    source = picture(28, 28)
    still = eval_transform(p)(source)
    transform = train_transform(p, Augment(crop_padding=4, hflip=0.0))
    padded = torch.nn.functional.pad(still - black(p)[:, None, None], (4, 4, 4, 4))
    padded += black(p)[:, None, None]
    shifts = set()
    for seed in range(30):
        torch.manual_seed(seed)
        result = transform(source)
        assert result.shape == (3, 32, 32)
        fits = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.allclose(padded[:, y : y + 32, x : x + 32], result, atol=1e-6)
        ]
        assert len(fits) == 1
        shifts.update(fits)
    assert len(shifts) > 15


def test_padded_before_the_random_resized_crop():
    p = pre(pad_to_size=True)
    transform = train_transform(p, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0))
    assert torch.equal(transform(picture(28, 28)), eval_transform(p)(picture(28, 28)))


def test_they_pickle():
    for transform in (eval_transform(pre()), train_transform(pre(), Augment(aa="rand-m9-mstd0.5", reprob=0.2))):
        assert pickle.loads(pickle.dumps(transform))(picture(40, 40)).shape == (3, 32, 32)


@pytest.mark.parametrize("aa", ["bogus", "rand-m9-x3"])
def test_an_unknown_auto_augment_policy(aa):
    with pytest.raises(InputError, match=f"aa '{aa}': timm does not know it"):
        train_transform(pre(), Augment(aa=aa))
