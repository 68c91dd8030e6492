"""`siman verify`: whether an exported file computes what the network does; exit code 3 where not."""

from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, Json, Output, print_json


def verify(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run, an .onnx or a .safetensors file; default: newest run.",
            autocompletion=complete.runs,
        ),
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights, for a run without exported files.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", "--data-dir", help="Images to verify on; default: the run's.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many of them.")] = 256,
    output: Output = RUNS,
    as_json: Json = False,
) -> int:
    """Compare torch, ONNX Runtime and the reference on real images.

    A run: its exported files, or what it would export. Exits with 3 where something is outside the bounds it prints.
    """
    from siman_convert.errors import InputError
    from siman_convert.names import is_file, require_subject

    if last and what is not None and is_file(what):
        raise InputError(f"{what} holds one network; --last is for runs")
    require_subject(what, output)
    from siman_convert.cli.terminal import Terminal
    from siman_convert.cli.verification_text import detail_lines, summary_lines, verification_record
    from siman_convert.verification import verify

    with Terminal(aside=as_json) as terminal:
        found = verify(
            what, which="last" if last else "best", data=data, images=images, output=output, watcher=terminal
        )
    if as_json:
        print_json({"subjects": {name: verification_record(one) for name, one in found.items()}})
    else:
        for name, one in found.items():
            print(f"{name}: {'FAILED' if one.failures else 'passed'}")
            for line in (*summary_lines(one), *detail_lines(one)):
                print(f"  {line}")
    return 3 if any(one.failures for one in found.values()) else 0
