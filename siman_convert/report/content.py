"""Everything that a report shows of a run, gathered before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siman_convert.costs import Costs
from siman_convert.data import Preprocess
from siman_convert.errors import InputError
from siman_convert.evaluation import resolve_device
from siman_convert.inspection import inspect_run
from siman_convert.plans import Plan
from siman_convert.recipe import Recipe
from siman_convert.report.predictions import Predictions, predictions
from siman_convert.report.statistics import LayerStatistics, model_statistics
from siman_convert.report.timing import Timing, read_timing
from siman_convert.runs import Record, Run, RunInfo
from siman_convert.subjects import load_run_model, open_run_data
from siman_convert.watch import Watcher


@dataclass(frozen=True)
class Content:
    """One run. which: "best" or "last" weights. exports: bytes by file name.

    predictions: None where the images are not there, for the reason in `left_out`.
    """

    folder: Path
    info: RunInfo
    recipe: Recipe
    which: str
    history: tuple[Record, ...]
    layers: tuple[LayerStatistics, ...]
    plan: Plan
    costs: Costs
    exports: dict[str, int]
    timing: Timing | None
    predictions: Predictions | None
    left_out: str | None

    @property
    def name(self) -> str:
        return self.folder.name

    def newest(self, phase: str) -> Record | None:
        """The last evaluation of a phase."""
        return next((record for record in reversed(self.history) if record["phase"] == phase), None)

    def binary_top1(self) -> float | None:
        """Percent, of the weights that the report is about."""
        binary = [record["top1"] for record in self.history if record["phase"] == "binary"]
        return None if not binary else max(binary) if self.which == "best" else binary[-1]


def gather(
    run: Run,
    *,
    which: str = "best",
    data: str | None = None,
    images: bool = True,
    device: str = "auto",
    workers: int = 0,
    watcher: Watcher | None = None,
) -> Content:
    """Look at a run's `best` or `last` weights, and with `images` at what they answer on its validation images.

    `data`: other images of the same classes; without it images that are not there are left out. Raises InputError.
    """
    watcher = watcher or Watcher()
    info, recipe = run.info(), run.recipe()
    model = load_run_model(run, which)
    layers = tuple(model_statistics(model))
    answers, left_out = None, None
    if images:
        try:
            source = open_run_data(run, data)
        except InputError as error:
            if data is not None:
                raise
            left_out = str(error)
        else:
            watcher.start_evaluation(len(source.val))
            answers = predictions(
                model,
                source.val,
                Preprocess.from_dict(info.preprocess),
                info.classes,
                batch_size=recipe.batch_size,
                workers=workers,
                device=resolve_device(device),
                each=watcher.evaluated,
            )
    plan, costs = inspect_run(run.folder)
    return Content(
        folder=run.folder,
        info=info,
        recipe=recipe,
        which=which,
        history=tuple(run.metrics()),
        layers=layers,
        plan=plan,
        costs=costs,
        exports={path.name: path.stat().st_size for path in sorted(run.folder.glob("model*.*"))},
        timing=read_timing(run.folder),
        predictions=answers,
        left_out=left_out,
    )
