"""What a conversion ran on, for environment.json: versions and hardware, nothing that names the machine or its user."""

import os
import platform
from importlib import metadata
from typing import Any

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
    return _version("siman-convert")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """JSON-safe facts that a reader of a run's figures needs."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": _device_name(device),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  a pseudo-file of Linux
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
