"""`siman runs`: what was converted, how far it got, how good it is."""

from collections.abc import Iterator
from typing import Any

from siman_convert.cli.common import RUNS, Json, Output, megabytes, percent, print_json

TITLES = (("", "", "full", "", ""), ("run", "status", "precision", "binary", "exported"))


def runs(output: Output = RUNS, as_json: Json = False) -> None:
    """List the runs in a folder, oldest first.

    A run is running while a process trains it, and stopped where `siman convert --resume` would go on.
    """
    from siman_convert.cli.lines import table_lines, terminal_width
    from siman_convert.errors import InputError
    from siman_convert.runs import Run, all_runs

    def describe(run: Run) -> dict[str, Any]:
        try:
            running = run.in_training()  # first: what ends meanwhile is done, not stopped
            info, recipe, progress = run.info(), run.recipe(), run.progress()
        except InputError as error:
            return {"name": run.name, "status": "unreadable", "error": str(error)}
        finished = progress.finished(recipe)
        return {
            "name": run.name,
            "status": "running" if running else "done" if finished else "stopped",
            "model": info.model,
            "data": info.data_name,
            "phase": progress.phase,
            **dict(zip(("epochs_done", "epochs"), progress.epochs(recipe), strict=True)),
            "finished": finished,
            "full_precision_top1": progress.top1("full-precision"),
            "best_top1": progress.best_top1,
            "exported": {path.name: path.stat().st_size for path in sorted(run.folder.glob("model.*"))},
        }

    found = [describe(run) for run in all_runs(output)]
    if as_json:
        print_json({"runs": found})
    elif not found:
        print(f"no runs in {output}; start one with `siman convert MODEL --data PATH`")
    else:
        rows = [row for run in found for row in _rows(run)]
        print(*table_lines([*TITLES, *rows], terminal_width()), sep="\n")
        for run in found:
            if "error" in run:
                print(f"{run['name']}: {run['error']}")


def _rows(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One for each exported file, at least one."""
    if "error" in run:
        yield run["name"], run["status"], "", "", ""
        return
    files = [f"{name} {megabytes(size)}" for name, size in run["exported"].items()] or [""]
    yield run["name"], _status(run), percent(run["full_precision_top1"]), percent(run["best_top1"]), files[0]
    yield from (("", "", "", "", file) for file in files[1:])


def _status(run: dict[str, Any]) -> str:
    """`done`, or how many epochs of the phase are complete."""
    phase = "" if run["phase"] == "binary" else f"{run['phase']} "
    epoch = f"{phase}epoch {run['epochs_done']} of {run['epochs']}"
    return {"done": "done", "running": f"running, {epoch}", "stopped": f"stopped at {epoch}"}[run["status"]]
