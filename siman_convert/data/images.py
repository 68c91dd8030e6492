"""Decode one image file to mode L or RGB, whatever is in it, and say in a few words why it cannot be done.

EXIF orientation is not applied and of animations the first frame is taken, both as timm does.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from siman_convert.errors import InputError, printable

IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)


def decode(file: BinaryIO | str) -> Image.Image:
    """Decode to a loaded image of mode L or RGB.

    Raises whatever Pillow raises on broken input; Image.MAX_IMAGE_PIXELS protects (an error above twice that size).
    Pillow's warnings (large image, odd EXIF) are silenced: an image either decodes or it does not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            image.load()
            return to_grey_or_rgb(image)


def decode_image(path: Path) -> Image.Image:
    """The image in a file, mode L or RGB; InputError where there is none."""
    try:
        return decode(str(path))
    except Exception as error:  # Pillow's decoders raise anything
        raise InputError(f"{printable(str(path))}: {reason(error)}; expected an image file") from error


def header_size(file: BinaryIO | str) -> tuple[int, int]:
    """(height, width) from the header alone; raises as `decode`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            return image.height, image.width


def to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Any mode to L or RGB: 16-bit grey loses its low byte, transparency is dropped (as PIL's convert does)."""
    if image.mode in ("L", "RGB"):
        return image  # its pixels are loaded: closing the file leaves them
    if image.mode.startswith("I"):  # I;16, I;16B, and I as older Pillow opens 16-bit PNG
        values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("1", "F", "LA", "La"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # straight to RGB warns about transparency given as bytes
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image was refused: the error's first line, or its type where it says nothing; paths left out."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can identify"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return printable(text.splitlines()[0]) if text else type(error).__name__
