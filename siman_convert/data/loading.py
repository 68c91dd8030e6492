"""Loaders whose batches depend on (seed, epoch, batch number) only: not on workers, on where a run was resumed, or on
what else drew random numbers. The order is a permutation drawn from (seed, epoch); every sample's augmentation is
seeded from (seed, epoch, index). They cut the data over ranks themselves: do not pass them to accelerator.prepare.

Iterate them with `iterate`, which turns what goes wrong in workers into one-line errors. Streams (StreamSplit) keep
timm's own order and sharding: the same batches for the same number of workers and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from siman_convert.data.preprocess import Transform
from siman_convert.data.seeding import borrowed_generators, mix, permutation, sample_seeds, seed_generators
from siman_convert.data.split import AnySplit, BadImage, Split, StreamSplit
from siman_convert.data.streaming import StreamLoader, StreamSet
from siman_convert.data.workers import WorkerLoader, worker_error, worker_options
from siman_convert.errors import InputError, SimanError

_MAX_BAD_IN_A_ROW = 100
Key = tuple[int, int]  # index, augmentation seed


class BadRecord(NamedTuple):
    """An image that could not be read."""

    path: str
    why: str


class Batch(NamedTuple):
    """images: float32 (N, C, H, W); targets: int64 (N,); bad: the unreadable images met while making it."""

    images: Tensor
    targets: Tensor
    bad: tuple[BadRecord, ...]


def train_loader(
    split: AnySplit,
    transform: Transform,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start_batch: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Batches `start_batch`.. of this rank's part of the epoch, in shuffled order; the last one may be short.

    The permutation is padded from its own beginning so that all ranks get equally many samples. An unreadable image
    is replaced by the next readable one in index order and reported in `bad`; 100 in a row are an InputError. So is a stream
    that ends early.
    """
    _require_at_least_one(batch_size=batch_size, world=world)
    if isinstance(split, StreamSplit):
        samples = split.open(seed=mix(seed, epoch), batch_size=batch_size, workers=workers, rank=rank, world=world)
        return StreamLoader(
            StreamSet(samples, transform, mix(seed, epoch, rank)),
            start=start_batch,
            stop=batches_per_epoch(split, batch_size, world),
            exact=True,
            batch_size=batch_size,
            collate_fn=_stack,
            **worker_options(workers, pin_memory, mix(seed, epoch, rank)),
        )
    order = permutation(seed, epoch, len(split))
    own = np.resize(order, math.ceil(len(split) / world) * world)[rank::world]
    keys = _Keys(own, sample_seeds(seed, epoch, own), batch_size, start_batch)
    options = worker_options(workers, pin_memory, mix(seed, epoch, rank))
    return WorkerLoader(_TrainSet(split, transform), batch_sampler=keys, collate_fn=_as_is, **options)


