"""Every error a user can cause: one line of text, one exit code, no traceback."""

import os
from pathlib import Path


class SimanError(Exception):
    """Something failed that is not the user's input (numerics, memory, disk); the command exits with 1."""

    exit_code = 1


class InputError(SimanError):
    """Wrong usage or input: the message names the thing, what was expected and what to do; exits with 2."""

    exit_code = 2


class MismatchError(SimanError):
    """`verify` found two backends that disagree beyond the stated bounds; exits with 3."""

    exit_code = 3


class Interrupted(SimanError):  # noqa: N818  nothing went wrong: what was asked for was done
    """A run was asked to stop; the message says what is saved. Exits with 130. `run`: the folder of the run to resume, if any."""

    exit_code = 130
    run: Path | None = None


def one_line(text: str) -> str:
    """At most 900 printable characters: names in a file may hold anything, line breaks and terminal codes too."""
    return "".join(character if character.isprintable() else " " for character in text)[:900]


def printable(path: str) -> str:
    """The path as one line of valid UTF-8: undecodable bytes and control characters as backslash escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
