"""The command line: parses, calls, prints. Everything it does can be called from Python without it.

Nothing here imports torch or timm before a command that needs them runs: `siman --help` has to answer at once.
"""

import logging
import os
import sys
import traceback
from typing import Annotated

import typer
from typer.completion import (  # type: ignore[attr-defined, unused-ignore]
    Shells,
    completion_init,
    install_callback,
    show_callback,
)

from siman_convert.cli import (
    bench,
    convert,
    doctor,
    evaluate,
    export,
    inspect,
    models,
    predict,
    recipes,
    report,
    runs,
    verify,
)
from siman_convert.cli.common import QUIET
from siman_convert.cli.help import Command
from siman_convert.errors import SimanError
from siman_convert.launch import fails_first

HELP = """Turn a timm CNN into a binary neural network, and export one small file.

\b
  siman convert resnet18 --data /imagenet --epochs 30   convert and fine-tune
  siman export --format onnx                            one file that runs everywhere
  siman eval                                            accuracy of the newest run
"""
EXIT_CODES = "Exit codes: 0 done, 2 wrong usage or input, 3 mismatch found, 1 other failures, 130 interrupted."
QUIETLY, VERBOSELY = ("-q", "--quiet"), ("-v", "--verbose", "--debug")


def make_app() -> typer.Typer:
    """The commands. Their help is plain text: rich's takes 0.1 s more to import, and is cut in narrow terminals."""
    completion_init()
    app = typer.Typer(
        name="siman",
        help=HELP,
        epilog=EXIT_CODES,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(options)
    app.command("convert", cls=Command)(convert.convert)
    app.command("eval", cls=Command)(evaluate.evaluate)
    app.command("export", cls=Command)(export.export)
    app.command("predict", cls=Command)(predict.predict)
    app.command("verify", cls=Command)(verify.verify)
    app.command("bench", cls=Command)(bench.bench)
    app.command("report", cls=Command)(report.report)
    app.command("inspect", cls=Command)(inspect.inspect)
    app.command("models", cls=Command)(models.models)
    app.command("runs", cls=Command)(runs.runs)
    app.command("doctor", cls=Command)(doctor.doctor)
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
    quiet: Annotated[bool, typer.Option(*QUIETLY, help="Print results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option(*VERBOSELY, help="Show tracebacks and what libraries log.")] = False,
    show: Annotated[
        Shells | None,
        typer.Option(
            "--show-completion",
            metavar="SHELL",
            is_eager=True,
            callback=show_callback,
            help="Print its completion script.",
        ),
    ] = None,
    install: Annotated[
        Shells | None,
        typer.Option(
            "--install-completion",
            metavar="SHELL",
            is_eager=True,
            callback=install_callback,
            help="For bash, zsh, fish, pwsh.",
        ),
    ] = None,
) -> None:
    """Options before the command; `run` has taken -q and -v, which may stand anywhere, out of the line already."""


def main() -> None:
    """Entry point of the `siman` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 2 wrong usage or input, 3 mismatch, 130 interrupted, else 1."""
    verbose = bool({*VERBOSELY} & {*arguments}) or bool(os.environ.get("SIMAN_DEBUG"))
    quiet = QUIET.set(bool({*QUIETLY} & {*arguments}))
    arguments = [argument for argument in arguments if argument not in (*QUIETLY, *VERBOSELY)]
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        arguments = arguments or ["--help"]
        code = make_app()(arguments, prog_name="siman", standalone_mode=False)
    except SimanError as error:
        _trace(verbose)
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's usage errors; their class moved between its versions
            return _fail(f"{error.format_message()} (try --help)", 2)
        _trace(verbose)
        first_line = (str(error).strip().splitlines() or [""])[0]
        return _fail(f"{type(error).__name__}: {first_line}; -v shows where", 1)
    finally:
        QUIET.reset(quiet)
    return code if isinstance(code, int) else 0


def _trace(verbose: bool) -> None:
    if verbose:
        traceback.print_exc()


def _fail(message: str, code: int) -> int:
    if fails_first():
        print(f"siman: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
