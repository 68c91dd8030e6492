"""`siman eval`: accuracy of a run's weights on its data."""

from typing import Annotated

import typer

from siman_convert.cli.common import RUNS, Device, Json, Output, Workers, print_json


def evaluate(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's name or folder; default: the newest.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights instead of the best.")] = False,
    full_precision: Annotated[
        bool, typer.Option("--full-precision", help="The full-precision model the run was converted from.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", "--data-dir", help="Other data of the same classes; default: the run's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("-b", "--batch-size", min=1, help="Images at a time; default: the run's.")
    ] = None,
    workers: Workers = 0,
    device: Device = "auto",
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Evaluate a run on its validation images.

    Prints top-1, top-5, loss and images a second.
    """
    from dataclasses import asdict

    from siman_convert.errors import InputError
    from siman_convert.evaluation import evaluate as evaluate_run
    from siman_convert.runs import find_run

    if last and full_precision:
        raise InputError("--last and --full-precision exclude each other")
    which = "last" if last else "full-precision" if full_precision else "best"
    found = find_run(run, output)
    metrics = evaluate_run(found, which=which, data=data, batch_size=batch_size, workers=workers, device=device)
    if as_json:
        bad = [record._asdict() for record in metrics.bad]
        rate = {"images_per_second": metrics.images_per_second}
        print_json({"run": str(found.folder), "weights": which, **asdict(metrics), **rate, "bad": bad})
        return
    print(f"{found.folder}, {which} weights, {metrics.images:,} images:")
    print(f"top-1 {metrics.top1:.2f} %   top-5 {metrics.top5:.2f} %   loss {metrics.loss:.4f}   "
          f"{metrics.images_per_second:.1f} images/s")  # fmt: skip
    for record in metrics.bad:
        print(f"skipped an unreadable image: {record.path}: {record.why}")
