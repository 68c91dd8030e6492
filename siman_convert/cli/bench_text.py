"""How a benchmark is shown: tables and sentences for people, a record for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from siman_convert.benchmark.comparison import Benchmark, Contest, Result, threads_text
from siman_convert.benchmark.layers import Layer, LayerTimes
from siman_convert.benchmark.rounds import Ratio
from siman_convert.cli.common import QUIET, megabytes
from siman_convert.cli.lines import table_lines
from siman_convert.cli.plan_table import NONE, si
from siman_convert.runtime import native

Row = tuple[str, tuple[str, ...]]  # style and cells


class ProgressLine:
    """What is going on, on stderr where that is a terminal.

    Drawn between rounds only: rich's own refreshing, from a thread, would disturb what is measured.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24))
        quiet = QUIET.get() or not console.file.isatty()
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet)
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, text: str, share: float) -> None:
        self._bar.update(self._task, description=text, completed=share, refresh=True)


def bench_lines(found: Benchmark, width: int | None) -> Iterator[Text]:
    """The machine, the contests, a verdict for each pair, sizes, and the layers; `width`: see `lines`."""
    yield from map(Text, _heading(found))
    yield from _table(_contest_rows(found), width)
    for contest in found.contests:
        yield from (Text(line, style="bold") for line in verdict_lines(contest))
    yield Text()
    yield from _table(_footprint_rows(found), width)
    yield from (Text(f"{absent.name}: {absent.reason}") for absent in found.absent)
    yield Text()
    yield from map(Text, _layer_heading(found))
    yield from _table(_layer_rows(found.layers), width)
    yield Text(_profiler_line(found))


def _table(rows: Iterator[Row], width: int | None) -> Iterator[Text]:
    """A column of names, then figures."""
    styles, cells = zip(*rows, strict=True)
    for style, line in zip(styles, table_lines(cells, width, right=range(1, len(cells[0]))), strict=True):
        yield Text(line, style=style)


def _heading(found: Benchmark) -> Iterator[str]:
    machine, cores = found.machine, found.machine.cores
    engines = f"ONNX Runtime {machine.onnxruntime}"
    engines += f", OpenVINO {machine.openvino}" if machine.openvino else ""
    kernels = f"our kernels: {found.kernels}" if found.kernels else "without our kernels"
    yield f"{machine.processor}, {cores.physical} core{'s' if cores.physical > 1 else ''}; {engines}; {kernels}"
    size, kind = "x".join(map(str, found.image_shape)), "uint8 images" if found.takes_images else "float32 images"
    yield f"{found.subject}: {found.description.architecture}, {len(found.description.classes):,} classes, {kind} of {size}"
    if found.takes_images:
        yield "preprocessing is part of every network here, as it is of the file"
    yield ""


def _contest_rows(found: Benchmark) -> Iterator[Row]:
    titles = ("", "median", "p95", "images/s", "vs binary", "quartiles")
    yield "bold", titles
    for contest in found.contests:
        yield "bold", (f"{threads_text(contest.threads)}, batch {contest.batch_size}", *[""] * (len(titles) - 1))
        yield from (("", _result_cells(result)) for result in contest.results)
        yield "", ("",) * len(titles)


def _result_cells(result: Result) -> tuple[str, ...]:
    return (
        f"  {result.name}",
        milliseconds(result.timing.median_ms),
        milliseconds(result.timing.p95_ms),
        f"{result.images_per_second:,.1f}",
        times(result.ratio.median) if result.ratio else "",
        _spread(result.ratio) if result.ratio else "",
    )


def verdict_lines(contest: Contest) -> Iterator[str]:
    """For every contestant, whether binary is faster."""
    where = f"{threads_text(contest.threads)}, batch {contest.batch_size}"
    for result in contest.results:
        if result.ratio is None:
            continue
        ratio = result.ratio
        if ratio.verdict == "faster":
            yield f"Binary is {times(ratio.median)} faster than {result.name} ({where})."
        elif ratio.verdict == "slower":
            yield f"Binary is NOT faster than {result.name}: {times(ratio.median)}, slower in most rounds ({where})."
        else:
            spread = f"{times(ratio.median)}, half of the rounds {_spread(ratio)}"
            yield f"Binary is NOT measurably faster than {result.name}, nor slower: {spread} ({where})."


def _spread(ratio: Ratio) -> str:
    return f"{times(ratio.low)} to {times(ratio.high)}"


