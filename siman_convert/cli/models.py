"""`siman models`: timm's architectures and what a plan makes of each, from a table shipped with the package."""

from typing import Annotated

import typer

from siman_convert.cli.common import Json, print_json


def models(
    pattern: Annotated[str, typer.Argument(help="A glob such as 'resnet*', or part of a name; default: all.")] = "*",
    as_json: Json = False,
) -> None:
    """List the timm models that can be converted: convolutions, how many become binary, what share of the work."""
    from siman_convert.model_table import matching, read_table

    rows = matching(read_table(), pattern)
    if as_json:
        print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    print(f"{'model':{width}}  convs  binary  binary work  parameters")
    for row in rows:
        share = f"{100 * row['binary_macs_share']:10.1f}%" if row["binarized"] else f"{'-':>11}"
        print(
            f"{row['name']:{width}}  {row['convolutions']:5}  {row['binarized']:6}  {share}  {row['parameters'] / 1e6:9.1f}M"
        )
