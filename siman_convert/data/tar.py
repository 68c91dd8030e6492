"""Uncompressed tar files of images, read in place: class = the folder an image lies in, or the name of an inner tar
(ImageNet's ILSVRC2012_img_train.tar is a tar of tars).

Not timm's tar reader: that keeps the file open over a fork, where all workers then share one file position, and it
caches its index as a pickle beside the data.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siman_convert.data.folder import natural_key
from siman_convert.data.images import IMAGE_EXTENSIONS, decode, header_size, reason
from siman_convert.data.split import BadImage, Labels, Split, stratified
from siman_convert.errors import InputError, printable

VAL_TARS = ("val.tar", "validation.tar", "test.tar")
Parts = tuple[tuple[str, ...], "TarSplit", "TarSplit"]


@dataclass(frozen=True, eq=False)
class TarSplit(Split):
    """`spans` int64 (N, 2): offset and length in bytes of each image in the file `path`."""

    path: str
    members: list[str]
    spans: NDArray[np.int64]
    labels: Labels

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            return decode(self._bytes(index)), int(self.labels[index])
        except Exception as error:  # Pillow's plug-ins raise whatever broken bytes lead to
            raise BadImage(f"{self.path}:{self.members[index]}", reason(error)) from error

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def size(self, index: int) -> tuple[int, int]:
        try:
            return header_size(self._bytes(index))
        except Exception as error:  # as in read
            raise BadImage(f"{self.path}:{self.members[index]}", reason(error)) from error

    def _bytes(self, index: int) -> io.BytesIO:
        offset, length = (int(n) for n in self.spans[index])
        with Path(self.path).open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(length))

    def listing(self) -> bytes:
        return "\0".join(self.members).encode("utf-8", "surrogateescape") + self.labels.tobytes()

    def take(self, name: str, indices: Labels) -> TarSplit:
        """The split of the given indices only."""
        members = [self.members[i] for i in indices]
        return TarSplit(name, self.path, members, self.spans[indices], self.labels[indices])


def read_folder(folder: Path) -> Parts | None:
    """(classes, train, val) of a folder with train.tar and val.tar (validation.tar, test.tar); None without those."""
    val_name = next((name for name in VAL_TARS if (folder / name).is_file()), None)
    if val_name is None or not (folder / "train.tar").is_file():
        return None
    classes, train = scan(folder / "train.tar", "train")
    val_classes, val = scan(folder / val_name, "val")
    if classes != val_classes:
        differing = sorted(set(classes) ^ set(val_classes))[:3]
        raise InputError(
            f"{printable(str(folder))}: classes differ between train.tar and {val_name}, such as "
            f"{', '.join(differing)}; give both the same class folders"
        )
    return classes, train, val


def read_file(path: Path, val_split: float | None, seed: int) -> Parts:
    """(classes, train, val) cut from one tar file; without `val_split` an InputError that proposes it."""
    if val_split is None:
        raise InputError(
            f"{printable(str(path))}: one tar file holds no val split; add --val-split 0.1, "
            "or give a folder with train.tar and val.tar"
        )
    classes, whole = scan(path, "train")
    train, val = stratified(whole.labels, val_split, seed)
    return classes, whole.take("train", train), whole.take("val", val)


def scan(path: Path, name: str) -> tuple[tuple[str, ...], TarSplit]:
    """(class names, all images of the tar sorted by member name); damaged, compressed or without images: InputError."""
    shown = printable(str(path))
    try:
        with tarfile.open(path, mode="r:") as archive:
            found = sorted(_images(archive, None, 0))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{shown}: not a readable, uncompressed tar file ({error}); make it again") from error
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror}); check the file") from error
    if not found:
        raise InputError(f"{shown}: no images in class folders in it; expected CLASS/IMAGE.jpg or inner CLASS.tar")
    names = sorted({label for _, label, _, _ in found}, key=natural_key)
    numbers = {label: i for i, label in enumerate(names)}
    spans = np.array([(offset, length) for _, _, offset, length in found], dtype=np.int64)
    labels = np.array([numbers[label] for _, label, _, _ in found], dtype=np.int64)
    split = TarSplit(name, str(path), [member for member, _, _, _ in found], spans, labels)
    return tuple(printable(label) for label in names), split


def _images(archive: tarfile.TarFile, label: str | None, start: int) -> Iterator[tuple[str, str, int, int]]:
    """(member, class, offset, length) of each image; `label` and `start` are those of an inner tar."""
    for info in archive:
        member = PurePosixPath(info.name)
        if not info.isreg() or info.issparse() or member.name.startswith("."):
            continue
        ending = member.suffix.lower()
        class_name = label or member.parent.name
        if ending in IMAGE_EXTENSIONS and class_name:
            yield f"{label}/{info.name}" if label else info.name, class_name, start + info.offset_data, info.size
        elif ending == ".tar" and label is None and (inner := archive.extractfile(info)) is not None:
            with inner, tarfile.open(fileobj=inner, mode="r:") as inner_archive:
                yield from _images(inner_archive, member.stem, info.offset_data)
