"""How a benchmark is shown: tables and sentences for people, a record for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from siman_convert.benchmark.comparison import Benchmark, Contest, Result, threads_text
from siman_convert.benchmark.layers import Layer, LayerTimes
from siman_convert.benchmark.rounds import Ratio
from siman_convert.cli.common import QUIET, megabytes
from siman_convert.cli.plan_table import NONE, si
from siman_convert.runtime import native

_FIGURES = 54  # columns that all but a layer's name take


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


def render_bench(console: Console, found: Benchmark) -> None:
    """The machine, the contests, a verdict for each pair, sizes, and the layers."""
    for line in _heading(found):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(_contest_table(found))
    for contest in found.contests:
        for line in verdict_lines(contest):
            console.print(escape(line), style="bold", highlight=False, soft_wrap=True)
    console.print()
    console.print(_footprint_table(found))
    for absent in found.absent:
        console.print(escape(f"{absent.name}: {absent.reason}"), highlight=False, soft_wrap=True)
    console.print()
    for line in _layer_heading(found):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(_layer_table(found.layers, console.width))
    console.print(escape(_profiler_line(found)), highlight=False, soft_wrap=True)


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


def _contest_table(found: Benchmark) -> Table:
    table = _table("", "median", "p95", "images/s", "vs binary", "quartiles")
    for contest in found.contests:
        table.add_row(f"[bold]{threads_text(contest.threads)}, batch {contest.batch_size}[/]")
        for result in contest.results:
            table.add_row(*_result_cells(result))
        table.add_row()
    return table


def _result_cells(result: Result) -> tuple[str, ...]:
    return (
        f"  {escape(result.name)}",
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


def _footprint_table(found: Benchmark) -> Table:
    first = found.contests[0]
    table = _table("", "ONNX file", "opens in", f"peak memory, batch {first.batch_size}")
    for one in found.footprints:
        memory = NONE if one.memory_bytes is None else megabytes(one.memory_bytes)
        table.add_row(escape(one.name), megabytes(one.file_bytes), milliseconds(one.open_ms), memory)
    return table


def _layer_heading(found: Benchmark) -> Iterator[str]:
    layers = found.layers
    yield f"Where the binary network's time goes ({threads_text(layers.threads)}, batch {layers.batch_size})"
    if layers.ceiling is not None:
        yield f"Ceiling: {layers.ceiling / 1e9:,.0f} G 1-bit MACs/s, what {found.kernels} does on registers alone."
    elif not layers.named:
        yield "Binary layers are ordinary operators here: their own times need our kernels (--backend native)."


def _layer_table(layers: LayerTimes, width: int) -> Table:
    table = _table("layer", "output", "time", "share", "1-bit\nMACs", "\nGMAC/s", "of\nceiling")
    table.columns[0].max_width = max(16, width - _FIGURES)
    for layer in layers.layers:
        table.add_row(*_layer_cells(layer, layers), style="" if layer.kind == "binary" else "dim")
    table.add_section()
    macs = sum(layer.macs for layer in layers.layers)
    table.add_row(
        "all operators", "", milliseconds(layers.operators_ms), "", si(macs) if macs else NONE, "", "", style="bold"
    )
    return table


def _layer_cells(layer: Layer, layers: LayerTimes) -> tuple[str, ...]:
    of_ceiling = layers.ceiling_share(layer)
    more = f" ({layer.count})" if layer.count > 1 else " (8-bit)" if layer.kind == "8-bit" else ""
    return (
        escape(f"{layer.name or '(unnamed)'}{more}"),
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


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(f"\n{first}" if "\n" in "".join(others) else first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


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
        "note": None if found.backend == "native" else native.MISSING,
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
