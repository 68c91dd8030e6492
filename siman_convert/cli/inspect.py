"""`siman inspect`: the plan of a model, a run or an exported file, and what it costs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, Json, Output, print_json


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN|FILE",
            help="A timm model, a run, or an exported file.",
            autocompletion=complete.models_or_runs,
        ),
    ],
    keep: Annotated[list[str], typer.Option(help="Glob of convolutions to keep in full precision.")] = [],
    binarize: Annotated[list[str], typer.Option(help="Glob of convolutions to binarize all the same.")] = [],
    shortcuts: Annotated[bool, typer.Option("--shortcuts", help="As of convert.")] = False,
    prelu: Annotated[bool, typer.Option("--prelu", help="As of convert.")] = False,
    shifts: Annotated[bool, typer.Option("--shifts", help="As of convert.")] = False,
    img_size: Annotated[int | None, typer.Option(help="Input height and width; default: the model's.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Classes; default: the model's.")] = None,
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Show what becomes binary, why, and what it saves."""
    from rich.console import Console

    from siman_convert.cli.int8_text import quantization_lines
    from siman_convert.cli.lines import folded, terminal_width
    from siman_convert.cli.plan_table import inspect_record, plan_lines
    from siman_convert.cli.topology_text import topology_lines
    from siman_convert.errors import InputError
    from siman_convert.inspection import inspect_file, inspect_model, inspect_run
    from siman_convert.names import is_file

    run = next((path for path in (Path(model), output / model) if (path / "run.json").is_file()), None)
    planned = run is not None or is_file(model)
    if planned and (keep or binarize or num_classes or shortcuts or prelu or shifts or img_size is not None):
        raise InputError(f"{model} has its plan already; --keep, --img-size and the other options are for models")
    quantization = None
    if run is not None:
        plan, costs = inspect_run(run)
    elif is_file(model):
        plan, costs, quantization = inspect_file(Path(model))
    else:
        wishes = {"shortcuts": shortcuts, "prelu": prelu, "shifts": shifts}
        plan, costs = inspect_model(model, num_classes, img_size=img_size, keep=keep, binarize=binarize, **wishes)
    if as_json:
        print_json(inspect_record(plan, costs) | {"int8": asdict(quantization) if quantization else None})
        return
    console, width = Console(highlight=False), terminal_width()
    for text in plan_lines(plan, costs, width):
        console.print(text, soft_wrap=True)
    for line in topology_lines(plan.topology):
        print(folded(line, width, indent=18))
    for line in quantization_lines(quantization) if quantization else ():
        print(folded(line, width, indent=10))
