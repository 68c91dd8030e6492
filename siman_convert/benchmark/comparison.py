"""One benchmark: a binary network beside the full-precision and int8 networks of its architecture, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np

from siman_convert.backends import Backend, default_onnx_backend, subject_onnx
from siman_convert.benchmark.baselines import take_images, write_float, write_int8
from siman_convert.benchmark.contestants import Contestant, Images, Runner, has_openvino, open_contestant
from siman_convert.benchmark.layers import LayerTimes, layer_times
from siman_convert.benchmark.machine import Machine, this_machine
from siman_convert.benchmark.memory import peak_memory
from siman_convert.benchmark.rounds import Ratio, Timing, ratio, take_turns
from siman_convert.description import Description
from siman_convert.errors import InputError, SimanError
from siman_convert.runtime import native
from siman_convert.subjects import Subject, Which, open_subject

OPENINGS = 3  # that the time of opening is the median of
LAYER_SECONDS = 1.5  # of profiling, at most
CEILING_SECONDS = 0.3
NO_OPENVINO = "not installed; `pip install openvino` adds it to this comparison"
Progress = Callable[[str, float], None]  # what is being done, and which share of that is done, 0 to 1
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """One contestant at one number of threads and batch size. ratio: its time over the binary network's; None for that one."""

    name: str
    timing: Timing
    images_per_second: float
    ratio: Ratio | None


@dataclass(frozen=True)
class Contest:
    """Everybody at one number of threads and batch size; the binary network comes first."""

    threads: int
    batch_size: int
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Footprint:
    """file_bytes: the ONNX file. open_ms: median time to open it, read before. memory_bytes: see `benchmark.memory`."""

    name: str
    file_bytes: int
    open_ms: float
    memory_bytes: int | None


@dataclass(frozen=True)
class Absent:
    """A contestant that is not there, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """What `bench` found. image_shape: of what the graphs take, without the batch; kernels: the variant that ran.

    run: the folder of the run that was measured, or in whose folder the file lies.
    """

    subject: str
    run: Path | None
    description: Description
    image_shape: Shape
    takes_images: bool
    backend: Literal["native", "onnxruntime"]
    kernels: str | None
    machine: Machine
    contests: tuple[Contest, ...]
    footprints: tuple[Footprint, ...]
    absent: tuple[Absent, ...]
    layers: LayerTimes


@dataclass(frozen=True)
class _Setting:
    """What is measured on: `shape` is one image's."""

    threads: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    seconds: float
    shape: Shape
    takes_images: bool

    def images(self, batch_size: int) -> Images:
        """Normal noise, or random pixels. Raises InputError where memory does not hold them."""
        rng = np.random.default_rng(0)
        try:
            if self.takes_images:
                return rng.integers(0, 256, (batch_size, *self.shape), dtype=np.uint8)
            return rng.standard_normal((batch_size, *self.shape), dtype=np.float32)
        except (MemoryError, ValueError):
            raise InputError(f"--batch-size {batch_size}: memory does not hold so many images; try fewer") from None


def bench(
    what: str | Path | None = None,
    *,
    which: Which = "best",
    backend: Backend | None = None,
    threads: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1,),
    seconds: float = 3.0,
    output: Path = Path("runs"),
    progress: Progress = lambda _text, _share: None,
) -> Benchmark:
    """Measure a run's `best` or `last` weights or an exported file; None: the newest run in `output`.

    `backend`: native or onnxruntime; None: our kernels where they are installed. `threads`: each number is tried; none:
    1 and as many as there are cores. `seconds`: of timing, for each contestant, number of threads and batch size.
    Everything written is temporary. Raises InputError.
    """
    engine = _engine(backend)
    machine = this_machine()
    numbers = _require_threads(tuple(dict.fromkeys(threads)), machine)
    sizes = _require_batch_sizes(tuple(dict.fromkeys(batch_sizes)))
    _require_seconds(seconds)
    subject = open_subject(what, output, which)
    with tempfile.TemporaryDirectory(prefix="siman-bench-") as folder:
        progress("exporting the networks", 0.0)
        binary, takes_images = _write_binary(subject, Path(folder), engine)
        description, name = subject.description, subject.name
        run = subject.run.folder if subject.run else None
        del subject  # it holds the weights, which the file has
        contestants, absent = _contestants(binary, description, takes_images, progress)
        setting = _Setting(numbers, sizes, seconds, image_shape(description, takes_images), takes_images)
        contests = _contests(contestants, setting, progress)
        footprints = tuple(_footprint(contestant, setting, progress) for contestant in contestants)
        layers = _layers(binary, setting, progress)
    return Benchmark(
        subject=name,
        run=run,
        description=description,
        image_shape=setting.shape,
        takes_images=takes_images,
        backend=engine,
        kernels=binary.kernels,
        machine=machine,
        contests=contests,
        footprints=footprints,
        absent=tuple(absent),
        layers=layers,
    )


def image_shape(description: Description, takes_images: bool) -> Shape:
    """(C, H, W) of a normalised image, or (H, W, C) of a decoded one: as large as it is resized to before it is cropped."""
    preprocess = description.preprocess
    channels, height, width = preprocess.input_size
    if not takes_images:
        return channels, height, width
    return int(height / preprocess.crop_pct), int(width / preprocess.crop_pct), channels


# ----------------------------------------------------------------------------------------------- what was asked for


