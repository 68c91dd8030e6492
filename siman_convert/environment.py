"""What a conversion ran on, for environment.json: versions and hardware, nothing that names the machine or its user."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "siman-convert",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "safetensors",
    "onnx",
    "onnxruntime",
)


def siman_version() -> str:
    """Version of the installed package; "unknown" where a checkout runs uninstalled."""
    return version_of("siman-convert")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """JSON-safe facts that a reader of a run's figures needs."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _device_name(device),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processor() -> str:
    """As the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  a pseudo-file of Linux
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def version_of(package: str) -> str:
    """Of an installed package, else "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
