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
ABANDONED = 3600.0  # seconds; no writer takes so long between making its temporary file and renaming it


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, else remove it.

    What others write for the same path stays theirs: of several at once, the last to end gives the file.
    """
    descriptor, name = tempfile.mkstemp(prefix=temporary_prefix(path), dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        _remove_abandoned(path, temporary)
        yield temporary
        temporary.chmod(0o666 & ~umask())
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_prefix(path: Path) -> str:
    """How the names of temporary files for `path` begin; a whole long name would leave no room for the rest."""
    return f"{TEMPORARY_PREFIX}{path.name[:100]}-"


def _remove_abandoned(path: Path, new: Path) -> None:
    """Remove what killed processes left of `path`. `new` was just made: both ages are by the clock of the file system."""
    now = new.stat().st_mtime
    for other in path.parent.iterdir():
        if other.name.startswith(temporary_prefix(path)):
            with contextlib.suppress(OSError):  # another writer may be done with it, or remove it, at this moment
                if now - other.stat().st_mtime > ABANDONED:
                    other.unlink()


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


def umask() -> int:
    """This process's mask of file permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
