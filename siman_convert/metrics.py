"""Top-1, top-5 and loss of a model on a loader's images, in float32 without autocast."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.data import BadRecord, Batch
from siman_convert.errors import InputError

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


@dataclass(frozen=True)
class Metrics:
    """top1, top5: percent of `images`; loss: mean cross-entropy in nats; seconds: wall time; bad: unreadable images.

    classes: how many the network tells apart.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float
    bad: tuple[BadRecord, ...]
    classes: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0


def tells_top5(classes: int) -> bool:
    """Whether top-5 says anything: of 5 classes, any 5 answers hold the right one."""
    return classes > 5


@dataclass(frozen=True)
class AccuracyChange:
    """Top-1, percent, of the same `images` validation images before and after weights were rounded."""

    before: float
    after: float
    images: int


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    channels_last: bool = False,
    reduce: Reduce = lambda total: total,
    each: Callable[[int], None] = lambda _images: None,
) -> Metrics:
    """Evaluate in eval mode; the training flag is put back. `each` hears of the images done after every batch.

    Counts are exact over any number of processes: every process sums its own part, `reduce` adds the sums up.
    """
    training = model.training
    model.eval()
    started = time.perf_counter()
    totals = torch.zeros(4, dtype=torch.float64)  # correct at 1, correct at 5, loss, images
    bad: list[BadRecord] = []
    classes = 0
    for batch in batches:
        bad.extend(batch.bad)
        if len(batch.targets):
            images = batch.images.to(device, non_blocking=True)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            logits = model(images).float().cpu()
            classes = logits.shape[1]
            totals += _batch_totals(logits, batch.targets)
            each(len(batch.targets))
    model.train(training)
    correct1, correct5, loss, count = reduce(totals).tolist()
    if count == 0:
        raise InputError("not one validation image could be read; check the data")
    seconds = time.perf_counter() - started
    return Metrics(
        100 * correct1 / count, 100 * correct5 / count, loss / count, int(count), seconds, tuple(bad), classes
    )


def _batch_totals(logits: Tensor, targets: Tensor) -> Tensor:
    """(correct at 1, correct at 5, summed loss, images); with fewer than 5 classes, top-5 takes all of them."""
    order = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = order == targets[:, None]
    loss = F.cross_entropy(logits.double(), targets, reduction="sum")
    return torch.stack(
        [hits[:, 0].sum().double(), hits.sum().double(), loss, torch.tensor(float(len(targets))).double()]
    )
