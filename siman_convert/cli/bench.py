"""`siman bench`: latency, throughput, memory and size beside full precision and int8 of the same network."""

from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, SCHEMA_VERSION, Json, Output, print_json, say_what_runs_slowly


def bench(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run, an .onnx or a .safetensors file; default: the newest run.",
            autocompletion=complete.runs,
        ),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights instead of the best, for a run.")] = False,
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N,...", help="How many; default: 1 and all cores.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("-b", "--batch-size", metavar="N,...", help="Images at a time, as 1,16.")
    ] = "1",
    seconds: Annotated[float, typer.Option(help="To time each network for, at each setting.")] = 3.0,
    backend: Annotated[
        str | None, typer.Option("--backend", help="native or onnxruntime; default: native where it is installed.")
    ] = None,
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Time a binary network beside full precision.

    And beside int8 of the same architecture; all take turns in one process. Prints latency, throughput, whether binary is
    faster, sizes, and every layer's time. A run's figures stay in its folder as bench.json, for `siman report`.
    """
    from rich.console import Console

    from siman_convert.errors import InputError
    from siman_convert.files import disk_errors, write_json
    from siman_convert.names import is_file, require_subject

    if last and what is not None and is_file(what):
        raise InputError(f"{what} holds one network; --last is for runs")
    numbers = [] if threads is None else _numbers("--threads", threads)
    sizes = _numbers("--batch-size", batch_size)
    require_subject(what, output)
    from siman_convert.backends import require_backend
    from siman_convert.benchmark.comparison import bench
    from siman_convert.cli.bench_text import ProgressLine, bench_lines, bench_record
    from siman_convert.cli.lines import terminal_width
    from siman_convert.report.timing import FILE

    chosen = require_backend(backend)
    with ProgressLine() as progress:
        found = bench(
            what,
            which="last" if last else "best",
            backend=chosen,
            threads=numbers,
            batch_sizes=sizes,
            seconds=seconds,
            output=output,
            progress=progress.show,
        )
    record = bench_record(found)
    if found.run is not None:  # first: what was measured is not to be lost with the terminal
        with disk_errors(found.run):
            write_json(found.run / FILE, {"schema_version": SCHEMA_VERSION, **record})
    say_what_runs_slowly(found.backend, backend)
    if as_json:
        print_json(record)
        return
    console = Console(highlight=False)
    for line in bench_lines(found, terminal_width()):
        console.print(line, soft_wrap=True)


def _numbers(flag: str, text: str) -> list[int]:
    """1,2 as numbers; InputError for anything else."""
    from siman_convert.errors import InputError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(f"{flag} {text!r}: expected whole numbers separated by commas, as {flag} 1,2")
    return [int(part) for part in parts]
