"""From a PIL image to the model's input: sizes, crops and normalisation as timm's data config of the model has them.

`Preprocess` is what evaluation and the exported file need; `Augment` is what training adds, under timm's names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from siman_convert.errors import InputError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
_LARGEST_SIDE = 16384  # a size in a damaged file must not exhaust the memory
_STRIDE = 32  # the usual total stride of a CNN
_DEFAULT_INPUT = (3, 224, 224)

Transform = Callable[[Image.Image], Tensor]  # to float32 (C, H, W), or uint8 (H, W, C) by pixel_transform


@dataclass(frozen=True)
class Preprocess:
    """input_size (C, H, W) in pixels; C = 3 takes RGB, 1 grey. mean and std per channel, of pixels scaled to 0..1.

    crop_pct: share of the resized image's side that the central crop keeps. pad_to_size: an image that fits into the
    input is centred on black instead of resized.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    pad_to_size: bool = False

    def __post_init__(self) -> None:
        channels, *sides = self.input_size
        if channels not in (1, 3) or not 1 <= min(sides) <= max(sides) <= _LARGEST_SIDE:
            expected = f"1 or 3 channels and sides of 1 to {_LARGEST_SIDE} pixels"
            raise InputError(f"input size {self.input_size}: expected {expected}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise InputError(f"{name} has {len(values)} values: expected one for each of {channels} channel(s)")
        if min(self.std) <= 0:
            raise InputError(f"std {self.std}: expected values above 0")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct {self.crop_pct}: expected a share above 0, at most 1")
        _require_one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _require_one_of("crop_mode", self.crop_mode, CROP_MODES)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; missing, unknown or mistyped entries are an InputError."""
        names = {field.name for field in dataclasses.fields(cls)}
        required = names - {"pad_to_size"}
        if not required <= set(values) <= names:
            wrong = ", ".join(sorted((required - set(values)) | (set(values) - names)))
            raise InputError(f"preprocessing: missing or unknown entries: {wrong}; expected {', '.join(sorted(names))}")
        try:
            channels, height, width = (int(n) for n in values["input_size"])
            return cls(
                input_size=(channels, height, width),
                interpolation=str(values["interpolation"]),
                mean=tuple(float(v) for v in values["mean"]),
                std=tuple(float(v) for v in values["std"]),
                crop_pct=float(values["crop_pct"]),
                crop_mode=str(values["crop_mode"]),
                pad_to_size=bool(values.get("pad_to_size", False)),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"preprocessing: an entry of the wrong type ({error})") from error


@dataclass(frozen=True)
class Augment:
    """Training augmentation. scale (area shares) and ratio: the random resized crop. crop_padding above 0: instead,
    a random crop of the input size out of the image padded by so many black pixels (CIFAR's protocol)."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    no_aug: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name)}: expected a probability from 0 to 1")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise InputError(f"{name} {low} {high}: expected two values above 0, the smaller first")
        if self.scale[1] > 1:
            raise InputError(f"scale {self.scale[1]}: expected shares of the image's area, at most 1")
        if self.color_jitter < 0 or self.crop_padding < 0:
            raise InputError("color_jitter and crop_padding: expected 0 or more")


def resolve_preprocess(
    model_or_pretrained_cfg: nn.Module | Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    pad_to_size: bool = False,
) -> tuple[Preprocess, str | None]:
    """timm's data config of the model (or of its pretrained_cfg), for images of median `image_size` (height, width).

    Images of which both sides are under half the model's input are "small". For small images, where `img_size` is
    None and the model's input is not fixed: the input becomes the multiple of 32 nearest their shorter side (at least
    32; a tie goes up), and the second item is a sentence that says so (else None). For small images crop_pct becomes
    1.0 unless given: a small image should not be resized up and then cropped.
    """
    from timm.data import resolve_data_config

    cfg = _pretrained_cfg(model_or_pretrained_cfg)
    given = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    channels, height, width = (int(n) for n in cfg.get("input_size") or _DEFAULT_INPUT)
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) not in (1, channels):  # type: ignore[arg-type]
            raise InputError(f"--{name}: expected 1 or {channels} values, got {len(given[name])}")  # type: ignore[arg-type]
    config = resolve_data_config({k: v for k, v in given.items() if v is not None}, pretrained_cfg=cfg)
    small = 2 * max(image_size) < min(height, width)
    note = None
    if img_size is not None:
        if img_size < 1:
            raise InputError(f"--img-size {img_size}: expected a number of pixels, such as 224")
        height = width = img_size
    elif small and not cfg.get("fixed_input_size"):
        side = max((min(image_size) + _STRIDE // 2) // _STRIDE, 1) * _STRIDE
        note = (
            f"The images are {image_size[0]}x{image_size[1]}, under half the model's input of {height}x{width}: "
            f"using {side}x{side} (--img-size {max(height, width)} for the model's own)."
        )
        height = width = side
    return Preprocess(
        input_size=(channels, height, width),
        interpolation=config["interpolation"],
        mean=_per_channel(config["mean"], channels),
        std=_per_channel(config["std"], channels),
        crop_pct=1.0 if small and crop_pct is None else float(config["crop_pct"] if crop_pct is None else crop_pct),
        crop_mode=config["crop_mode"],
        pad_to_size=pad_to_size,
    ), note


def _pretrained_cfg(source: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    cfg: Any = getattr(source, "pretrained_cfg", None) or {} if isinstance(source, nn.Module) else source
    cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    return cfg or {"input_size": _DEFAULT_INPUT}


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """timm's defaults have three values; a grey model takes their average."""
    if channels == 1 and len(values) != 1:
        return (sum(values) / len(values),)
    return tuple(float(v) for v in values)


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} {value!r}: expected one of {', '.join(known)}")
