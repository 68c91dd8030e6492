"""Data sets that timm's dataset factory opens: hfds/NAME, torch/NAME:FOLDER by index; wds/FOLDER, tfds/NAME, hfids/NAME
as streams. timm's readers are used below its ImageDataset, which hides unreadable images by taking the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from siman_convert.data.images import decode, header_size, reason, to_grey_or_rgb
from siman_convert.data.split import AnySplit, BadImage, Labels, Split, StreamSplit, stratified
from siman_convert.errors import InputError, printable

_PACKAGES = {  # prefix: module and pip packages it needs
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
_STREAMS = ("wds", "tfds", "hfids")
_VAL_NAMES = ("validation", "val", "test")
_CLASS_FILE = "classes.txt"


@dataclass(frozen=True, eq=False)
class ReaderSplit(Split):
    """A timm reader: reader[i] gives (open image file, class index). `indices` maps 0..len-1 to its own."""

    reader: Any
    indices: Labels
    spec: str

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, target, *_ = self.reader[int(self.indices[index])]
            with file:
                return decode(file), int(target)
        except Exception as error:  # reader or Pillow: whatever broken bytes lead to
            raise self._bad(index, error) from error

    def label(self, index: int) -> int:
        file, target, *_ = self.reader[int(self.indices[index])]
        file.close()
        return int(target)

    def size(self, index: int) -> tuple[int, int]:
        try:
            file, *_ = self.reader[int(self.indices[index])]
            with file:
                return header_size(file)
        except Exception as error:  # as in read
            raise self._bad(index, error) from error

    def _bad(self, index: int, error: Exception) -> BadImage:
        return BadImage(f"{self.spec}:{self.name}[{index}]", reason(error))


@dataclass(frozen=True, eq=False)
class TorchvisionSplit(Split):
    """A torchvision data set: dataset[i] gives (PIL image, class index)."""

    dataset: Any
    spec: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, target = self.dataset[index]
            return to_grey_or_rgb(image), int(target)
        except Exception as error:  # as in ReaderSplit
            raise BadImage(f"{self.spec}:{self.name}[{index}]", reason(error)) from error

    def label(self, index: int) -> int:
        return int(self.dataset[index][1])


def read(
    spec: str, val_split: float | None, seed: int
) -> tuple[tuple[str, ...], AnySplit, AnySplit, StreamSplit | None]:
    """(class names, train, val, probe); `probe` is a stream to look at a few images with, None for map-style data."""
    prefix, _, rest = spec.partition("/")
    module, packages = _PACKAGES[prefix]
    if find_spec(module) is None:
        raise InputError(f"{spec}: needs a package that is not installed: pip install {packages}")
    if not rest.strip("/"):
        raise InputError(f"{spec}: names no data set; expected {prefix}/NAME")
    if prefix in _STREAMS:
        if val_split is not None:
            raise InputError(f"{spec}: a stream cannot be split; leave out --val-split and give it a validation split")
        return _read_stream(spec, prefix, rest)
    if prefix == "torch":
        if val_split is not None:
            raise InputError(f"{spec}: has its own validation split; leave out --val-split")
        return (*_read_torchvision(spec), None)
    return (*_read_hfds(spec, val_split, seed), None)


def _create(spec: str, name: str, **options: Any) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(name, **options)
    except Exception as error:  # three libraries, the network and their own errors behind one call
        first = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise InputError(f"{spec}: split {options.get('split')!r} cannot be opened: {first}") from error


def _first_split(spec: str, name: str, **options: Any) -> tuple[str, Any]:
    """The validation data under the first of its usual names that opens, and that name."""
    failures = []
    for split in _VAL_NAMES:
        try:
            return split, _create(spec, name, split=split, **options)
        except InputError as error:
            failures.append(error)
    raise failures[0]


def _read_hfds(spec: str, val_split: float | None, seed: int) -> tuple[tuple[str, ...], Split, Split]:
    train = _create(spec, spec, split="train").reader
    whole = ReaderSplit("train", train, np.arange(len(train)), spec)
    if val_split is not None:
        cut = stratified(_targets(train), val_split, seed)
        val = ReaderSplit("val", train, cut[1], spec)
        return _class_names(train, spec), ReaderSplit("train", train, cut[0], spec), val
    try:
        other = _first_split(spec, spec)[1].reader
    except InputError as error:
        raise InputError(f"{error}; if it has only a train split, add --val-split 0.1") from error
    names = _class_names(train, spec)
    if names != (other_names := _class_names(other, spec)):
        raise InputError(f"{spec}: {len(names)} classes in train, {len(other_names)} in validation; expected the same")
    return names, whole, ReaderSplit("val", other, np.arange(len(other)), spec)


def _targets(reader: Any) -> Labels:
    """All labels of a timm reader, without decoding images."""
    values = reader.iter_targets() if hasattr(reader, "iter_targets") else (reader[i][1] for i in range(len(reader)))
    return np.fromiter((int(value) for value in values), dtype=np.int64, count=len(reader))


def _class_names(reader: Any, spec: str) -> tuple[str, ...]:
    """Names in index order; where the data set has none, "0".."N-1" from its labels."""
    if reader.class_to_idx:
        return tuple(printable(str(name)) for name in sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    labels = _targets(reader)
    if len(labels) == 0 or labels.min() < 0:
        raise InputError(f"{spec}: labels are missing or negative; expected class indices from 0")
    return tuple(str(i) for i in range(int(labels.max()) + 1))


def _read_torchvision(spec: str) -> tuple[tuple[str, ...], Split, Split]:
    name, _, root = spec.partition(":")
    root = str(Path(root or ".").expanduser())
    try:
        train = _create(spec, name, root=root, split="train")
        val = _create(spec, name, root=root, split="val")
    except InputError as error:
        raise InputError(f"{error}; give the folder it lies in as {name}:FOLDER") from error
    names: Sequence[str] = getattr(train, "classes", ())
    if not names:
        raise InputError(f"{spec}: torchvision names no classes for it; give its files as an image folder instead")
    return tuple(str(c) for c in names), TorchvisionSplit("train", train, spec), TorchvisionSplit("val", val, spec)


def _read_stream(spec: str, prefix: str, rest: str) -> tuple[tuple[str, ...], StreamSplit, StreamSplit, StreamSplit]:
    options: dict[str, Any] = {}
    if prefix == "wds":
        options["root"] = str(Path(rest).expanduser().absolute())  # webdataset takes what begins as a URL for one
        if not Path(options["root"]).is_dir():
            raise InputError(f"{spec}: no such folder: {rest}; expected wds/FOLDER with shards and _info.json")
    train = _create(spec, spec, split="train", is_training=True, **options)
    val_name, val = _first_split(spec, spec, is_training=False, **options)
    if prefix == "wds":
        for dataset in (train, val):
            _require_inside(spec, dataset.reader)
    classes = _stream_classes(spec, train.reader, options.get("root"))
    counts = [_declared(spec, dataset.reader) for dataset in (train, val)]
    in_order = partial(_reopen, spec, is_training=False, **options)
    shuffled = partial(_reopen, spec, is_training=True, split="train", **options)
    return (
        classes,
        StreamSplit("train", shuffled, counts[0]),
        StreamSplit("val", partial(in_order, split=val_name), counts[1]),
        StreamSplit("probe", partial(in_order, split="train"), counts[0]),
    )


def _require_inside(spec: str, reader: Any) -> None:
    """InputError for a shard that _info.json has outside its folder."""
    shards = getattr(getattr(reader, "split_info", None), "filenames", ())
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise InputError(
                f"{spec}: its _info.json names {printable(shard)}, outside the folder; expected files in it"
            )


def _reopen(spec: str, seed: int, **options: Any) -> Any:
    return _create(spec, spec, seed=seed, **options)


def _declared(spec: str, reader: Any) -> int:
    if not reader.num_samples:
        raise InputError(f"{spec}: does not declare how many samples it has; expected num_samples in _info.json")
    return int(reader.num_samples)


def _stream_classes(spec: str, reader: Any, root: str | None) -> tuple[str, ...]:
    if reader.class_to_idx:
        return tuple(printable(str(name)) for name in sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
    path = Path(root or ".") / _CLASS_FILE
    if root is None or not path.is_file():
        raise InputError(f"{spec}: names no classes; put {_CLASS_FILE}, one name a line in index order, in its folder")
    return tuple(line.strip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip())
