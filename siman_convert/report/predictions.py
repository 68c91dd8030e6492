"""What a network answers on the validation images: how often each class is taken for which, and the worst mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from siman_convert.data import AnySplit, Preprocess, eval_loader, eval_transform, iterate
from siman_convert.errors import InputError
from siman_convert.guards import one_line_errors

WORST = 12  # mistakes that are kept
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mistake:
    """A misclassified image as the network sees it: a PNG file's bytes. Probabilities are softmax's, 0 to 1."""

    png: bytes
    truth: str
    answer: str
    truth_probability: float
    answer_probability: float

    @property
    def data_url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Predictions:
    """confusion: (classes, classes), rows the truth, columns the answer. mistakes: the worst first."""

    classes: tuple[str, ...]
    confusion: Counts
    mistakes: tuple[Mistake, ...]

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.confusion.trace()) / self.images


def predictions(
    model: nn.Module,
    split: AnySplit,
    preprocess: Preprocess,
    classes: tuple[str, ...],
    *,
    batch_size: int,
    workers: int = 0,
    device: torch.device | None = None,
    each: Callable[[int], None] = lambda _images: None,
) -> Predictions:
    """Classify a split. The worst mistakes are those whose true class got the least probability. `each` hears of the
    images of a batch.

    Raises InputError where no image can be read.
    """
    device = device or torch.device("cpu")
    model = model.to(device).eval()
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    worst: list[_Wrong] = []
    loader = eval_loader(split, eval_transform(preprocess), batch_size=batch_size, workers=workers)
    with one_line_errors(batch_size, 1), torch.no_grad():
        for batch in iterate(loader):
            if not len(batch.targets):
                continue
            logs = model(batch.images.to(device)).double().log_softmax(dim=1).cpu()
            answers = logs.argmax(dim=1)
            np.add.at(confusion, (batch.targets.numpy(), answers.numpy()), 1)
            wrong = [
                _Wrong(batch.images[i], logs[i], int(batch.targets[i]))
                for i in (answers != batch.targets).nonzero().flatten().tolist()
            ]
            worst = sorted((*worst, *wrong), key=lambda one: float(one.logs[one.truth]))[:WORST]
            each(len(batch.targets))
    if not confusion.sum():
        raise InputError("not one validation image could be read; check the data")
    return Predictions(classes, confusion, tuple(_mistake(one, preprocess, classes) for one in worst))


class _Wrong(NamedTuple):
    """A misclassified image (C, H, W), normalised; the logarithms of its classes' probabilities; its true class."""

    image: Tensor
    logs: Tensor
    truth: int


def _mistake(wrong: _Wrong, preprocess: Preprocess, classes: tuple[str, ...]) -> Mistake:
    answer, probabilities = int(wrong.logs.argmax()), wrong.logs.exp()
    return Mistake(
        png=_png(wrong.image, preprocess),
        truth=classes[wrong.truth],
        answer=classes[answer],
        truth_probability=float(probabilities[wrong.truth]),
        answer_probability=float(probabilities[answer]),
    )


def _png(image: Tensor, preprocess: Preprocess) -> bytes:
    """A normalised image (C, H, W) as pixels again."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = (image * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
