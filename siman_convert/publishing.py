"""An export to the Hugging Face hub: the files and their card, in one commit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from siman_convert.errors import InputError, SimanError, one_line
from siman_convert.hub import answers

LOG_IN = "`hf auth login` with a token that may write, or set HF_TOKEN"


def require_pushable(name: str) -> str:
    """The full name, `user/name`, of the repository to write to. InputError where nothing could be uploaded from here."""
    option = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{option}: expected NAME or USER/NAME: {one_line(str(error))}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{option}: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out")
    if not answers(constants.ENDPOINT):
        raise InputError(f"{option}: no answer from {_host()}; leave --push-to-hub out, and export again when online")
    if get_token() is None:
        raise InputError(f"{option}: nobody is logged in at {_host()}; {LOG_IN}")
    try:
        user = str(HfApi(endpoint=constants.ENDPOINT).whoami()["name"])
    except HfHubHTTPError as error:
        raise InputError(f"{option}: {_host()} does not accept the token; {LOG_IN}") from error
    except Exception as error:  # of whichever HTTP library the hub's has
        raise SimanError(f"{option}: {_reason(error)}") from error
    return name if "/" in name else f"{user}/{name}"


def push(repository: str, files: Sequence[Path], card: str) -> str:
    """Upload in one commit, to a repository that is made where there is none; the address to look at. Raises SimanError."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=constants.ENDPOINT)
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Export {', '.join(path.name for path in files)}")
    except Exception as error:  # of whichever HTTP library the hub's has; hf_xet raises its own
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        mend = f"; {LOG_IN}" if status in (401, 403) else ""
        wrote = ", ".join(map(str, files))
        raise SimanError(
            f"{wrote}: written, but not uploaded to {repository} at {_host()}: {_reason(error)}{mend}"
        ) from error
    return str(address)


def _host() -> str:
    return constants.ENDPOINT.split("/")[2]


def _reason(error: BaseException) -> str:
    """The first line of an error, and of what caused it: the hub's library wraps what happened to a file."""
    first = one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))[:200]
    return f"{first} ({_reason(error.__cause__)})" if error.__cause__ and type(error) is RuntimeError else first
