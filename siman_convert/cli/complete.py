"""What the shell offers behind TAB: names of models, recipes and runs. Nothing heavy is imported: a shell asks at every TAB."""

from pathlib import Path

import typer

from siman_convert.cli.common import RUNS


def models(incomplete: str) -> list[str]:
    """timm's architectures and the paper's networks."""
    from siman_convert.model_table import read_table

    return [row["name"] for row in read_table() if row["name"].startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """The shipped recipes; where none begins so, the shell offers files."""
    import importlib.resources

    files = (item.name for item in importlib.resources.files("siman_convert.recipes").iterdir())
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    return [name for name in names if name.startswith(incomplete)]


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs in --output, newest first; where none begins so, the shell offers files."""
    given = ctx.params.get("output")
    output = Path(given) if given and ctx.command.name != "export" else RUNS  # export's is where the file goes
    names = [path.parent.name for path in output.glob("*/run.json")]
    found = [output / name / "run.json" for name in names if name.startswith(incomplete) and name[0] != "."]
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def resumable(ctx: typer.Context, incomplete: str) -> list[str]:
    """What --resume takes."""
    return [*(["last"] if "last".startswith(incomplete) else []), *runs(ctx, incomplete)]


def models_or_runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """What `siman inspect` takes, files apart."""
    return [*runs(ctx, incomplete), *models(incomplete)]
