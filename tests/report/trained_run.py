"""A short run on images in class folders, one of which has a name that a careless page would execute."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from siman_convert.runs import Run

HOSTILE = "<img src=x onerror=console.error(7)>"  # a folder's name cannot hold the slash of </script>
CLASSES = ("0", "1", HOSTILE)


@dataclass(frozen=True)
class Trained:
    """A finished run, in folder/runs, on the images in folder/images."""

    folder: Path
    run: Run


def write_images(folder: Path) -> Path:
    """So many digits of three classes; too few to tell them all apart."""
    digits = load_digits()
    for name, label in zip(CLASSES, range(3), strict=True):
        for split, numbers in (("train", slice(0, 40)), ("val", slice(40, 80))):
            (folder / split / name).mkdir(parents=True)
            for number, image in enumerate(digits.images[digits.target == label][numbers]):
                noise = np.random.default_rng(number).normal(0, 60, (8, 8))
                pixels = np.clip(image * 15.9 + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder
