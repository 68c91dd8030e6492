"""The command line: parses, calls, prints. Everything it does can be called from Python without it.

Nothing here imports torch or timm before a command that needs them runs: `siman --help` has to answer at once.
"""

import os
import sys
from typing import Annotated, Literal

import typer

from siman_convert.cli import bench, convert, evaluate, export, inspect, models, predict, recipes, report, runs, verify
from siman_convert.errors import SimanError
from siman_convert.launch import fails_first

HELP = """Turn a timm CNN into a binary neural network, and export one small file.

\b
  siman inspect resnet18                                what would become binary
  siman convert resnet18 --data /imagenet --epochs 30   convert and fine-tune
  siman export --format onnx                            one file that runs everywhere
  siman eval                                            accuracy of the newest run
"""


def make_app(rich_help: bool = True) -> typer.Typer:
    """The commands. rich's help has panels but takes 0.1 s more to import: the overview does without."""
    mode: Literal["rich"] | None = "rich" if rich_help else None
    app = typer.Typer(name="siman", help=HELP, rich_markup_mode=mode, pretty_exceptions_enable=False)
    app.callback()(options)
    app.command("convert")(convert.convert)
    app.command("eval")(evaluate.evaluate)
    app.command("export")(export.export)
    app.command("predict")(predict.predict)
    app.command("verify")(verify.verify)
    app.command("bench")(bench.bench)
    app.command("report")(report.report)
    app.command("inspect")(inspect.inspect)
    app.command("models")(models.models)
    app.command("runs")(runs.runs)
    app.add_typer(recipes.app, name="recipes")
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"siman {version('siman-convert')}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the line.")] = False,
) -> None:
    """Options before the command; `run` has taken --debug out of the line already."""


def main() -> None:
    """Entry point of the `siman` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 2 wrong usage or input, 3 mismatch, 130 interrupted, else 1."""
    debug = "--debug" in arguments or bool(os.environ.get("SIMAN_DEBUG"))
    try:
        arguments = arguments or ["--help"]
        app = make_app(rich_help=arguments != ["--help"])
        code = app(
            [argument for argument in arguments if argument != "--debug"], prog_name="siman", standalone_mode=False
        )
    except SimanError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's usage errors; their class moved between its versions
            return _fail(f"{error.format_message()} (try --help)", 2)
        if debug:
            raise
        first_line = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {first_line}; --debug shows where", 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if fails_first():
        print(f"siman: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
