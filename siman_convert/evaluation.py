"""Evaluating a run: its data and its weights again, and their metrics."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from siman_convert.data import Preprocess, Source, eval_loader, eval_transform, iterate, open_source
from siman_convert.errors import InputError
from siman_convert.guards import one_line_errors
from siman_convert.metrics import Metrics, evaluate_model
from siman_convert.models import create
from siman_convert.runs import Run, find_run
from siman_convert.surgery import apply_plan


def evaluate(
    run: Run | str | Path | None = None,
    *,
    which: str = "best",
    data: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
) -> Metrics:
    """Metrics of a run's `best`, `last` or `full-precision` weights; None: the newest run in `runs/`.

    On the run's own data with its batch size this repeats, on one CPU process to the last digit, what training reported.
    """
    run = run if isinstance(run, Run) else find_run(run, Path("runs"))
    recipe = run.recipe()
    target = resolve_device(device)
    source = open_run_data(run, data)
    model = load_run_model(run, which).to(target)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    transform = eval_transform(Preprocess.from_dict(run.info().preprocess))
    loader = eval_loader(source.val, transform, batch_size=batch_size or recipe.batch_size, workers=workers)
    with one_line_errors(recipe.batch_size, recipe.grad_accum_steps):
        return evaluate_model(model, iterate(loader), target, channels_last=recipe.channels_last)


def open_run_data(run: Run, data: str | None = None) -> Source:
    """The data a run was made with, or `data` of the same classes instead; InputError when the classes differ."""
    info, recipe = run.info(), run.recipe()
    source = open_source(data or info.data, val_split=recipe.val_split, seed=recipe.seed)
    if source.classes != info.classes:
        theirs, ours = len(source.classes), len(info.classes)
        raise InputError(
            f"{source.spec}: its {theirs} classes are not the {ours} that {run.name} was trained on; "
            "expected the same names in the same order"
        )
    return source


def load_run_model(run: Run, which: str = "best") -> nn.Module:
    """The `best`, `last` or `full-precision` model of a run, in eval mode. Raises InputError."""
    info = run.info()
    path = run.weights(which)
    model = create(info.model, len(info.classes))
    if which != "full-precision":
        model = apply_plan(model, run.plan(), init="copy", selection=run.recipe().binarizer)
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not this run's: {' '.join(str(error).split())[:160]}") from error
    return model.eval()


def resolve_device(device: str) -> torch.device:
    """ "auto" is a GPU where CUDA has one, else the CPU. Raises InputError for a device that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError("it has no float64, which the threshold is taken in")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not usable here ({reason}); expected auto, cpu, cuda or cuda:N") from None
    return torch.device(device)
