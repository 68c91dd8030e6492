"""The native library, built once for a test run, and its C interface through ctypes."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from siman_convert.onnx_quantized_op import NO_POOL

SOURCE = Path(__file__).parents[2] / "siman_convert" / "native"
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, TASK, ctypes.c_void_p, ctypes.c_size_t)


def find_tool(*names: str) -> str:
    """The path of the first of these programs, in the virtual environment or the system; skips the test without one."""
    beside_python = str(Path(sys.executable).parent)
    for name in names:
        if found := shutil.which(name, path=beside_python) or shutil.which(name):
            return found
    pytest.skip(f"needs one of {', '.join(names)} to build the native library")
    raise AssertionError


def build(folder: Path, *options: str) -> Path:
    """Build library and C++ tests in `folder`, once, whichever worker comes first."""
    cmake = find_tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            for command in (
                [
                    cmake,
                    "-S",
                    SOURCE,
                    "-B",
                    folder,
                    *generator,
                    "-DSIMAN_TESTS=ON",
                    "-DCMAKE_CXX_FLAGS=-Werror",
                    *options,
                ],
                [cmake, "--build", folder],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    return folder


class Geometry(ctypes.Structure):
    """siman_geometry, field by field."""

    _fields_ = (
        ("filters", ctypes.c_int64),
        ("kernel", ctypes.c_int64 * 2),
        ("channels", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 2),
        ("pads", ctypes.c_int64 * 4),
        ("dilations", ctypes.c_int64 * 2),
        ("group", ctypes.c_int64),
        ("center", ctypes.c_int64),
    )


def on_threads(count: int) -> Callable[..., None]:
    """A parallel-for on `count` Python threads."""

    def run(_pool, task, context, tasks):
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(lambda i: task(context, i), range(tasks)))

    return PARALLEL_FOR(run)


def geometry_of(**fields):
    """siman_geometry from integers and sequences of them."""
    kinds = dict(Geometry._fields_)
    return Geometry(**{name: kinds[name](*np.atleast_1d(value).tolist()) for name, value in fields.items()})


class NativeError(Exception):
    """What siman_message says."""


def assert_same_with_signs(got, expected):
    """As assert_array_equal, for which 0 and -0 are the same; one NaN is as good as another."""
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


class Library:
    """siman.h."""

    def __init__(self, folder: Path) -> None:
        self.path = str(next(folder.glob("libsiman_native.*")))
        self.c = ctypes.CDLL(self.path)
        for name in ("siman_message", "siman_variant", "siman_variant_name"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.siman_variant.argtypes = [ctypes.c_void_p]
        self.c.siman_destroy.argtypes = [ctypes.c_void_p]
        self.c.siman_variant_name.argtypes = self.c.siman_variant_supported.argtypes = [ctypes.c_size_t]
        many = [ctypes.c_void_p] * 2
        self.c.siman_create.argtypes = [
            *many,
            ctypes.c_size_t,
            *many,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_void_p,
        ]
        self.c.siman_create_quantized.argtypes = [
            *many,
            *many,
            ctypes.c_void_p,
            ctypes.c_float,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_void_p,
        ]
        self.c.siman_run.argtypes = [*many, *many, ctypes.c_int, ctypes.c_void_p, PARALLEL_FOR, ctypes.c_void_p]
        self.c.siman_output_shape.argtypes = [ctypes.c_void_p] * 3

    def variants(self) -> dict[str, bool]:
        """Name and whether this processor can run it, in the library's order."""
        found = {}
        while name := self.c.siman_variant_name(len(found)):
            found[name.decode()] = bool(self.c.siman_variant_supported(len(found)))
        return found

    def check(self, status: int) -> None:
        if status:
            raise NativeError(self.c.siman_message(status).decode())

    def conv(self, X, W, scale, bias, residual, slope, *, variant=None, threads=0, ran=None, **attributes):
        """Y, as reference.binary_conv2d; `ran` is a list that takes the name of the variant."""
        handle, geometry = ctypes.c_void_p(), geometry_of(filters=W.shape[0], kernel=W.shape[1:3], **attributes)
        vectors = (pointer(scale), pointer(bias), pointer(slope))
        name = None if variant is None else variant.encode()
        created = self.c.siman_create(ctypes.byref(geometry), pointer(W), W.size, *vectors, name, ctypes.byref(handle))
        self.check(created)
        return self.run(handle, X, residual, threads, ran)

    def quantized_conv(
        self,
        X,
        W,
        scale,
        bias,
        slope,
        *,
        strides,
        pads,
        x_scale,
        x_zero_point,
        variant=None,
        threads=0,
        ran=None,
        **pool,
    ):
        """Y, as reference.quantized_conv2d."""
        values = np.array([number for name, none in NO_POOL.items() for number in pool.get(name, none)], np.int64)
        plain = {"dilations": [1, 1], "group": 1, "center": 0}
        filters, channels, *kernel = W.shape
        geometry = geometry_of(filters=filters, kernel=kernel, channels=channels, strides=strides, pads=pads, **plain)
        handle, name = ctypes.c_void_p(), None if variant is None else variant.encode()
        vectors = (pointer(scale), pointer(bias), pointer(slope))
        steps = (ctypes.c_float(x_scale), x_zero_point, pointer(values) if pool else None)
        created = self.c.siman_create_quantized(
            ctypes.byref(geometry), pointer(W), *vectors, *steps, name, ctypes.byref(handle)
        )
        self.check(created)
        return self.run(handle, X, np.zeros((1, 1, 1, 1), np.float32), threads, ran)

    def run(self, handle, X, residual, threads, ran):
        """Runs a convolution once, and destroys it."""
        try:
            if ran is not None:
                ran.append(self.c.siman_variant(handle).decode())
            image, shape = (ctypes.c_int64 * 4)(*X.shape), (ctypes.c_int64 * 4)()
            self.check(self.c.siman_output_shape(handle, image, shape))
            Y = np.full(tuple(shape), -12345, np.float32)
            pool = on_threads(threads) if threads else PARALLEL_FOR()
            full = residual.shape == Y.shape
            self.check(self.c.siman_run(handle, pointer(X), image, pointer(residual), full, pointer(Y), pool, None))
            return Y
        finally:
            self.c.siman_destroy(handle)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory) -> Path:
    if built := os.environ.get("SIMAN_TEST_BUILD"):  # .ci/sanitizers: a build with sanitizers
        return Path(built)
    try:
        for tools in (("c++", "g++", "clang++"), ("cmake",), ("ninja",)):
            find_tool(*tools)
    except pytest.skip.Exception as reason:
        if os.environ.get("SIMAN_REQUIRE_NATIVE") == "1":
            pytest.fail(f"SIMAN_REQUIRE_NATIVE is set, but the native library {reason}")
        raise
    root = tmp_path_factory.getbasetemp()  # of this worker, where pytest-xdist runs several
    return build((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "native")


@pytest.fixture(scope="session")
def library(build_folder) -> Library:
    return Library(build_folder)
