"""Real images for every test that needs some: scikit-learn's digits as MNIST-style files. One trial export for equal plans."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torch import nn

from siman_convert import preparation
from siman_convert.data import Preprocess
from siman_convert.plans import Plan
from siman_convert.trial import Trial, trial_export


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


@pytest.fixture(scope="session", autouse=True)
def trials_once() -> Iterator[None]:
    """torch's exporter takes seconds, and every conversion tries it: what it says depends on shapes alone, so ask it once."""
    asked: dict[str, Trial] = {}

    def ask(model: nn.Module, plan: Plan, preprocess: Preprocess, classes: tuple[str, ...]) -> Trial:
        shapes: list[Any] = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
        key = json.dumps([plan.to_dict(), preprocess.to_dict(), classes, shapes])
        if key not in asked:
            asked[key] = trial_export(model, plan, preprocess, classes)
        return asked[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "trial_export", ask)
        yield
