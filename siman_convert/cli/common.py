"""What several commands share: option types, JSON output, sizes and numbers as people read them."""

import json
import math
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

SCHEMA_VERSION = 1  # of every --json output; raised when a field changes its meaning

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.", show_default=True)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend", help="torch, native, onnxruntime or reference; default: native for ONNX files, else torch."
    ),
]
Workers = Annotated[int, typer.Option("-j", "--workers", min=0, help="Processes that load images; 0: none.")]

RUNS = Path("runs")


QUIET: ContextVar[bool] = ContextVar("quiet", default=False)  # -q: results and errors only


def print_json(values: dict[str, Any]) -> None:
    """One document on stdout, with the schema's version first. JSON has no NaN and no infinity: null stands for them."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **_finite(values)}, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_what_runs_slowly(ran: str, asked_for: str | None) -> None:
    """One line on stderr where stock ONNX Runtime ran a graph only because our kernels are not installed."""
    from siman_convert.runtime import native

    if ran == "onnxruntime" and asked_for is None and not QUIET.get():
        print(f"siman: {native.MISSING}", file=sys.stderr)


def megabytes(count: int) -> str:
    """Bytes as 2.19 MB."""
    return f"{count / 1e6:.2f} MB"


def percent(value: float | None) -> str:
    """Top-1 as 91.23 %, or a dash where it was not measured."""
    return "-" if value is None else f"{value:.2f} %"
