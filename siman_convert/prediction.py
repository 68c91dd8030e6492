"""What a network says about single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from siman_convert.backends import Backend, default_backend, open_backend
from siman_convert.data import decode_image, eval_transform, pixel_transform
from siman_convert.subjects import open_subject


@dataclass(frozen=True)
class Guess:
    """A class with its softmax probability, 0 to 1."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    image: Path
    guesses: tuple[Guess, ...]


def predict(
    what: str | Path | None,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    backend: Backend | None = None,
    runs: Path = Path("runs"),
) -> list[Prediction]:
    """The `top` classes of each image by a run or an exported file. Raises InputError, for an unreadable image too."""
    decoded = [decode_image(Path(image)) for image in images]
    subject = open_subject(what, runs)
    description = subject.description
    takes_images = subject.onnx is not None and subject.onnx.variant.takes_images
    transform = (pixel_transform if takes_images else eval_transform)(description.preprocess)
    model = open_backend(subject, backend or default_backend(subject))
    found = []
    with torch.no_grad():
        for path, image in zip(images, decoded, strict=True):
            probabilities = model(transform(image)[None]).double().softmax(dim=1)[0]
            best = probabilities.topk(min(top, len(description.classes)))
            guesses = (
                Guess(description.classes[index], index, value)
                for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            found.append(Prediction(Path(path), tuple(guesses)))
    return found
