"""Bytes of small data files, and splits that live in memory."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from siman_convert.data.split import BadImage, Split
from siman_convert.errors import InputError


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def ramp_split(count: int, bad: tuple[int, ...] = (), size: int = 16) -> "RampSplit":
    """Sample i is a random image drawn from i, labelled i; indices in `bad` raise BadImage."""
    return RampSplit("train", count, bad, size)


@dataclass(frozen=True, eq=False)
class RampSplit(Split):
    count: int
    bad: tuple[int, ...]
    side: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, int]:
        if index in self.bad:
            raise BadImage(f"image-{index}", "broken on purpose")
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side), dtype=np.uint8)
        return Image.fromarray(pixels), index

    def label(self, index: int) -> int:
        return index


def attempt(call: Callable[[], Any], kind: type[Exception] = InputError) -> Any:
    """What the call returns, or the error of that kind; any other error goes on."""
    try:
        return call()
    except kind as error:
        return error
