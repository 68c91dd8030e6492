"""Makers of small data sets on disk."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_makers import idx_bytes
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder({"train/cat": 3, ...}, size=(h, w)) writes that many PNGs into each folder."""

    def make(counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
        rng = np.random.default_rng(0)
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
        return tmp_path

    return make


@pytest.fixture
def make_idx(tmp_path: Path) -> Callable[..., Path]:
    """make_idx(prefix, gz=..., train=..., val=..., size=...) writes the four files of a data set with 3 classes."""

    def make(prefix: str = "", *, gz: bool = False, dot: str = "-", test: str = "t10k", size: int = 5) -> Path:
        rng = np.random.default_rng(1)
        for part, count in (("train", 9), (test, 6)):
            images = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
            for what, array in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 3)):
                name = f"{prefix}{part}-{what}{dot}idx{array.ndim}-ubyte"
                content = idx_bytes(array)
                (tmp_path / (name + ".gz" if gz else name)).write_bytes(gzip.compress(content) if gz else content)
        return tmp_path

    return make


@pytest.fixture
def make_cifar(tmp_path: Path) -> Callable[..., Path]:
    """make_cifar(fine) writes CIFAR-10 (or -100) batches of 4 images with plain pickle, bytes keys as the originals."""

    def make(*, fine: bool = False, protocol: int = 2) -> Path:
        folder = tmp_path / ("cifar-100-python" if fine else "cifar-10-batches-py")
        folder.mkdir()
        labels_key = b"fine_labels" if fine else b"labels"
        rng = np.random.default_rng(2)
        for name in ("train", "test") if fine else (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            batch = {b"data": data, labels_key: [0, 1, 2, 1], b"filenames": [b"a.png"] * 4}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        meta = {b"fine_label_names" if fine else b"label_names": [b"cat", b"dog", b"owl"]}
        (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=protocol))
        return tmp_path

    return make
