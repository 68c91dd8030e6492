"""A StreamSplit behind torch's DataLoader: transforms per sample, and batches counted so that a resume can skip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from siman_convert.data.preprocess import Transform
from siman_convert.data.seeding import borrowed_generators, mix, seed_generators
from siman_convert.data.workers import WorkerLoader
from siman_convert.errors import InputError


class StreamSet(IterableDataset[tuple[Tensor, int]]):
    """(image float32 (C, H, W), class index) in the stream's order, samples rank, rank + world, ... of each worker; with
    `seed`, the transform of the n-th of worker w is seeded from (seed, w, n)."""

    def __init__(
        self,
        samples: Iterable[tuple[Image.Image, int]],
        transform: Transform,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.samples, self.transform, self.seed, self.rank, self.world = samples, transform, seed, rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        for position, (image, target) in enumerate(islice(self.samples, self.rank, None, self.world)):
            if self.seed is None:
                yield self.transform(image), int(target)
                continue
            with borrowed_generators():
                seed_generators(mix(self.seed, worker, position))
                tensor = self.transform(image)
            yield tensor, int(target)


class StreamLoader(WorkerLoader):
    """Batches start..stop of a stream, or if not `exact`, all from start on: in evaluation each worker may end with a
    short batch of its own. Skipped ones are read and dropped: a stream cannot be entered in its middle.

    Raises InputError where it should be exact and ends before, as where a rank or worker gets no shard.
    """

    def __init__(self, dataset: StreamSet, *, start: int, stop: int, exact: bool, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._start, self._stop, self._exact = start, stop, exact

    def __len__(self) -> int:
        """Batches from `start` on; where not `exact`, as many as the declared samples would fill."""
        return max(self._stop - self._start, 0)

    def __iter__(self) -> Any:
        count = self._start
        for batch in islice(super().__iter__(), self._start, self._stop if self._exact else None):
            count += 1
            yield batch
        if self._exact and count < self._stop:
            raise InputError(f"a stream of training images ended after {count} of {self._stop} batches; expected a shard or "
                             "more for every process and each of its loading processes (-j)")  # fmt: skip
