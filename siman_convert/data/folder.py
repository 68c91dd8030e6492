"""Folders of class folders (ImageFolder): class = name of the top folder, images at any depth below it.

Hidden files and folders (a leading dot) are passed over. Links are followed, each real folder once per class, so that
a link that leads back up ends instead of turning round for ever, or bringing in other classes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from siman_convert.data.images import IMAGE_EXTENSIONS, decode, header_size, reason
from siman_convert.data.split import BadImage, Labels, Split, stratified
from siman_convert.errors import InputError, printable

VAL_NAMES = ("val", "validation", "test")


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """`paths` are relative to `root`, sorted; `labels` (N,) are their class indices."""

    root: str
    paths: list[str]
    labels: Labels

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path = os.path.join(self.root, self.paths[index])  # noqa: PTH118  per image: a tenth of pathlib's cost
        try:
            return decode(path), int(self.labels[index])
        except Exception as error:  # Pillow's plug-ins raise whatever broken bytes lead to
            raise BadImage(path, reason(error)) from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def size(self, index: int) -> tuple[int, int]:
        path = os.path.join(self.root, self.paths[index])  # noqa: PTH118
        try:
            return header_size(path)
        except Exception as error:  # as in read
            raise BadImage(path, reason(error)) from error

    def listing(self) -> bytes:
        return b"\0".join(os.fsencode(path) for path in self.paths) + self.labels.tobytes()

    def take(self, name: str, indices: Labels) -> FolderSplit:
        """The split of the given indices only."""
        return FolderSplit(name, self.root, [self.paths[i] for i in indices], self.labels[indices])


def read(root: Path, val_split: float | None, seed: int) -> tuple[tuple[str, ...], FolderSplit, FolderSplit] | None:
    """(classes, train, val), or None when `root` is neither a train/ + val/ folder nor a folder of class folders."""
    shown = printable(str(root))
    val_name = next((name for name in VAL_NAMES if (root / name).is_dir()), None)
    has_train = (root / "train").is_dir()
    if val_name and not has_train and not _holds_images(root):
        raise InputError(f"{shown}: has {val_name}/ but no train/; put the training images in train/")
    if not has_train:
        if not any(_holds_images(Path(entry)) for entry in _subfolders(root)):
            return None
        return _cut(root, val_split, seed, f"{shown}: a folder of classes; {_wanted(root)}")
    if val_name is None:
        return _cut(root / "train", val_split, seed, f"{shown}: has train/ but no {'/, '.join(VAL_NAMES)}/; add one")
    if val_split is not None:
        raise InputError(f"{shown}: has its own {val_name}/; leave out --val-split, or give {shown}/train")
    train_classes, train = scan(root / "train", "train")
    val_classes, val = scan(root / val_name, "val")
    if train_classes != val_classes:
        raise InputError(_difference(shown, val_name, train_classes, val_classes))
    return tuple(printable(name) for name in train_classes), train, val


def _cut(root: Path, val_split: float | None, seed: int, what: str) -> tuple[tuple[str, ...], FolderSplit, FolderSplit]:
    if val_split is None:
        raise InputError(f"{what}, or hold out 10 % of each class for evaluation with --val-split 0.1")
    classes, whole = scan(root, "train")
    train, val = stratified(whole.labels, val_split, seed)
    return tuple(printable(name) for name in classes), whole.take("train", train), whole.take("val", val)


def _wanted(root: Path) -> str:
    """What to do about a folder of classes; something else where the split was named, not the folder that holds both."""
    beside = [name for name in VAL_NAMES if root.name == "train" and (root.parent / name).is_dir()]
    return (
        f"{beside[0]}/ lies beside it: give {printable(str(root.parent))}" if beside else "sort it into train/ and val/"
    )


def _difference(shown: str, val_name: str, train: list[str], val: list[str]) -> str:
    def listed(names: set[str]) -> str:
        few = ", ".join(printable(name) for name in sorted(names)[:3]) or "none"
        return f"{few} and {len(names) - 3} more" if len(names) > 3 else few

    only_train, only_val = set(train) - set(val), set(val) - set(train)
    return (
        f"{shown}: classes differ: only in train/: {listed(only_train)}; only in {val_name}/: {listed(only_val)}; "
        "give both the same class folders"
    )


def scan(root: Path, name: str) -> tuple[list[str], FolderSplit]:
    """(class folder names, all their images); 2 sorts before 10, as in timm. An empty class: InputError."""
    shown = printable(str(root))
    classes = sorted((os.path.basename(path) for path in _subfolders(root)), key=natural_key)  # noqa: PTH119
    if not classes:
        if _holds_images(root):
            raise InputError(f"{shown}: images but no class folders; put each class's images in a folder of its name")
        raise InputError(f"{shown}: no class folders with images in it; expected one folder a class")
    paths: list[str] = []
    counts: list[int] = []
    for class_name in classes:
        found = sorted(_images_below(str(root), class_name))
        if not found:
            raise InputError(
                f"{printable(str(root / class_name))}: class folder without images (.jpg, .png and others)"
                f"{other_kinds(root / class_name)}; fill it or remove it"
            )
        paths += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return classes, FolderSplit(name, str(root), paths, labels)


def _images_below(root: str, relative: str) -> Iterator[str]:
    """Paths relative to `root` of all images under root/relative; no folder is entered twice, and none that this one lies in."""
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(root, relative).resolve().parents)}
    waiting = [relative]
    while waiting:
        folder = waiting.pop()
        inner: list[str] = []
        full = os.path.join(root, folder)  # noqa: PTH118
        try:
            status = os.stat(full)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(full) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    if entry.name.startswith("."):
                        continue
                    if _is_image_name(entry.name):
                        if _is_file(entry):
                            yield f"{folder}/{entry.name}"
                    elif is_folder(entry):
                        inner.append(f"{folder}/{entry.name}")
        except OSError as error:
            raise InputError(f"{printable(full)}: cannot be read ({error.strerror}); check its permissions") from error
        waiting += reversed(inner)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """entry.is_dir(), False for a link that leads round in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS  # noqa: PTH122


def _subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.path for entry in entries if not entry.name.startswith(".") and is_folder(entry))


def _holds_images(root: Path) -> bool:
    """Whether an image lies in the folder itself or up to one level further down."""
    for folder in (str(root), *_subfolders(root)):
        with os.scandir(folder) as entries:
            if any(_is_image_name(entry.name) and not entry.name.startswith(".") for entry in entries):
                return True
    return False


def other_kinds(folder: Path) -> str:
    """ ", but with .heic files" where the folder or its subfolders hold files that are no images, else nothing."""
    kinds: Counter[str] = Counter()
    for place in (str(folder), *_subfolders(folder)):
        with os.scandir(place) as entries:
            kinds.update(
                os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                for entry in islice(entries, 1000)
                if _is_file(entry) and not entry.name.startswith(".") and not _is_image_name(entry.name)
            )
    named = [printable(kind) or "nameless" for kind, _ in kinds.most_common(3)]
    return f", but with {', '.join(named)} files" if named else ""


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key: runs of digits compare as numbers, letters without case, the name itself breaks ties."""
    parts: list[int | str] = [*re.split(r"(\d+)", name.lower())]
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
