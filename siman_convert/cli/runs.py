"""`siman runs`: what was converted, how far it got, how good it is."""

from typing import Any

from siman_convert.cli.common import RUNS, Json, Output, megabytes, percent, print_json


def runs(output: Output = RUNS, as_json: Json = False) -> None:
    """List the runs in a folder, oldest first."""
    from siman_convert.errors import InputError
    from siman_convert.recipe import Recipe
    from siman_convert.runs import Progress, Run, all_runs

    def epochs_of(progress: Progress, recipe: Recipe) -> dict[str, int]:
        if progress.phase == "full-precision":
            return {"epochs_done": progress.epoch, "epochs": recipe.fp_epochs}
        before = recipe.resolved_stages[progress.stage].before
        return {"epochs_done": before + progress.epoch, "epochs": recipe.binary_epochs}

    def describe(run: Run) -> dict[str, Any]:
        try:
            info, recipe, progress = run.info(), run.recipe(), run.progress()
        except InputError as error:
            return {"name": run.name, "error": str(error)}
        return {
            "name": run.name,
            "model": info.model,
            "data": info.data_name,
            "phase": progress.phase,
            **epochs_of(progress, recipe),
            "finished": progress.finished(recipe),
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
        _print_table(found)


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for title in ("state", "full precision", "binary", "exported"):
        table.add_column(title, no_wrap=True)
    for run in found:
        if "error" in run:
            table.add_row(run["name"], "unreadable")
            continue
        state = "finished" if run["finished"] else f"{run['phase']} {run['epochs_done']}/{run['epochs']}"
        files = "\n".join(f"{name} {megabytes(size)}" for name, size in run["exported"].items())
        table.add_row(run["name"], state, percent(run["full_precision_top1"]), percent(run["best_top1"]), files)
    Console().print(table)
