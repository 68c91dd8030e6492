"""`siman report`: a run as one HTML page, or two runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, Device, Json, Output, Workers, megabytes, print_json

if TYPE_CHECKING:
    from siman_convert.report.reporting import Written

LIBRARIES = ("altair", "vl_convert")  # of the extra "report"


def report(
    what: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run; default: the newest.", autocompletion=complete.runs)
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="RUN RUN", help="Two runs of one network, such as one with and one without weight decay."),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights instead of the best.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", "--data-dir", help="Other images of the same classes; default: the run's.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="File to write; default: report.html in the run's folder."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Put every figure into this folder, too, as a PNG file.")
    ] = None,
    workers: Workers = 0,
    device: Device = "auto",
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Show a run, or two beside each other, as one HTML page.

    Training, weights, mistakes, sizes and times. The page needs no network and no other file.
    """
    from siman_convert.errors import InputError
    from siman_convert.runs import find_run

    _require_libraries()
    if compare is not None and (what is not None or last or data is not None):
        raise InputError("--compare takes two runs and their last weights; it goes with no other RUN, --last or --data")
    for run in compare or (what,):
        find_run(run, output)
    from siman_convert.cli.terminal import Terminal
    from siman_convert.report import reporting

    if compare is not None:
        written = reporting.compare(*compare, html=html, png=png, output=output)
    else:
        with Terminal(aside=as_json) as terminal:
            written = reporting.report(
                what,
                which="last" if last else "best",
                data=data,
                html=html,
                png=png,
                output=output,
                device=device,
                workers=workers,
                watcher=terminal,
            )
    if as_json:
        print_json(_record(written))
    else:
        _print(written)


def _require_libraries() -> None:
    """InputError where what draws is not installed."""
    from importlib.util import find_spec

    from siman_convert.errors import InputError

    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise InputError(
            f"siman report draws with {' and '.join(missing)}, not installed here: pip install 'siman-convert[report]'"
        )


def _print(written: Written) -> None:
    for content in written.contents:
        if content.left_out is not None:
            print(f"without confusion matrix and misclassified images: {content.left_out}")
    for line in written.findings:
        print(line)
    print(f"wrote     {written.html}  {megabytes(written.html.stat().st_size)}")
    if written.pngs:
        print(f"wrote     {len(written.pngs)} figures in {written.pngs[0].parent}")


def _record(written: Written) -> dict[str, Any]:
    return {
        "html": str(written.html),
        "bytes": written.html.stat().st_size,
        "png": [str(path) for path in written.pngs],
        "findings": list(written.findings),
        "runs": [_run_record(content) for content in written.contents],
    }


def _run_record(content: Any) -> dict[str, Any]:
    from dataclasses import asdict

    layers = [
        {
            "name": layer.name,
            "filters": layer.filters,
            "weights_per_filter": layer.size,
            "used": layer.used,
            "laplacian": {"location": layer.laplace[0], "scale": layer.laplace[1]},
            "distances": layer.distances,
            "nearest": layer.shape,
            "bits": {name: asdict(bits) for name, bits in layer.bits.items()},
        }
        for layer in content.layers
    ]
    answers = content.predictions
    return {
        "run": str(content.folder),
        "weights": content.which,
        "top1": answers.top1 if answers else None,
        "confusion": answers.confusion.tolist() if answers else None,
        "left_out": content.left_out,
        "layers": layers,
    }
