"""What names on a command line mean, found out without torch: a slip of the pen is answered at once.

A subject is a run, by path or by its name in the folder of runs, or an exported file, known by its suffix.
"""

import os
import tempfile
from pathlib import Path

from siman_convert.errors import InputError, printable
from siman_convert.runs import find_run

SUFFIXES = (".safetensors", ".onnx")
TIMM_DATA = ("hfds", "hfids", "tfds", "torch", "wds")  # prefixes that timm's dataset factory opens
DATA_NAMES = "digits, hfds/NAME, tfds/NAME, wds/FOLDER or torch/NAME:FOLDER"


def is_file(what: str | Path) -> bool:
    """Whether a name means an exported file, by its suffix; anything else is a run."""
    return Path(what).suffix in SUFFIXES and not Path(what).is_dir()


def require_subject(what: str | Path | None, output: Path) -> None:
    """Raise InputError where there is no file or run of that name or path; None: where `output` holds no run."""
    if what is not None and is_file(what):
        require_file(Path(what))
    else:
        find_run(what, output)


def require_file(path: Path) -> None:
    """Raise InputError where an exported file is not there."""
    if not path.exists():
        raise InputError(f"{path}: no such file; `siman export` writes one")


def require_usable(output: Path, experiment: str | None) -> None:
    """Raise InputError where no folder could be made at `output`, nothing be written into it, or `experiment` names no run."""
    if experiment is not None and (Path(experiment).name != experiment or experiment.startswith(".")):
        raise InputError(f"--experiment {experiment!r}: expected a plain name, without slashes")
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--output {output}: {existing} is a file; expected a folder, or a path to make one at")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InputError(
            f"--output {output}: nothing can be written into {existing} ({why}); choose another folder"
        ) from None


def opened_by_timm(spec: str) -> bool:
    """Whether data are named by one of timm's prefixes (a folder of that name is written ./wds/...)."""
    return spec.partition("/")[0] in TIMM_DATA and "/" in spec


def require_data(spec: str) -> None:
    """Raise InputError where data are named by a path, and nothing is there."""
    if spec != "digits" and not opened_by_timm(spec):
        existing_data(spec)


def existing_data(spec: str) -> Path:
    """A path to data, made absolute. Raises InputError where nothing is there."""
    try:
        path = Path(os.path.abspath(Path(spec).expanduser()))  # noqa: PTH100  as typed: links keep their name
        found = bool(spec) and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, unknown ~user, a NUL in it
        raise InputError(
            f"{printable(spec)}: cannot be looked up ({error}); expected a path or {DATA_NAMES}"
        ) from error
    if not found:
        raise InputError(f"no such path: {printable(spec) or '(empty)'}; expected a folder, a file, or {DATA_NAMES}")
    return path
