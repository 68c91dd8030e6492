"""scikit-learn's handwritten digits: 1,797 grey images of 8x8, in every installation, for demos and tests."""

from __future__ import annotations

import numpy as np

from siman_convert.data.split import ArraySplit, stratified

_VAL_SHARE = 0.2
_SPLIT_SEED = 0  # fixed: everybody's `--data digits` is the same data set


def read() -> tuple[tuple[str, ...], ArraySplit, ArraySplit]:
    """(classes "0".."9", train, val): values 0..16 scaled to 0..255, 20 % of every class held out as val."""
    from sklearn.datasets import load_digits  # costs a second, so only here

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)  # (1797, 8, 8)
    labels = bunch.target.astype(np.int64)
    train, val = stratified(labels, _VAL_SHARE, _SPLIT_SEED)
    classes = tuple(str(i) for i in range(10))
    return classes, ArraySplit("train", images[train], labels[train]), ArraySplit("val", images[val], labels[val])