def times(ratio: float) -> str:
    """A ratio as 4.79x, 12.3x."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits: 0.123 ms, 8.42 ms, 142 ms."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} ms"


def _footprint_rows(found: Benchmark) -> Iterator[Row]:
    yield "bold", ("", "ONNX file", "opens in", f"peak memory, batch {found.contests[0].batch_size}")
    for one in found.footprints:
        memory = NONE if one.memory_bytes is None else megabytes(one.memory_bytes)
        yield "", (one.name, megabytes(one.file_bytes), milliseconds(one.open_ms), memory)


def _layer_heading(found: Benchmark) -> Iterator[str]:
    layers = found.layers
    yield f"Where the binary network's time goes ({threads_text(layers.threads)}, batch {layers.batch_size})"
    if layers.ceiling is not None:
        yield f"Ceiling: {layers.ceiling / 1e9:,.0f} G 1-bit MACs/s, what {found.kernels} does on registers alone."
    elif not layers.named:
        yield "Binary layers are ordinary operators here: their own times need our kernels (--backend native)."


def _layer_rows(layers: LayerTimes) -> Iterator[Row]:
    yield "bold", ("", "", "", "", "1-bit", "", "of")
    yield "bold", ("layer", "output", "time", "share", "MACs", "GMAC/s", "ceiling")
    for layer in layers.layers:
        yield "" if layer.kind == "binary" else "dim", _layer_cells(layer, layers)
    macs = sum(layer.macs for layer in layers.layers)
    yield "bold", ("all operators", "", milliseconds(layers.operators_ms), "", si(macs) if macs else NONE, "", "")


def _layer_cells(layer: Layer, layers: LayerTimes) -> tuple[str, ...]:
    of_ceiling = layers.ceiling_share(layer)
    more = f" ({layer.count})" if layer.count > 1 else " (8-bit)" if layer.kind == "8-bit" else ""
    return (
        f"{layer.name or '(unnamed)'}{more}",
        "x".join(map(str, layer.output_shape[1:])) if layer.output_shape else "",
        f"{layer.microseconds:,.0f} us",
        f"{layer.share:.1%}",
        si(layer.macs) if layer.macs else NONE,
        f"{layer.macs_per_second / 1e9:,.0f}" if layer.macs else NONE,
        NONE if of_ceiling is None else f"{of_ceiling:.1%}",
    )


def _profiler_line(found: Benchmark) -> str:
    layers, unprofiled = found.layers, found.contests[0].results[0].timing.median_ms
    return (
        f"Medians of ONNX Runtime's profiler, which slows every operator: {milliseconds(layers.operators_ms)} in operators of "
        f"a run's {milliseconds(layers.run_ms)}; a run without it takes {milliseconds(unprofiled)}."
    )


def bench_record(found: Benchmark) -> dict[str, Any]:
    """The same as JSON: milliseconds, bytes, shares from 0 to 1; ratios are the other's time over the binary network's."""
    description, machine = found.description, found.machine
    return {
        "subject": found.subject,
        "architecture": description.architecture,
        "classes": len(description.classes),
        "image_shape": list(found.image_shape),
        "takes_images": found.takes_images,
        "backend": found.backend,
        "variant": found.kernels,
        "note": None if native.variants() else native.MISSING,
        "machine": {**machine._asdict(), "cores": machine.cores._asdict()},
        "contests": [_contest_record(contest) for contest in found.contests],
        "footprints": [asdict(one) for one in found.footprints],
        "absent": [asdict(one) for one in found.absent],
        "layers": _layers_record(found),
    }


def _contest_record(contest: Contest) -> dict[str, Any]:
    results = [
        {
            "name": result.name,
            "median_ms": result.timing.median_ms,
            "p95_ms": result.timing.p95_ms,
            "images_per_second": result.images_per_second,
            "runs": result.timing.runs,
            "rounds": len(result.timing.rounds_ms),
            "ratio": asdict(result.ratio) if result.ratio else None,
            "binary_is": result.ratio.verdict if result.ratio else None,
        }
        for result in contest.results
    ]
    return {"threads": contest.threads, "batch_size": contest.batch_size, "results": results}


def _layers_record(found: Benchmark) -> dict[str, Any]:
    layers = found.layers
    rows = [
        asdict(layer)
        | {
            "macs_per_second": layer.macs_per_second if layer.macs else None,
            "ceiling_share": layers.ceiling_share(layer),
        }
        for layer in layers.layers
    ]
    return {
        "threads": layers.threads,
        "batch_size": layers.batch_size,
        "ceiling_macs_per_second": layers.ceiling,
        "operators_ms": layers.operators_ms,
        "profiled_run_ms": layers.run_ms,
        "unprofiled_run_ms": found.contests[0].results[0].timing.median_ms,
        "rows": rows,
    }
