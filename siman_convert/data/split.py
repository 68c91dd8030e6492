"""A split is one half of a data set (train or val): images by index, or images as they come (a stream).

Every image leaves a split as a decoded PIL image of mode L or RGB together with its class index; an image that
cannot be read raises BadImage, and the loader decides what follows from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siman_convert.errors import InputError, SimanError, printable

Labels = NDArray[np.int64]  # (N,) class indices


class BadImage(SimanError):  # noqa: N818  a fact about a file, which the loader counts; rarely an error of the run
    """One image that cannot be read: its path (printable) and why."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path = printable(path)
        self.why = why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True, eq=False)
class Split(ABC):
    """One map-style split. `name` is "train" or "val"; indices run from 0 to len - 1."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image (mode L or RGB) and its class index; raises BadImage."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The class index, without decoding the image where the format allows it."""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, from the file's header where the format allows it; raises BadImage."""
        image, _ = self.read(index)
        return image.height, image.width

    def listing(self) -> bytes:
        """What tells, without reading images, that another opening of the data gives the same ones in the same order."""
        return str(len(self)).encode()


@dataclass(frozen=True, eq=False)
class ArraySplit(Split):
    """Images of one size held in memory: `images` uint8 (N, H, W) grey or (N, H, W, 3) RGB, `labels` (N,)."""

    images: NDArray[np.uint8]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def size(self, index: int) -> tuple[int, int]:  # noqa: ARG002  all are of one size
        return int(self.images.shape[1]), int(self.images.shape[2])

    def listing(self) -> bytes:
        return self.labels.tobytes()


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """A split without random access (wds, tfds, hfids) and its declared sample count.

    `make(seed)` opens a fresh timm IterableImageDataset. A fresh one for each pass: timm's readers keep their place in
    the shuffle, and the number of workers they first ran with. They shard over ranks and workers by themselves and skip
    images they cannot read without telling.
    """

    name: str
    make: Callable[[int], Any]
    samples: int

    def __len__(self) -> int:
        return self.samples

    def listing(self) -> bytes:
        """As Split's."""
        return str(self.samples).encode()

    def open(
        self, *, seed: int = 0, batch_size: int = 1, workers: int = 0, rank: int = 0, world: int = 1
    ) -> Iterable[tuple[Image.Image, int]]:
        """The samples of one pass, shuffled by `seed` if it is a train split; to be iterated in the loader's workers.

        timm's reader must know the loader's shape: it rounds a training pass up to full batches of each worker. With a `world`
        above 1 it repeats and leaves out samples to give each rank equally many, which is for training alone.
        """
        dataset = self.make(seed & 0x7FFFFFFF)
        dataset.reader.batch_size = batch_size
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world
        dataset.set_loader_cfg(num_workers=workers)
        opened: Iterable[tuple[Image.Image, int]] = dataset
        return opened


AnySplit = Split | StreamSplit


def stratified(labels: Labels, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut indices 0..N-1 into (train, val), both ascending; val takes `fraction` of every class, rounded.

    A class of two or more images keeps at least one on each side; a class of one image stays in train.
    The same labels, fraction and seed give the same cut on every machine (numpy's PCG64 stream is fixed).
    """
    if not 0.0 < fraction < 1.0:
        raise InputError(f"--val-split {fraction}: expected a share between 0 and 1, such as 0.1")
    generator = np.random.Generator(np.random.PCG64(seed))
    in_val = np.zeros(len(labels), dtype=bool)
    by_class = np.argsort(labels, kind="stable")
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        if len(members) > 1:
            count = min(max(round(fraction * len(members)), 1), len(members) - 1)
            in_val[members[generator.random(len(members)).argsort(kind="stable")[:count]]] = True
    if not in_val.any():
        raise InputError("--val-split: every class has a single image, nothing is left to hold out; add images")
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)
