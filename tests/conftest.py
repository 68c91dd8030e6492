"""Real images for every test that needs some: scikit-learn's digits as MNIST-style files."""

import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_digits(folder: Path, train: int, test: int) -> Path:
    """So many of scikit-learn's digits, 8x8, as IDX files in a new folder."""
    folder.mkdir()
    data = load_digits()
    images, labels = data.images * 15.9, data.target
    for name, part in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        write_idx(folder / f"{name}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels[part])
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files: 320 training and 97 test images of 8x8, ten classes."""
    return write_digits(tmp_path_factory.mktemp("digits") / "small-digits", train=320, test=97)
