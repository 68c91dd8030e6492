"""`siman eval`: accuracy of a run's weights, or of an exported file, on images."""

from pathlib import Path
from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, BackendName, Device, Json, Output, Workers, print_json, say_what_runs_slowly


def evaluate(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run, an .onnx or a .safetensors file; default: the newest run.",
            autocompletion=complete.runs,
        ),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights instead of the best.")] = False,
    full_precision: Annotated[
        bool, typer.Option("--full-precision", help="The full-precision model the run was converted from.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", "--data-dir", help="Other data of the same classes; default: the run's.")
    ] = None,
    backend: BackendName = None,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", min=1, help="Images at a time; default: the run's.")
    ] = None,
    workers: Workers = 0,
    device: Device = "auto",
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Evaluate a run or an exported file on validation images.

    Prints top-1, top-5, loss and images a second.
    """
    from dataclasses import asdict

    from siman_convert.errors import InputError
    from siman_convert.names import is_file, require_subject
    from siman_convert.runs import find_run

    if last and full_precision:
        raise InputError("--last and --full-precision exclude each other")
    file = what is not None and is_file(what)
    if file and (last or full_precision):
        raise InputError(f"{what} holds one network; --last and --full-precision are for runs")
    require_subject(what, output)
    from siman_convert.backends import default_onnx_backend, require_backend
    from siman_convert.evaluation import evaluate as evaluate_subject
    from siman_convert.metrics import tells_top5
    from siman_convert.runtime import native

    which = "last" if last else "full-precision" if full_precision else "best"
    found = Path(what) if file and what else find_run(what, output)
    metrics = evaluate_subject(
        found,
        which=which,
        data=data,
        backend=require_backend(backend),
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    name = str(found) if isinstance(found, Path) else str(found.folder)
    weights = None if file else which
    ran = backend or (default_onnx_backend() if name.endswith(".onnx") else "torch")
    say_what_runs_slowly(ran, backend)
    if ran == "native":
        ran += f" ({native.variant()})"
    if as_json:
        bad = [record._asdict() for record in metrics.bad]
        rate = {"images_per_second": metrics.images_per_second}
        print_json({"run": name, "weights": weights, "backend": ran, **asdict(metrics), **rate, "bad": bad})
        return
    print(f"{name}, {f'{weights} weights, ' if weights else ''}{metrics.images:,} images:")
    top5 = f"top-5 {metrics.top5:.2f} %   " if tells_top5(metrics.classes) else ""
    print(
        f"top-1 {metrics.top1:.2f} %   {top5}loss {metrics.loss:.4f}   {metrics.images_per_second:.1f} images/s in {ran}"
    )
    for record in metrics.bad:
        print(f"skipped an unreadable image: {record.path}: {record.why}")
