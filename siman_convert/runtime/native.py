"""The native library: where it is, which instruction set it chose, and ONNX Runtime sessions with it registered.

It is built by `pip install`; without a C++ compiler the install is pure Python, and everything works through the function
body in the file, at about the speed of the full-precision network.
"""

from __future__ import annotations

import ctypes
import os
from numbers import Integral
from stat import S_ISREG

import onnxruntime

from siman_convert.errors import InputError, printable
from siman_convert.runtime.batches import BatchSession
from siman_convert.shared_library import find_library

ISA = "SIMAN_ISA"  # environment variable that forces a variant
MOST_THREADS = 1024  # of a session: thousands of them, all waiting busily, take minutes to start
MISSING = (
    "the native kernels are not installed (there was no C++ compiler): binary convolutions run as ordinary ones, several times "
    "slower; install a compiler, then `pip install --force-reinstall --no-deps siman-convert`"
)


def variants() -> dict[str, bool]:
    """Instruction sets the library was built for, best first, and whether this processor has them."""
    path = find_library()
    if path is None:
        return {}
    c = ctypes.CDLL(str(path))
    c.siman_variant_name.restype = ctypes.c_char_p
    c.siman_variant_name.argtypes = c.siman_variant_supported.argtypes = [ctypes.c_size_t]
    found: dict[str, bool] = {}
    while name := c.siman_variant_name(len(found)):
        found[name.decode()] = bool(c.siman_variant_supported(len(found)))
    return found


def variant() -> str | None:
    """The instruction set that sessions use: SIMAN_ISA, or the best one here; None without the library.

    Raises InputError for a SIMAN_ISA that the library or the processor does not have.
    """
    known = variants()
    if not known:
        return None
    forced = os.environ.get(ISA)
    if not forced:
        return next(name for name, supported in known.items() if supported)
    if not known.get(forced):
        usable = ", ".join(name for name, supported in known.items() if supported)
        what = "this processor does not have it" if forced in known else "there is no such variant"
        raise InputError(f"{ISA}={forced}: {what}; expected one of {usable}")
    return forced


def ceiling(variant: str, seconds: float) -> float:
    """1-bit multiplications a second that one core reaches with a variant's inner step on registers alone.

    Measured for about `seconds`. Raises InputError for a variant that the library or the processor does not have.
    """
    c = ctypes.CDLL(str(find_library()))
    c.siman_measure_ceiling.argtypes = [ctypes.c_char_p, ctypes.c_double, ctypes.POINTER(ctypes.c_double)]
    c.siman_message.restype = ctypes.c_char_p
    per_second = ctypes.c_double()
    status = c.siman_measure_ceiling(variant.encode(), seconds, ctypes.byref(per_second))
    if status:
        raise InputError(f"{variant}: {c.siman_message(status).decode()}")
    return per_second.value


def session(path: str | os.PathLike[str] | bytes, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that runs siman's operators natively; `path` may be the file's bytes.

    `threads`: of its pool, at most MOST_THREADS; None or 0: ONNX Runtime's choice. Without the library the function body in
    the file runs; with it, large batches of a file that siman exported go through `run` in pieces (runtime/batches.py).
    Raises InputError where ONNX Runtime refuses the file, for such a number of threads and an unusable SIMAN_ISA.
    """
    return open_session(path, threads, use_kernels=variant() is not None)


def open_session(
    path: str | os.PathLike[str] | bytes,
    threads: int | None = None,
    *,
    use_kernels: bool = False,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """A session with the native kernels, or stock. `options`: what else it is to have; they are changed."""
    file = _path_or_bytes(path)
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns about things its own optimizer does
    if threads is not None:
        options.intra_op_num_threads = _require_threads(threads)
    if use_kernels:
        options.register_custom_ops_library(str(find_library()))
    try:
        if use_kernels:
            return BatchSession(file, options)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base class
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"ONNX Runtime cannot open the graph: {reason}") from error


def _path_or_bytes(path: str | os.PathLike[str] | bytes) -> str | bytes:
    if isinstance(path, bytes):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{type(path).__name__}: expected the path of an ONNX file, or the file's bytes")
    name = os.fsdecode(path)
    try:
        is_file = S_ISREG(os.stat(name).st_mode)  # noqa: PTH116  as typed: Path("") is a folder
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        why = str(getattr(error, "strerror", error)).lower()
        raise InputError(f"{printable(name)}: cannot be read ({why}); expected an ONNX file") from error
    if not is_file:  # opening a pipe would wait for its writer
        raise InputError(f"{printable(name)}: not a file; expected an ONNX file")
    return name


def _require_threads(threads: int) -> int:
    if not isinstance(threads, Integral) or isinstance(threads, bool) or not 0 <= threads <= MOST_THREADS:
        raise InputError(
            f"threads={threads!r}: expected a whole number in 0..{MOST_THREADS}; 0 or None: ONNX Runtime's choice"
        )
    return int(threads)
