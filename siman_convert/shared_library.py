"""Where the native library is."""

from functools import cache
from pathlib import Path

import siman_convert

_NAMES = ("libsiman_native.so", "libsiman_native.dylib", "libsiman_native.dll")


@cache
def find_library() -> Path | None:
    """The library's file, or None where it was not built."""
    folders = [Path(folder) / "native" for folder in siman_convert.__path__]  # an editable install has two
    return next((folder / name for folder in folders for name in _NAMES if (folder / name).is_file()), None)
