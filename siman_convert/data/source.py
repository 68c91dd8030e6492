"""Open the data a user names: recognise what it is, check it, and hand back its two splits.

Recognised: "digits"; hfds/, hfids/, tfds/, wds/, torch/ names (timm's dataset factory); a folder with train/ and val/
(or validation/, test/) or, with a validation share, of class folders; the MNIST family's IDX files; CIFAR-10/100 python
batches; tar files. Whatever is wrong with it is one InputError of one line.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from siman_convert.data import cifar, digits, folder, idx, tar, timm_source
from siman_convert.data.split import AnySplit, BadImage, Split, StreamSplit
from siman_convert.errors import InputError, printable
from siman_convert.names import DATA_NAMES, existing_data, opened_by_timm

_PROBED = 48  # images looked at for the median size
_LOOKED_FOR = (
    "train/ and val/ (or validation/, test/) with class folders, class folders with --val-split, IDX files "
    "(train-images-idx3-ubyte[.gz]), CIFAR python batches (data_batch_1.. or train, test, meta), train.tar and val.tar"
)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set with its two splits.

    kind: "imagefolder", "idx", "cifar", "digits", "tar" or "timm". name: short, safe in file names. spec: what was
    given, as an absolute path if a path: `open_source(source.spec)` opens the same again. classes: names by index.
    image_size: median (height, width) in pixels of a few dozen images spread over the train split.
    """

    kind: str
    name: str
    spec: str
    classes: tuple[str, ...]
    train: AnySplit
    val: AnySplit
    image_size: tuple[int, int]

    def digest(self) -> str:
        """SHA-256 of the lists of images and their labels, not of pixels: equal where training would take the same images."""
        parts = (hashlib.sha256(split.listing()).digest() for split in (self.train, self.val))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def open_source(spec: str, *, val_split: float | None = None, seed: int = 0) -> Source:
    """Recognise and open `spec`. `val_split`: share of each class to hold out where the data has no val split;
    `seed` draws it. Raises InputError for anything that is not usable as it is."""
    if spec == "digits":
        _refuse_val_split(spec, val_split)
        ten, grey, held_out = digits.read()
        return Source("digits", "digits", spec, ten, grey, held_out, _median_size(grey, spec))
    if opened_by_timm(spec):
        names, first, second, probe = timm_source.read(spec, val_split, seed)
        _require_some(spec, names, first, second)
        return Source("timm", safe_name(spec), spec, names, first, second, _median_size(probe or first, spec))
    path = existing_data(spec)
    try:
        kind, name, classes, train, val = _open_path(path, val_split, seed)
    except OSError as error:
        raise InputError(f"{printable(str(path))}: cannot be read ({error.strerror}); check permissions") from error
    _require_some(printable(str(path)), classes, train, val)
    return Source(kind, name or safe_name(str(path)), str(path), classes, train, val, _median_size(train, str(path)))


Opened = tuple[str, str, tuple[str, ...], Split, Split]  # kind, name ("" for the path's own), classes, train, val


def _open_path(path: Path, val_split: float | None, seed: int) -> Opened:
    shown = printable(str(path))
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return "tar", safe_name(path.stem), *tar.read_file(path, val_split, seed)
        if idx.is_train_images(path):
            _refuse_val_split(shown, val_split)
            prefix = idx.prefix_of(path)
            return "idx", safe_name(prefix or path.parent.name), *idx.read(path.parent, prefix)
        raise InputError(f"{shown}: a file of unknown kind; expected a folder, .tar, or train-images-idx3-ubyte[.gz]")
    if not path.is_dir():
        raise InputError(f"{shown}: neither a file nor a folder; expected a folder of images, or {DATA_NAMES}")
    if batches := cifar.find(path):
        _refuse_val_split(shown, val_split)
        return "cifar", *cifar.read(batches)
    for place in (path, path / "raw"):  # torchvision keeps its IDX files in raw/
        if place.is_dir() and (prefixes := idx.prefixes([file.name for file in place.iterdir()])):
            _refuse_val_split(shown, val_split)
            return "idx", "", *idx.read(place, _only(prefixes, shown))
    if tars := tar.read_folder(path):
        _refuse_val_split(shown, val_split)
        return "tar", "", *tars
    if folders := folder.read(path, val_split, seed):
        return "imagefolder", "", *folders
    raise InputError(f"{shown}: no data set recognised: looked for {_LOOKED_FOR}; found {_found(path)}"
                     f"{folder.other_kinds(path)}")  # fmt: skip


def _refuse_val_split(shown: str, val_split: float | None) -> None:
    if val_split is not None:
        raise InputError(f"{shown}: has its own validation split; leave out --val-split")


def _only(prefixes: list[str], shown: str) -> str:
    if len(prefixes) > 1:
        listed = ", ".join(printable(prefix) + "train-images..." for prefix in prefixes[:6])
        raise InputError(f"{shown}: several IDX data sets ({listed}); give the path of one train-images file")
    return prefixes[0]


def _found(path: Path) -> str:
    """A folder's contents in a few words."""
    with os.scandir(path) as entries:
        kinds = sorted((entry.name, folder.is_folder(entry)) for entry in entries)
    if not kinds:
        return "an empty folder"
    parts = []
    for what, names in (
        ("folder", [name for name, is_dir in kinds if is_dir]),
        ("file", [name for name, is_dir in kinds if not is_dir]),
    ):
        if names:
            listed = ", ".join(printable(name) for name in names[:4]) + (", ..." if len(names) > 4 else "")
            parts.append(f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({listed})")
    return " and ".join(parts)


def _require_some(shown: str, classes: tuple[str, ...], train: AnySplit, val: AnySplit) -> None:
    for name, split in (("train", train), ("validation", val)):
        if len(split) == 0:
            raise InputError(f"{shown}: no images in its {name} split; expected at least one")
    if len(classes) < 2:
        raise InputError(f"{shown}: one class only ({', '.join(classes)}); expected two or more to tell apart")


def _median_size(split: AnySplit, shown: str) -> tuple[int, int]:
    """Median (height, width) of up to 48 images; those that cannot be read are left out."""
    sizes: list[tuple[int, int]] = []
    first_bad: BadImage | None = None
    if isinstance(split, StreamSplit):
        sizes = [(image.height, image.width) for image, _ in islice(split.open(), _PROBED)]
    else:
        for index in np.unique(np.linspace(0, len(split) - 1, _PROBED).round().astype(int)):
            try:
                sizes.append(split.size(int(index)))
            except BadImage as bad:
                first_bad = first_bad or bad
    if not sizes:
        raise InputError(f"{printable(shown)}: no image of those looked at can be read; the first: {first_bad}")
    height, width = np.median(np.array(sizes), axis=0)
    return round(float(height)), round(float(width))


def safe_name(spec: str) -> str:
    """The last part of a path or data set name with only letters, digits, dot, dash and underscore; at most 64."""
    last = re.split(r"[/\\:]", spec.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:64] or "data"
