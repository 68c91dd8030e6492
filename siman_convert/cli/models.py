"""`siman models`: timm's architectures and what a plan makes of each, from a table shipped with the package."""

from typing import Annotated

import typer

from siman_convert.cli.common import Json, print_json


def models(
    pattern: Annotated[str, typer.Argument(help="A glob such as 'resnet*', or part of a name; default: all.")] = "*",
    as_json: Json = False,
) -> None:
    """List timm models and how much of each becomes binary."""
    from siman_convert.model_table import matching, read_table

    rows = matching(read_table(), pattern)
    if as_json:
        print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'model':{width}}  convolutions  become binary")
    for row in rows:
        print(f"{row['name']:{width}}  {row['convolutions']:12}  {row['binarized'] or '-':>13}")
