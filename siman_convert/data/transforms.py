"""The transforms of a Preprocess, built by timm.data.create_transform: PIL image to normalised float32 (C, H, W).

All objects here pickle, since loader workers may be started by spawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from siman_convert.data.preprocess import Augment, Preprocess, Transform
from siman_convert.errors import InputError


class _Chain:
    """Channels first, then `steps`; for `pad_to` (height, width), an image that fits goes through `padded_steps`."""

    def __init__(self, pre: Preprocess, steps: list[Any], padded_steps: list[Any]) -> None:
        self.mode = "RGB" if pre.input_size[0] == 3 else "L"
        self.pad_to = pre.input_size[1:] if pre.pad_to_size else None
        self.steps = steps
        self.padded_steps = padded_steps

    def __call__(self, image: Image.Image) -> Tensor:
        value: Any = image if image.mode == self.mode else image.convert(self.mode)
        steps = self.steps
        if self.pad_to is not None and value.height <= self.pad_to[0] and value.width <= self.pad_to[1]:
            value, steps = _centred_on_black(value, self.pad_to), self.padded_steps
        for step in steps:
            value = step(value)
        assert isinstance(value, Tensor)
        return value


class _Pixels:
    """PIL image to uint8 (H, W, C), as decoded: for a network that preprocesses by itself."""

    def __init__(self, pre: Preprocess) -> None:
        self.mode = "RGB" if pre.input_size[0] == 3 else "L"

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.array(image if image.mode == self.mode else image.convert(self.mode))
        return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None])


class _Normalise:
    """PIL image to normalised float32 (C, H, W): ((v / 255) - mean) / std, rounded after each step.

    The same bits as timm's ToTensor and Normalize in 33 instead of 167 us for a 32x32 RGB image (208, 554 at 224).
    """

    def __init__(self, pre: Preprocess) -> None:
        self.mean = np.array(pre.mean, dtype=np.float32)[:, None, None]
        self.std = np.array(pre.std, dtype=np.float32)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = np.asarray(image)  # (H, W, 3) or (H, W)
        channels_first = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        values = channels_first.astype(np.float32, order="C")
        values /= np.float32(255)
        values -= self.mean
        values /= self.std
        return torch.from_numpy(values)


def _centred_on_black(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if (image.height, image.width) == size:
        return image
    canvas = Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def eval_transform(pre: Preprocess) -> Transform:
    """Resize, central crop, normalise, as timm evaluates; with pad_to_size, images that fit are padded instead."""
    steps = _eval_steps(pre)
    return _Chain(pre, steps, steps[-1:])


def pixel_transform(pre: Preprocess) -> Transform:
    """No preprocessing: the decoded image, uint8 (H, W, C), in the network's colour mode."""
    return _Pixels(pre)


def train_transform(pre: Preprocess, aug: Augment) -> Transform:
    """Random resized crop (or padded random crop), flips, colour, normalise, erase. Draws from the global generators
    of random, numpy and torch, as timm's and torchvision's transforms do: the loader seeds them for each sample."""
    from torchvision import transforms

    if aug.no_aug:
        steps = [*_create(pre, is_training=True, no_aug=True).transforms[:-2], _Normalise(pre)]
        return _Chain(pre, steps, steps)
    parts = _create(
        pre,
        is_training=True,
        scale=aug.scale,
        ratio=aug.ratio,
        hflip=aug.hflip,
        vflip=aug.vflip,
        color_jitter=aug.color_jitter or None,
        auto_augment=aug.aa,
        re_prob=aug.reprob,
        separate=True,
    )
    crop, *flips = parts[0].transforms
    erasing = parts[2].transforms[2:]  # after timm's own tensor conversion and normalisation
    rest = [*flips, *parts[1].transforms, _Normalise(pre), *erasing]
    if aug.crop_padding == 0:
        return _Chain(pre, [crop, *rest], [crop, *rest])
    padded = [transforms.RandomCrop(pre.input_size[1:], padding=aug.crop_padding), *rest]
    return _Chain(pre, [*_eval_steps(pre)[:-1], *padded], padded)


def _eval_steps(pre: Preprocess) -> list[Any]:
    """[resize, crop, normalise]."""
    steps = _create(pre, is_training=False, crop_pct=pre.crop_pct, crop_mode=pre.crop_mode).transforms
    return [*steps[:-2], _Normalise(pre)]


def _create(pre: Preprocess, **options: Any) -> Any:
    from timm.data import create_transform

    try:
        return create_transform(
            pre.input_size,
            use_prefetcher=False,
            interpolation=pre.interpolation,
            mean=pre.mean,
            std=pre.std,
            **options,
        )
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        if options.get("auto_augment") is None:
            raise
        raise InputError(
            f"aa {options['auto_augment']!r}: timm does not know it; expected such as rand-m9-mstd0.5, original or v0"
        ) from error
