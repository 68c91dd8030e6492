"""What is compared: an ONNX file in an engine, opened for one number of threads and one batch size.

All are opened as a user of the engine would, with two things the same for everyone:
  * ONNX Runtime's threads spin while they wait for work, and go on for a while after a run. Users see that as it is
    meant, but here they would take the cores from whoever is next. `force_spinning_stop` ends it with the run.
    Measured, ResNet-18 on 2 threads, in turns: without it the binary network took 9.4 ms, with it 6.2, alone 7.1;
    without spinning at all 7.4 and, beside other load, more.
  * OpenVINO gets a fixed batch size (one model is compiled for each), one stream, float32 where the file has float32,
    and does not pin its threads to cores that other engines are using too; pinned it was as fast.

Only numpy and ONNX Runtime are imported: memory is measured in processes that hold nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnxruntime

from siman_convert.errors import InputError
from siman_convert.runtime import native

Engine = Literal["native", "onnxruntime", "openvino"]
Images = npt.NDArray[Any]  # float32 (N, C, H, W), or uint8 (N, H, W, C)
Runner = Callable[[Images], None]


@dataclass(frozen=True)
class Contestant:
    """`name`: as people read it. `kernels`: the variant of the native kernels, None where they do not run."""

    name: str
    file: Path
    engine: Engine
    kernels: str | None = None


def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def import_engine(engine: Engine) -> Any:
    """The module that runs this engine's files."""
    return importlib.import_module("openvino" if engine == "openvino" else "onnxruntime")


def open_contestant(contestant: Contestant, threads: int, shape: tuple[int, ...]) -> Runner:
    """What runs a batch of that shape once. Raises InputError where the engine refuses the file."""
    if contestant.engine == "openvino":
        return _open_openvino(contestant, threads, shape)
    session = open_quiet_session(contestant, threads, onnxruntime.SessionOptions())
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images}) and None


def open_quiet_session(
    contestant: Contestant, threads: int, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session whose threads rest between runs. Raises InputError."""
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return native.open_session(contestant.file, threads, use_kernels=contestant.engine == "native", options=options)


def _open_openvino(contestant: Contestant, threads: int, shape: tuple[int, ...]) -> Runner:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    core = import_engine("openvino").Core()
    try:
        model = core.read_model(contestant.file)
        model.reshape(list(shape))
        request = core.compile_model(model, "CPU", settings).create_infer_request()
    except Exception as error:  # its exceptions share no public base class
        raise InputError(f"OpenVINO cannot open the graph: {' '.join(str(error).split())[:200]}") from error

    def run(images: Images) -> None:
        request.infer([images], share_inputs=True)

    return run
