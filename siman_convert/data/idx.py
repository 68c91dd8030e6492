"""The MNIST family's IDX files, plain or gzip: train-images-idx3-ubyte and its three companions.

An IDX file is: two zero bytes, a type (0x08 = uint8), the number of dimensions, each dimension as big-endian uint32,
then the values. Sizes a header declares are checked against the file's size before anything is allocated; a gzip
stream is read up to the declared size and one byte further, never to its own end.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from siman_convert.data.split import ArraySplit, Labels
from siman_convert.errors import InputError, printable

_TRAIN_IMAGES = re.compile(r"(?P<prefix>(?:.+-)?)train-images(?P<dot>[-.])idx3-ubyte(?:\.gz)?", re.DOTALL)
_DEFLATE_MAX_RATIO = 1032  # deflate cannot expand further than this
_MAX_UNPACKED = 1 << 31  # of a gzip file; EMNIST, the largest of the family, takes 547 MB
_CHUNK = 1 << 20


def is_train_images(path: Path) -> bool:
    """Whether the file name is that of IDX training images, such as emnist-letters-train-images-idx3-ubyte.gz."""
    return _TRAIN_IMAGES.fullmatch(path.name) is not None


def prefixes(names: list[str]) -> list[str]:
    """The data sets in a folder, by what stands before "train-images": "" for MNIST, "emnist-letters-" and so on."""
    return sorted({match["prefix"] for name in names if (match := _TRAIN_IMAGES.fullmatch(name))})


def prefix_of(path: Path) -> str:
    """What stands before "train-images" in the file's name."""
    match = _TRAIN_IMAGES.fullmatch(path.name)
    return match["prefix"] if match else ""


def read(folder: Path, prefix: str) -> tuple[tuple[str, ...], ArraySplit, ArraySplit]:
    """(classes "0".."N-1", train, val) of the data set `prefix` in `folder`; N - 1 is the largest training label."""
    train = _read_split(folder, "train", [f"{prefix}train"])
    val = _read_split(folder, "val", [f"{prefix}t10k", f"{prefix}test"])
    classes = int(train.labels.max()) + 1
    if int(val.labels.max()) >= classes:
        raise InputError(
            f"{printable(str(folder))}: a test label is {val.labels.max()}, training labels end at {classes - 1}; "
            "the label files do not belong together"
        )
    if train.images.shape[1:] != val.images.shape[1:]:
        sizes = [f"{split.images.shape[1]}x{split.images.shape[2]}" for split in (train, val)]
        raise InputError(
            f"{printable(str(folder))}: training images are {sizes[0]}, test images {sizes[1]}; expected one size"
        )
    return tuple(str(i) for i in range(classes)), train, val


def _read_split(folder: Path, name: str, stems: list[str]) -> ArraySplit:
    images_path = _find(folder, stems, "images", 3)
    labels_path = _find(folder, stems, "labels", 1)
    images = read_array(images_path, dimensions=3)
    labels: Labels = read_array(labels_path, dimensions=1).astype(np.int64)
    if len(images) != len(labels):
        raise InputError(
            f"{printable(str(images_path))}: {len(images)} images, but {len(labels)} labels in "
            f"{printable(labels_path.name)}; expected equally many"
        )
    if images.size == 0:
        raise InputError(f"{printable(str(images_path))}: no images in it; expected at least one")
    return ArraySplit(name, images, labels)


def _find(folder: Path, stems: list[str], what: str, dimensions: int) -> Path:
    names = [
        f"{stem}-{what}{dot}idx{dimensions}-ubyte{ending}" for stem in stems for dot in "-." for ending in ("", ".gz")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{printable(str(folder))}: IDX file {printable(names[0])}[.gz] is missing; put it there")


def read_array(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """The uint8 array in an IDX file, plain or gzip (told by its first bytes); anything wrong is an InputError."""
    name = printable(str(path))
    try:
        stored = path.stat().st_size
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                with gzip.open(file) as stream:
                    limit = min(stored * _DEFLATE_MAX_RATIO, _MAX_UNPACKED)
                    return _parse(cast(BinaryIO, stream), dimensions, name, limit, exact=False)
            file.seek(0)
            return _parse(file, dimensions, name, stored, exact=True)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name}: the gzip stream is damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the file") from error


def _parse(file: BinaryIO, dimensions: int, name: str, limit: int, *, exact: bool) -> NDArray[np.uint8]:
    """`limit` is the most bytes the file can hold; `exact` when it is the very number."""
    header = _read_up_to(file.read, 4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, 8, dimensions)):
        raise InputError(
            f"{name}: not an IDX file of {dimensions} dimension(s) of bytes: it begins with "
            f"{header[:4].hex(' ') or 'nothing'}, expected 00 00 08 {dimensions:02x}; fetch the file again"
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    declared = math.prod(shape)
    total = declared + len(header)
    if total > limit or (exact and total != limit):
        size = f"{limit} bytes long" if exact else f"too short for that when unpacked (at most {limit} bytes)"
        raise InputError(
            f"{name}: its header declares {' x '.join(map(str, shape))} values, {total} bytes with the header, "
            f"but the file is {size}; fetch the file again"
        )
    values = _read_up_to(file.read, declared)
    if len(values) < declared:
        raise InputError(f"{name}: ends after {len(values)} of {declared} values; fetch the file again")
    if file.read(1):
        raise InputError(f"{name}: goes on after the {declared} values its header declares; fetch the file again")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_up_to(read: Callable[[int], bytes], count: int) -> bytearray:
    """Read `count` bytes, or fewer at the end of the file, holding no more than what came."""
    held = bytearray()
    while len(held) < count and (chunk := read(min(_CHUNK, count - len(held)))):
        held += chunk
    return held
