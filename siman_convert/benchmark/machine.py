"""What a benchmark ran on."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from siman_convert.environment import describe_environment

_CPUS = Path("/sys/devices/system/cpu")


class Cores(NamedTuple):
    """Of those that this process may use: cores, and hardware threads, which may be two a core."""

    physical: int
    logical: int


class Machine(NamedTuple):
    """processor: as the system calls it. openvino: None where it is not installed."""

    processor: str
    platform: str
    cores: Cores
    onnxruntime: str
    openvino: str | None


def this_machine() -> Machine:
    facts = describe_environment(torch.device("cpu"))
    return Machine(
        facts["processor"], facts["platform"], usable_cores(), facts["packages"]["onnxruntime"], _version("openvino")
    )


def usable_cores() -> Cores:
    """Two hardware threads of one core share the units that count bits: ONNX Runtime starts one thread a core."""
    if sys.platform != "linux":
        return Cores(os.cpu_count() or 1, os.cpu_count() or 1)
    cpus = sorted(os.sched_getaffinity(0))
    files = [_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus]
    siblings = {path.read_text(encoding="ascii") if path.is_file() else path for path in files}
    return Cores(len(siblings), len(cpus))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
