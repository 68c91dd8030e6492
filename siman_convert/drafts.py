"""Making a run's folder: of several processes at once each gets its own, and what killed ones left behind is removed.

A folder is drafted under a hidden name while `.lock` beside it is held, and renamed when it is complete. So a draft that is met
by who holds the lock belongs to nobody. But a file system may keep one machine's locks from another: a draft's name says which
machine made it, and another machine's counts as abandoned only after a day.
"""

import contextlib
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from siman_convert.errors import InputError, SimanError
from siman_convert.files import TEMPORARY_PREFIX, umask, write_text

PREFIX = f"{TEMPORARY_PREFIX}siman-run-"
OTHERS_DRAFT = 86400.0  # seconds
PATIENCE = 60.0  # seconds that others may need to make their runs; it takes milliseconds


@contextlib.contextmanager
def draft_folder(output: Path) -> Iterator[Path]:
    """A new empty folder in `output`, which is made too; removed where an error ends its making.

    Raises SimanError where another process does not come to an end with its own.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(output / ".lock").acquire(timeout=PATIENCE)
    except Timeout:
        raise SimanError(f"{output}: another process has been making a run there for {PATIENCE:.0f} s; end it, or choose "
                         "another --output") from None  # fmt: skip
    with held:
        draft = Path(tempfile.mkdtemp(prefix=_own_prefix(), dir=output))
        try:
            draft.chmod(0o777 & ~umask())
            _remove_abandoned(output, draft)
            yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def give_name(draft: Path, output: Path, name: str) -> Path:
    """Rename a draft to the first free of name, name-2, ... in `output`; `last` names it a moment before.

    A kill in between leaves a pointer to nothing, which readers pass over. Renaming onto a folder that has content fails.
    """
    for attempt in range(1, 1000):
        target = output / (name if attempt == 1 else f"{name}-{attempt}")
        if target.exists():
            continue
        write_text(draft / "last", target.name + "\n")
        (draft / "last").replace(output / "last")
        try:
            return draft.rename(target)
        except OSError:
            if not target.exists():
                raise
    raise InputError(f"{output / name} and 999 names after it are taken; choose another --output")


def _own_prefix() -> str:
    """How the names of this machine's drafts begin."""
    return f"{PREFIX}{platform.node()}-"


def _remove_abandoned(output: Path, new: Path) -> None:
    """Remove the drafts of killed processes; `new` was just made, so that both times are the file system's own."""
    now = new.stat().st_mtime
    for path in output.iterdir():
        if path == new or not path.name.startswith(PREFIX):
            continue
        with contextlib.suppress(OSError):
            if path.name.startswith(_own_prefix()) or now - path.stat().st_mtime > OTHERS_DRAFT:
                shutil.rmtree(path)
