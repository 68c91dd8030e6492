"""Evaluating a run or an exported file: its images and its weights again, in any backend, and their metrics."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from siman_convert.backends import Backend, default_backend, open_backend
from siman_convert.data import Preprocess, Source, eval_loader, eval_transform, iterate, pixel_transform
from siman_convert.errors import InputError
from siman_convert.guards import one_line_errors
from siman_convert.metrics import Metrics, evaluate_model
from siman_convert.names import is_file
from siman_convert.runs import Run, find_run
from siman_convert.subjects import Subject, load_run_model, open_file, open_run_data, run_subject, subject_data

FILE_BATCH = 32  # images at a time for a file, which knows no batch size


@dataclass(frozen=True)
class _Trial:
    """Everything an evaluation needs; takes_images: the model wants decoded images, of whatever size each has."""

    model: nn.Module
    backend: Backend
    source: Source
    preprocess: Preprocess
    batch_size: int
    channels_last: bool = False
    takes_images: bool = False


def evaluate(
    what: Run | str | Path | None = None,
    *,
    which: str = "best",
    data: str | None = None,
    backend: Backend | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str = "auto",
) -> Metrics:
    """Metrics of a run's `best`, `last` or `full-precision` weights, or of an exported file; None: the newest run in `runs/`.

    `backend`: torch for a run or a packed file, ONNX Runtime for an ONNX file, unless said otherwise; only torch uses
    `device`. In torch, on the run's own data with its batch size, this repeats on one CPU process to the last digit what
    training reported. Raises InputError.
    """
    target = resolve_device(device)
    if isinstance(what, str | Path) and is_file(what):
        trial = _file_trial(open_file(Path(what)), data, backend)
    else:
        run = what if isinstance(what, Run) else find_run(what, Path("runs"))
        trial = _run_trial(run, which, data, backend or "torch")
    target = target if trial.backend == "torch" else torch.device("cpu")
    model = trial.model.to(target)
    if trial.channels_last:
        model.to(memory_format=torch.channels_last)
    size = 1 if trial.takes_images else batch_size or trial.batch_size
    transform = (pixel_transform if trial.takes_images else eval_transform)(trial.preprocess)
    loader = eval_loader(trial.source.val, transform, batch_size=size, workers=workers)
    with one_line_errors(size, 1):
        return evaluate_model(model, iterate(loader), target, channels_last=trial.channels_last)


def _run_trial(run: Run, which: str, data: str | None, backend: Backend) -> _Trial:
    source, recipe = open_run_data(run, data), run.recipe()
    preprocess = Preprocess.from_dict(run.info().preprocess)
    if backend == "torch":
        model = load_run_model(run, which)
        return _Trial(model, backend, source, preprocess, recipe.batch_size, recipe.channels_last)
    if which == "full-precision":
        raise InputError(f"--backend {backend} runs binary networks; the full-precision one runs in torch")
    subject = run_subject(run, "last" if which == "last" else "best")
    return _Trial(open_backend(subject, backend), backend, source, preprocess, FILE_BATCH)


def _file_trial(subject: Subject, data: str | None, backend: Backend | None) -> _Trial:
    backend = backend or default_backend(subject)
    images = subject.onnx is not None and subject.onnx.variant.takes_images
    source = subject_data(subject, data)
    model = open_backend(subject, backend)
    return _Trial(model, backend, source, subject.description.preprocess, FILE_BATCH, takes_images=images)


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
