"""`siman models`: timm's architectures, what a plan makes of each and how far it came, from tables shipped with the package."""

from typing import Annotated, Any

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import Json, print_json


def models(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="A glob such as 'resnet*', or part of a name; default: all.",
            show_default=False,
            autocompletion=complete.models,
        ),
    ] = "*",
    as_json: Json = False,
) -> None:
    """List timm models and what becomes binary.

    How much of each, and whether every stage passed for it or for one of its family.
    """
    from siman_convert.model_table import matching, read_coverage, read_table, swept

    coverage = read_coverage()
    rows = [{**row, "swept": swept(row, coverage)} for row in matching(read_table(), pattern)]
    if as_json:
        print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'model':{width}}  convolutions  become binary  1-bit MACs  from plan to ONNX")
    for row in rows:
        found = row["swept"]
        own = found is not None and not _is_borrowed(row)
        share = f"{100 * found['binary_macs']:.1f} %" if own and row["binarized"] and "binary_macs" in found else "-"
        outcome = _outcome(found, own) if row["binarized"] else "-"
        print(f"{row['name']:{width}}  {row['convolutions']:12}  {row['binarized'] or '-':>13}  {share:>10}  {outcome}")
    if borrowed := next((row["swept"]["name"] for row in rows if row["binarized"] and _is_borrowed(row)), None):
        print(f"as {borrowed}: that one of its family was tried, this one not")


def _is_borrowed(row: dict[str, Any]) -> bool:
    return row["swept"] is not None and row["swept"]["name"] != row["name"]


def _outcome(found: dict[str, Any] | None, own: bool) -> str:
    if found is None:
        return "-"
    wrong = next((f" at {stage}: {text}" for stage, text in found["stages"].items() if text != "passed"), "")
    return f"{found['outcome']}{'' if own else ' as ' + found['name']}{wrong}"
