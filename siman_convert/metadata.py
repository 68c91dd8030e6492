"""A description as JSON, strictly both ways, and sealed with SHA-256: the metadata of both file formats.

What is read back must be what siman would write for it, to the letter; everything else is one line that names the field.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from siman_convert.description import FORMAT, Description, canonical_json
from siman_convert.errors import InputError, one_line
from siman_convert.plans import Plan

AGAIN = "the file is damaged or not complete: export it again"


def to_metadata(description: Description) -> dict[str, Any]:
    """The description as plain JSON values. Raises InputError where `from_metadata` would not give it back."""
    return _values(_description(_values(description)))  # the inner values may have 1 for 1.0


def from_metadata(values: Any, where: str) -> Description:
    """The inverse of `to_metadata`; InputError, naming the field and `where`, for anything that it does not write."""
    with located(where):
        return _description(values)


def seal(values: Mapping[str, Any], tensors: str) -> str:
    """Canonical JSON of metadata and digests; `tensors`: the SHA-256 of the tensors, hex."""
    digests = {"metadata": _sha256(canonical_json(values)), "tensors": tensors}
    return canonical_json({**values, "sha256": digests})


def unseal(text: str) -> tuple[Description, str]:
    """The inverse of `seal`: the description, and the SHA-256 that the tensors should have. Raises InputError."""
    values = _canonical(text)
    _require_format(values)
    digests = values.pop("sha256", None)
    if not isinstance(digests, dict) or digests.get("metadata") != _sha256(canonical_json(values)):
        raise InputError(f"the metadata do not have the SHA-256 that they state; {AGAIN}")
    return _description(values), str(digests.get("tensors"))


def _values(description: Description) -> dict[str, Any]:
    fields: dict[str, Any] = _json().dump_python(description, mode="json", warnings=False)
    return {"format": FORMAT, "arguments": {"num_classes": len(description.classes)}, **fields}


def _description(values: Any) -> Description:
    _require_format(values)
    try:
        description = _json().validate_json(_json_text(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"metadata: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    Plan.from_dict(values["plan"])  # two decisions for one layer
    if not description.classes:
        raise InputError("metadata: classes: expected at least one")
    # What passes up to here: another number of classes, a default left out, unknown fields at any depth, 1 for 1.0.
    written = _values(description)
    for name in sorted(values.keys() | written.keys()):
        wanted, found = (_json_text(v[name]) if name in v else "nothing" for v in (written, values))
        if wanted != found:
            raise InputError(f"metadata: {name}: expected {wanted[:300]}, found {found[:300]}")
    return description


@cache
def _json() -> TypeAdapter[Description]:
    return TypeAdapter(Description)


def _require_format(values: Any) -> None:
    """Goes before every other check: nothing else is known of another format."""
    found = values.get("format") if isinstance(values, dict) else None
    if type(found) is int and 0 < found < FORMAT:
        mend = "read it with the siman that wrote it, or convert anew"
        raise InputError(f"the file is of format {found}, this siman reads {FORMAT} only: {mend}")
    if type(found) is int and found > FORMAT:
        raise InputError(f"the file is of format {found}, this siman reads up to {FORMAT}: upgrade siman")
    if type(found) is not int or found != FORMAT:
        raise InputError(f"metadata: format: expected {FORMAT}, found {str(found)[:40]}; {AGAIN}")


def _json_text(values: Any) -> str:
    try:
        text = canonical_json(values)
        text.encode()  # a lone surrogate, which a class named after a folder may have, is not UTF-8
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata: cannot be written as JSON in UTF-8: {error}") from error
    return text


def _canonical(text: str) -> Any:
    """Parse canonical JSON. Anything else is damage: two texts of one value would have one digest."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"metadata: not JSON ({error}); {AGAIN}") from error
    if _json_text(values) != text:
        raise InputError(f"metadata: not canonical JSON; {AGAIN}")
    return values


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def located(where: str | Path) -> Iterator[None]:
    """Begin every InputError with the file, and keep it one short line whatever names stand in the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {one_line(str(error))}") from error
