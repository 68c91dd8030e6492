"""CIFAR-10 and CIFAR-100 python batches. They are pickles, so they are read by an unpickler that can build nothing
but plain containers, text, bytes and arrays of bytes: the arrays are rebuilt from inert stand-ins here, never by
numpy's own unpickling, and every other global is refused by name.

The pure-Python unpickler is used on purpose: the C one allocates its memo table from an index in the file. Operations
that no CIFAR file needs are refused; what the others make of a file is bounded by its size.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from siman_convert.data.split import ArraySplit, Labels
from siman_convert.errors import InputError, printable

_CIFAR10_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_FOLDERS = ("", "cifar-10-batches-py", "cifar-100-python")
_MAX_BYTES = 1 << 29  # the largest file, CIFAR-100's train, has 155 MB


def find(folder: Path) -> Path | None:
    """The folder with the batches: the given one or its cifar-10-batches-py / cifar-100-python; None if neither."""
    for name in _FOLDERS:
        candidate = folder / name if name else folder
        if _is_cifar10(candidate) or _is_cifar100(candidate):
            return candidate
    return None


def _is_cifar10(folder: Path) -> bool:
    return (folder / "data_batch_1").is_file() or (folder / "batches.meta").is_file()


def _is_cifar100(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("train", "test", "meta"))


def read(folder: Path) -> tuple[str, tuple[str, ...], ArraySplit, ArraySplit]:
    """("cifar10" | "cifar100", class names, train, val); images uint8 (N, 32, 32, 3), fine labels for CIFAR-100."""
    if _is_cifar10(folder):
        name, meta, names_key, labels_key = "cifar10", "batches.meta", "label_names", "labels"
        train_files, val_file = _CIFAR10_TRAIN, "test_batch"
    else:
        name, meta, names_key, labels_key = "cifar100", "meta", "fine_label_names", "fine_labels"
        train_files, val_file = ("train",), "test"
    missing = [file for file in (*train_files, val_file, meta) if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{printable(str(folder))}: {name} files missing: {', '.join(missing)}; put them there")
    classes = _class_names(folder / meta, names_key)
    parts = [_read_batch(folder / file, labels_key, len(classes)) for file in train_files]
    train = ArraySplit("train", np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    return name, classes, train, ArraySplit("val", *_read_batch(folder / val_file, labels_key, len(classes)))


def _class_names(path: Path, key: str) -> tuple[str, ...]:
    names = _field(path, load(path), key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise InputError(f"{printable(str(path))}: {key} is not a list of names; fetch the file again")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _read_batch(path: Path, labels_key: str, classes: int) -> tuple[NDArray[np.uint8], Labels]:
    batch = load(path)
    data, labels = _field(path, batch, "data"), _field(path, batch, labels_key)
    pixels = data.as_numpy() if isinstance(data, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32 or len(pixels) == 0:
        raise InputError(f"{printable(str(path))}: data is not an array of N x 3072 bytes; fetch the file again")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise InputError(f"{printable(str(path))}: {labels_key} is not a list of integers; fetch the file again")
    if len(labels) != len(pixels):
        raise InputError(f"{printable(str(path))}: {len(pixels)} images but {len(labels)} labels; fetch it again")
    if outside := [label for label in labels if not 0 <= label < classes]:
        raise InputError(f"{printable(str(path))}: label {outside[0]} is outside 0..{classes - 1}; fetch it again")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)


def _field(path: Path, content: object, key: str) -> Any:
    if isinstance(content, dict):
        for spelling in (key, key.encode()):
            if spelling in content:
                return content[spelling]
    raise InputError(f"{printable(str(path))}: no field {key!r} in it; expected a CIFAR python batch")


class _Array:
    """Stands for numpy.ndarray while unpickling: keeps what the file says, checks it when asked for the array."""

    state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def as_numpy(self) -> NDArray[np.uint8] | None:
        """The array if the state is that of a C- or Fortran-ordered uint8 array of the bytes given, else None."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(shape, tuple) or len(shape) != 2:
            return None
        if not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
            return None
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "uint8", "|u1"):
            return None
        if not isinstance(raw, bytes | bytearray) or math.prod(shape) != len(raw):
            return None
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands for numpy.dtype while unpickling."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = code if isinstance(code, str) else ""

    def __setstate__(self, state: object) -> None:
        pass  # byte order and field layout: neither matters for bytes


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(raw: object = b"", dtype: object = None, shape: object = (), order: object = "C") -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", raw)
    return array


_ADMITTED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
_ADMITTED |= {(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")}
_ADMITTED |= {(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")}
_ENCODE = ("_codecs", "encode")
_NEVER = (  # persistent, extension and class instances, sets, buffers outside the file
    pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.EMPTY_SET,
    pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
_Parent: Any = pickle._Unpickler  # its methods are not in the type stubs


class _Unpickler(_Parent):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in _Parent.dispatch.items() if code not in {never[0] for never in _NEVER}
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._encodable = len(content)  # characters: a text that is encoded twice is none of a CIFAR file

    def load_build(self) -> None:
        """Nothing but the stand-ins has a state: of a function it would be attributes."""
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise pickle.UnpicklingError("a state for what has none")
        self.stack[-2].__setstate__(self.stack.pop())

    def load_setitem(self) -> None:
        self._require_names(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._require_names(self.stack[0::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._require_names(self.stack[0::2])
        super().load_dict()

    def load_bytearray8(self) -> None:
        """What the file holds, not a buffer of the size that it declares."""
        content = self.read(int.from_bytes(self.read(8), "little"))
        self.append(bytearray(content))

    dispatch |= {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }

    def _require_names(self, keys: list[Any]) -> None:
        """Hashing tuples of tuples of the same tuple takes for ever."""
        if not all(isinstance(key, str | bytes) for key in keys):
            raise pickle.UnpicklingError("a key that is not a name")

    def _encode(self, text: object = "", encoding: object = "latin1") -> bytes:
        """How protocol 2 spells bytes written by Python 3."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes in an unexpected encoding")
        self._encodable -= len(text)
        if self._encodable < 0:
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin1")

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == _ENCODE:
            return self._encode
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise _RefusedError(printable(f"{module_name}.{global_name}")) from None


class _RefusedError(Exception):
    """The global a pickle asked for and must not have."""


def load(path: Path) -> object:
    """Unpickle a CIFAR file: plain containers, bytes and array stand-ins only; all else is an InputError."""
    name = printable(str(path))
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{name}: larger than any CIFAR file ({_MAX_BYTES >> 20} MiB); expected a python batch")
        return _Unpickler(path.read_bytes()).load()
    except _RefusedError as error:
        raise InputError(f"{name}: asks for {error}, which no CIFAR file needs: refused; fetch it again") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); check the file") from error
    except InputError:
        raise
    except Exception as error:  # a garbled pickle can fail in any way that its opcodes can
        raise InputError(
            f"{name}: not a readable CIFAR python batch ({type(error).__name__}); fetch it again"
        ) from error
