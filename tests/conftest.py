"""Real images for every test that needs some: scikit-learn's digits as MNIST-style files."""

import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of IDX files: 320 training and 97 test images of 8x8, ten classes."""
    folder = tmp_path_factory.mktemp("small-digits")
    data = load_digits()
    images, labels = data.images * 15.9, data.target
    for name, part in (("train", slice(0, 320)), ("t10k", slice(320, 417))):
        write_idx(folder / f"{name}-images-idx3-ubyte", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels[part])
    return folder
