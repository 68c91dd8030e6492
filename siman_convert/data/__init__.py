"""Data: what the user names becomes two splits, a preprocessing, and loaders of batches."""

from siman_convert.data.images import decode_image
from siman_convert.data.loading import (
    BadRecord,
    Batch,
    batches_per_epoch,
    eval_loader,
    iterate,
    spread_batches,
    train_loader,
)
from siman_convert.data.preprocess import Augment, Preprocess, Transform, resolve_preprocess
from siman_convert.data.source import Source, open_source
from siman_convert.data.split import AnySplit, BadImage, Split, StreamSplit
from siman_convert.data.transforms import eval_transform, pixel_transform, train_transform
from siman_convert.data.workers import worker_error

__all__ = [
    "AnySplit",
    "Augment",
    "BadImage",
    "BadRecord",
    "Batch",
    "Preprocess",
    "Source",
    "Split",
    "StreamSplit",
    "Transform",
    "batches_per_epoch",
    "decode_image",
    "eval_loader",
    "eval_transform",
    "iterate",
    "open_source",
    "pixel_transform",
    "resolve_preprocess",
    "spread_batches",
    "train_loader",
    "train_transform",
    "worker_error",
]
