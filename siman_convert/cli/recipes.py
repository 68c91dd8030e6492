"""`siman recipes`: list, show and copy the recipes shipped with siman."""

from pathlib import Path
from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import Json, print_json

app = typer.Typer(help="List, show and copy recipes.")
Name = Annotated[str, typer.Argument(help="A shipped recipe, or a file.", autocompletion=complete.recipes)]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from siman_convert.recipe import shipped_recipes

    known = shipped_recipes()
    if as_json:
        print_json({"recipes": [{"name": name, "summary": summary} for name, summary in known.items()]})
        return
    width = max(map(len, known))
    for name, summary in known.items():
        print(f"{name:{width}}  {summary}")


@app.command("show")
def show(
    name: Name,
    resolved: Annotated[bool, typer.Option("--all", help="Every field with its value, defaults too.")] = False,
    as_json: Json = False,
) -> None:
    """Print a recipe: its text, or with --all every field."""
    from siman_convert.recipe import load_recipe, recipe_text

    if as_json:
        print_json({"name": name, "recipe": load_recipe(name).model_dump(mode="json")})
    else:
        print((load_recipe(name).to_yaml() if resolved else recipe_text(name)).rstrip())


@app.command("cp")
def cp(
    name: Name,
    target: Annotated[Path, typer.Argument(help="The file to write; must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe to a file of yours.

    Change it there, and use it with --recipe FILE.
    """
    from siman_convert.errors import InputError
    from siman_convert.files import disk_errors, write_text
    from siman_convert.recipe import recipe_text

    text = recipe_text(name)
    file = target / f"{name}.yaml" if target.is_dir() else target
    if file.exists():
        raise InputError(f"{file} exists already; choose another name")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    with disk_errors(file):
        write_text(file, text)
    if as_json:
        print_json({"wrote": str(file)})
        return
    print(f"wrote {file}; use it with --recipe {file}")
