"""bench.json: what `siman bench` left in a run's folder, as far as a report shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from siman_convert.errors import InputError

FILE = "bench.json"


@dataclass(frozen=True)
class LayerTime:
    """A convolution by its name, or `count` operators of the type `name`; kind: see `benchmark.layers`."""

    name: str
    kind: str
    count: int
    microseconds: float


@dataclass(frozen=True)
class Layers:
    """At so many threads and images at a time."""

    threads: int
    batch_size: int
    rows: tuple[LayerTime, ...]


@dataclass(frozen=True)
class Time:
    """A network's median milliseconds for a batch."""

    name: str
    median_ms: float


@dataclass(frozen=True)
class Contest:
    """Several networks at one number of threads and batch size."""

    threads: int
    batch_size: int
    results: tuple[Time, ...]


@dataclass(frozen=True)
class Machine:
    """What it was measured on."""

    processor: str


@dataclass(frozen=True)
class Timing:
    """A benchmark. subject: the run or file; variant: of the native kernels, None where ONNX Runtime ran without them."""

    subject: str
    variant: str | None
    machine: Machine
    contests: tuple[Contest, ...]
    layers: Layers


def read_timing(folder: Path) -> Timing | None:
    """The benchmark of a run, None where there is none. Raises InputError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Timing).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not what `siman bench` writes ({reason}); run that again, or remove it") from None