def _engine(backend: Backend | None) -> Literal["native", "onnxruntime"]:
    chosen = backend or default_onnx_backend()
    if chosen not in ("native", "onnxruntime"):
        raise InputError(f"--backend {chosen}: expected native or onnxruntime, which run the exported graph at speed")
    if chosen == "native" and native.variant() is None:
        raise InputError(f"--backend native: {native.MISSING}")
    return chosen


def _require_threads(threads: tuple[int, ...], machine: Machine) -> tuple[int, ...]:
    if not threads:
        return tuple(dict.fromkeys((1, machine.cores.physical)))
    wrong = next((number for number in threads if not 1 <= number <= machine.cores.logical), None)
    if wrong is not None:
        raise InputError(f"--threads {wrong}: expected 1 to {machine.cores.logical}, what this process may use here")
    return threads


def _require_batch_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    wrong = next((size for size in sizes if size < 1), None)
    if wrong is not None or not sizes:
        raise InputError(f"--batch-size {wrong}: expected images at a time, 1 or more")
    return sizes


def _require_seconds(seconds: float) -> None:
    if not 0 < seconds <= 3600:
        raise InputError(f"--seconds {seconds:g}: expected more than 0 and at most 3600, as --seconds 3")


# ------------------------------------------------------------------------------------------------- the contestants


def _write_binary(subject: Subject, folder: Path, engine: Literal["native", "onnxruntime"]) -> tuple[Contestant, bool]:
    """The subject's graph as a file, and whether it takes decoded images."""
    file = subject_onnx(subject)
    path = folder / "binary.onnx"
    path.write_bytes(file.data)
    kernels = native.variant() if engine == "native" else None
    return Contestant("binary", path, engine, kernels), file.variant.takes_images


def _contestants(
    binary: Contestant, description: Description, takes_images: bool, progress: Progress
) -> tuple[list[Contestant], list[Absent]]:
    folder, absent = binary.file.parent, list[Absent]()
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    write_float(description, fp32)
    progress("quantizing the full-precision network", 0.0)
    try:
        write_int8(fp32, description.preprocess.input_size, int8)
    except SimanError as error:
        absent.append(Absent("ONNX Runtime int8", str(error)))
    files = [(kind, path) for kind, path in (("fp32", fp32), ("int8", int8)) if path.is_file()]
    if takes_images:
        for _, path in files:
            take_images(path, description)
    contestants = [binary, *(Contestant(f"ONNX Runtime {kind}", path, "onnxruntime") for kind, path in files)]
    if not has_openvino():
        return contestants, [*absent, Absent("OpenVINO", NO_OPENVINO)]
    shape = (1, *image_shape(description, takes_images))
    for kind, path in files:
        contestant = Contestant(f"OpenVINO {kind}", path, "openvino")
        try:
            open_contestant(contestant, 1, shape)
            contestants.append(contestant)
        except InputError as error:
            absent.append(Absent(contestant.name, str(error)))
    return contestants, absent


# ------------------------------------------------------------------------------------------------------- measuring


def _contests(contestants: list[Contestant], setting: _Setting, progress: Progress) -> tuple[Contest, ...]:
    pairs = [(threads, size) for threads in setting.threads for size in setting.batch_sizes]
    return tuple(_contest(contestants, threads, size, setting, progress) for threads, size in pairs)


def _contest(
    contestants: list[Contestant], threads: int, batch_size: int, setting: _Setting, progress: Progress
) -> Contest:
    images = setting.images(batch_size)
    programs = {one.name: _program(one, threads, images) for one in contestants}
    text = f"timing {threads_text(threads)}, batch {batch_size}"
    timings = take_turns(programs, setting.seconds, lambda share: progress(text, share))
    ours = timings[contestants[0].name]
    results = [
        Result(name, timing, 1e3 * batch_size / timing.median_ms, None if timing is ours else ratio(timing, ours))
        for name, timing in timings.items()
    ]
    return Contest(threads, batch_size, tuple(results))


def _program(contestant: Contestant, threads: int, images: Images) -> Callable[[], None]:
    """Runs the batch once; what goes wrong is told in one line."""
    run: Runner = open_contestant(contestant, threads, images.shape)
    with _failing_in_one_line(contestant, len(images)):
        run(images)
    return lambda: run(images)


@contextmanager
def _failing_in_one_line(contestant: Contestant, batch_size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the engines' errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise SimanError(f"{contestant.name} failed at --batch-size {batch_size}: {reason}; try fewer") from error


def _footprint(contestant: Contestant, setting: _Setting, progress: Progress) -> Footprint:
    """At the first number of threads and the first batch size."""
    progress("measuring memory and opening times", 0.0)
    threads, images = setting.threads[0], setting.images(setting.batch_sizes[0])
    seconds = [_opening_seconds(contestant, threads, images.shape) for _ in range(OPENINGS)]
    memory = peak_memory(contestant, threads, images)
    return Footprint(contestant.name, contestant.file.stat().st_size, 1e3 * float(np.median(seconds)), memory)


def _opening_seconds(contestant: Contestant, threads: int, shape: Shape) -> float:
    started = perf_counter()
    open_contestant(contestant, threads, shape)
    return perf_counter() - started


def _layers(binary: Contestant, setting: _Setting, progress: Progress) -> LayerTimes:
    """At the first number of threads and the first batch size."""
    progress("timing the layers", 0.0)
    threads, images = setting.threads[0], setting.images(setting.batch_sizes[0])
    ceiling = None if binary.kernels is None else threads * native.ceiling(binary.kernels, CEILING_SECONDS)
    return layer_times(binary, threads, images, min(LAYER_SECONDS, setting.seconds), ceiling)


def threads_text(threads: int) -> str:
    """1 thread, 2 threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"
