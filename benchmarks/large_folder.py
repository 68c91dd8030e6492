"""How long a folder of many images takes to open, and how much memory: start of `siman convert --data FOLDER`.

python benchmarks/large_folder.py --images 200000

The images are hard links to one tiny JPEG a class, in train/ and val/. A process of its own opens them: seconds and the growth of
its resident memory until the source is open, until the digest that a run keeps is made, and until the first batch is there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

MEASURED = """
import json, resource, sys, time
from siman_convert.data import eval_loader, eval_transform, iterate, open_source, resolve_preprocess, train_loader
import timm, torch

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6

before, started, figures = megabytes(), time.perf_counter(), {}
def note(what):
    figures[what] = {"seconds": round(time.perf_counter() - started, 2), "MB more": round(megabytes() - before, 1)}

source = open_source(sys.argv[1])
note("open")
source.digest()
note("digest")
preprocess, _ = resolve_preprocess(timm.create_model("test_resnet"), image_size=source.image_size, img_size=32)
transform = eval_transform(preprocess)
loader = train_loader(source.train, transform, batch_size=64, epoch=0, seed=0)
next(iter(iterate(loader)))
note("first batch")
figures["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before, 1)
figures["images"] = len(source.train) + len(source.val)
print(json.dumps(figures))
"""


def make(folder: Path, images: int, classes: int) -> None:
    """train/ with nine tenths of the images, val/ with the rest."""
    for number in range(classes):
        first = folder / f"source-{number}.jpg"
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(first)
        for split, count in (("train", images * 9 // 10 // classes), ("val", images // 10 // classes)):
            place = folder / split / f"n{number:08d}"
            place.mkdir(parents=True)
            for index in range(count):
                os.link(first, place / f"n{number:08d}_{index:06d}.JPEG")


def main() -> None:
    """Make the folder, measure, print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), arguments.images, arguments.classes)
        done = subprocess.run([sys.executable, "-c", MEASURED, name], check=True, capture_output=True, text=True)
    print(json.dumps(json.loads(done.stdout), indent=2))


if __name__ == "__main__":
    main()
