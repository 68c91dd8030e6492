"""Writing so that a kill or a full disk never leaves half a file under its final name."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siman_convert.errors import SimanError

TEMPORARY_PREFIX = ".tmp-"  # what a killed process may leave behind, and nothing else


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, else remove it."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def flush_to_disk(path: Path) -> None:
    """fsync one file, so that a rename after it cannot survive a power cut that the content did not."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises, in whichever library, into one line naming `place`."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        raise SimanError(f"{place}: {reason}; nothing that was written before is lost") from error


def _disk_reason(error: Exception) -> str | None:
    """torch and safetensors wrap the operating system's error in types of their own: read their text."""
    if isinstance(error, OSError) and error.errno is not None:
        known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
        return os.strerror(error.errno).lower() if error.errno in known else None
    text = str(error)
    for number in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(number) in text:
            return os.strerror(number).lower()
    writer_failed = "PytorchStreamWriter failed" in text or "unexpected pos" in text or "iostream error" in text
    return "cannot write (is the disk full?)" if writer_failed else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
