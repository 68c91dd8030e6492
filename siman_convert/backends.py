"""What can run a packed model: torch, ONNX Runtime with our kernels (native) or without, the numpy reference.

Each is a module: images in, logits out. All but torch run the exported graph, so that evaluating with them evaluates the file.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from siman_convert.description import description_of
from siman_convert.errors import InputError
from siman_convert.onnx_export import OUTPUT, build_onnx
from siman_convert.onnx_file import OnnxFile, Variant, parse_onnx, seal
from siman_convert.runtime import native, reference
from siman_convert.subjects import Subject

Backend = Literal["torch", "native", "onnxruntime", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


class OnnxRuntimeModel(nn.Module):
    """A graph in ONNX Runtime on the CPU; the operator is run by our kernels (`use_kernels`), else by its function body."""

    def __init__(self, data: bytes, use_kernels: bool = False) -> None:
        super().__init__()
        self.session = native.open_session(data, use_kernels=use_kernels)
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """The graph's input (float32 (N, C, H, W), or uint8 (N, H, W, C)) to logits (N, classes)."""
        logits: Any = self.session.run([OUTPUT], {self.input: images.contiguous().numpy()})
        return torch.from_numpy(logits[0])


class ReferenceModel(nn.Module):
    """A graph in onnx.reference, the operator by `runtime.reference`: slow, and what the others are measured against."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.evaluator = reference.evaluator(model)
        self.input = model.graph.input[0].name

    def forward(self, images: Tensor) -> Tensor:
        """As OnnxRuntimeModel."""
        logits: Any = self.evaluator.run([OUTPUT], {self.input: images.contiguous().numpy()})
        return torch.from_numpy(np.asarray(logits[0]))


def require_backend(name: str | None) -> Backend | None:
    """A backend's name as the user gave it; InputError for any other."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"--backend {name!r}: expected {', '.join(BACKENDS)}")
    return name


def default_backend(subject: Subject) -> Backend:
    """torch for what is a torch module; for an ONNX file `default_onnx_backend`."""
    return "torch" if subject.onnx is None else default_onnx_backend()


def default_onnx_backend() -> Backend:
    """The native kernels where they are installed, else stock ONNX Runtime."""
    return "onnxruntime" if native.variant() is None else "native"


def open_backend(subject: Subject, backend: Backend) -> nn.Module:
    """The subject in that backend, in eval mode. Raises InputError where it cannot run there."""
    if backend == "torch":
        if subject.packed is None:
            raise InputError(
                f"{subject.name}: torch runs a run or a .safetensors file, not ONNX; "
                "use --backend native, onnxruntime or reference, or name the run"
            )
        return subject.packed
    if backend == "native" and native.variant() is None:
        raise InputError(f"--backend native: {native.MISSING}")
    file = subject_onnx(subject)
    if backend == "reference":
        return ReferenceModel(file.model).eval()
    return OnnxRuntimeModel(file.data, use_kernels=backend == "native").eval()


def subject_onnx(subject: Subject) -> OnnxFile:
    """The subject's ONNX file, exported in memory where it is a torch module."""
    if subject.onnx is not None:
        return subject.onnx
    assert subject.packed is not None  # a subject has one of the two
    model, _ = build_onnx(subject.packed)
    return parse_onnx(seal(model, description_of(subject.packed), Variant()))