def eval_loader(
    split: AnySplit,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Samples rank, rank + world, rank + 2 world, ... in this order, each once over all ranks, without padding.

    Ranks may have different numbers of batches. An unreadable image is left out and reported in `bad`; a batch of
    nothing else is empty, of shape (0, C, H, W). Of a stream every rank reads all samples, and takes every `world`-th.
    """
    _require_at_least_one(batch_size=batch_size, world=world)
    options = worker_options(workers, pin_memory, 0)
    if isinstance(split, StreamSplit):
        stream = StreamSet(split.open(batch_size=batch_size, workers=workers), transform, None, rank, world)
        stop = batches_per_epoch(split, batch_size, world)
        return StreamLoader(
            stream, start=0, stop=stop, exact=False, batch_size=batch_size, collate_fn=_stack, **options
        )
    own = np.arange(rank, len(split), world)
    keys = _Keys(own, np.zeros_like(own), batch_size, 0)
    return WorkerLoader(_EvalSet(split, transform), batch_sampler=keys, collate_fn=_as_is, **options)


def spread_batches(split: AnySplit, transform: Transform, *, batch_size: int, images: int) -> Iterator[Batch]:
    """Batches of `images` readable samples at most, taken at equal distances from the whole split, in its order."""
    left = min(images, len(split))
    loader = eval_loader(split, transform, batch_size=min(batch_size, left), world=max(1, len(split) // left))
    for batch in iterate(loader):
        if left > 0 and len(batch.targets):
            yield Batch(batch.images[:left], batch.targets[:left], batch.bad)
            left -= min(left, len(batch.targets))


def batches_per_epoch(split: AnySplit, batch_size: int, world: int) -> int:
    """Batches that `train_loader` gives each of `world` ranks in a whole epoch, a short last one included."""
    return math.ceil(math.ceil(len(split) / world) / batch_size)


def iterate(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; a SimanError of one line where a worker process dies, and a worker's own errors as raised.

    torch notices a worker's death by a signal handler too, which can raise its RuntimeError in whatever the main
    thread is doing between batches: pass such an error to `worker_error`.
    """
    try:
        yield from loader
    except (RuntimeError, SimanError) as error:
        if (translated := worker_error(error)) is None:
            raise
        raise translated from error


class _Keys(Sampler[list[Key]]):
    """Batches of (index, augmentation seed), from batch `start` on."""

    def __init__(self, indices: np.ndarray[Any, Any], seeds: np.ndarray[Any, Any], batch_size: int, start: int) -> None:
        self.indices, self.seeds, self.batch_size, self.start = indices, seeds, batch_size, start

    def __len__(self) -> int:
        return max(math.ceil(len(self.indices) / self.batch_size) - self.start, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        for at in range(self.start * self.batch_size, len(self.indices), self.batch_size):
            cut = slice(at, at + self.batch_size)
            yield list(zip(self.indices[cut].tolist(), self.seeds[cut].tolist(), strict=True))


class _BatchSet(Dataset[Batch]):
    """torch's fetcher calls __getitems__ with all keys of a batch, so that a batch is made where it is read."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        raise NotImplementedError


class _TrainSet(_BatchSet):
    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        samples: list[tuple[Tensor, int]] = []
        bad: list[BadRecord] = []
        with borrowed_generators():
            for index, seed in keys:
                image, target = self._readable(index, bad)
                seed_generators(seed)
                samples.append((self.transform(image), target))
        return _stack(samples, bad)

    def _readable(self, index: int, bad: list[BadRecord]) -> tuple[Image.Image, int]:
        """The first readable sample from `index` on, going round; the others are appended to `bad`."""
        tries = min(_MAX_BAD_IN_A_ROW, len(self.split))
        for at in range(index, index + tries):
            try:
                return self.split.read(at % len(self.split))
            except BadImage as error:
                bad.append(BadRecord(error.path, error.why))
        first = bad[-tries]
        raise InputError(
            f"{tries} training images in a row cannot be read, the first: {first.path}: {first.why}; check the data"
        )


class _EvalSet(_BatchSet):
    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        samples: list[tuple[Tensor, int]] = []
        bad: list[BadRecord] = []
        for index, _ in keys:
            try:
                image, target = self.split.read(index)
            except BadImage as error:
                bad.append(BadRecord(error.path, error.why))
                continue
            samples.append((self.transform(image), target))
        if samples:
            return _stack(samples, bad)
        shaped = self.transform(Image.new("RGB", (32, 32)))  # what an image would have become
        return Batch(shaped[None][:0], torch.empty(0, dtype=torch.int64), tuple(bad))


def _stack(samples: Sequence[tuple[Tensor, int]], bad: Sequence[BadRecord] = ()) -> Batch:
    images = torch.stack([image for image, _ in samples])
    return Batch(images, torch.tensor([target for _, target in samples], dtype=torch.int64), tuple(bad))


def _as_is(batch: Any) -> Any:
    return batch


def _require_at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name.replace('_', ' ')} {count}: expected at least 1")
