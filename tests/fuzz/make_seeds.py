"""Writes seeds/READER/*: files that each reader accepts, a few KiB each. `python tests/fuzz/make_seeds.py`."""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from readers import SEPARATOR, SIDE, Tiny

from siman_convert.data import Preprocess
from siman_convert.description import Accuracy, Description, describe
from siman_convert.frozen import freeze
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_file import Variant, seal
from siman_convert.packed import round_to_half, save_packed
from siman_convert.plans import Plan, make_plan
from siman_convert.recipe import Recipe, recipe_text, shipped_recipes
from siman_convert.runs import Progress, RunInfo
from siman_convert.surgery import apply_plan

SEEDS = Path(__file__).parent / "seeds"
PREPROCESS = Preprocess((3, SIDE, SIDE), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center")


def packed_network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Tiny()
    plan = make_plan(model, name="siman_fuzz", input_size=(3, SIDE, SIDE))
    assert plan.binarized == ["conv"]
    packed = freeze(apply_plan(model, plan).eval())
    description = Description(
        "siman_fuzz", plan, PREPROCESS, ("a", "b"), "best", "ab12", Accuracy(61.25, 100.0, 400, "digits"), "0.1.0"
    )
    return describe(packed, description)


def run_folder(plan: Plan) -> bytes:
    recipe = Recipe(epochs=2, final_calibration_images=0)
    info = RunInfo("siman_fuzz", ("a", "b"), "digits", "digits", PREPROCESS.to_dict(), "none", True, recipe.digest(),
                   "2026-01-01T00:00:00", "0.1.0")  # fmt: skip
    record = {"phase": "binary", "epoch": 1, "top1": 50.0, "top5": 100.0, "loss": 0.7, "images": 4}
    progress = Progress("binary", epoch=1, best_top1=50.0, best_epoch=1, history=[record], publish=["last", "best"])
    values = (asdict(info), plan.to_dict(), record, asdict(progress))
    run, planned, line, state = (json.dumps(value).encode() for value in values)
    return SEPARATOR.join((run, b"epochs: 2\nfinal_calibration_images: 0\n", planned, line, state))


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def cifar_bytes(protocol: int) -> bytes:
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    meta = {"label_names": ["cat", "dog"]}
    return SEPARATOR.join(pickle.dumps(value, protocol) for value in (meta, batch))


def tar_bytes(format_: int) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=format_) as archive:
        for name in ("cat/1.png", "dog/2.png", "cat/" + "x" * 120 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"image"))
    return held.getvalue()[:6144]


def seeds() -> dict[str, bytes]:
    network = packed_network()
    made: dict[str, bytes] = {}
    path = SEEDS / "seed.tmp"
    graph, _ = build_onnx(network)
    for name, images in (("plain", False), ("images", True)):
        made[f"onnx/{name}"] = seal(graph, network.siman_description, Variant(takes_images=images))
    for name, model in (("float", network), ("half", round_to_half(network))):
        save_packed(model, path)
        made[f"packed/{name}"] = path.read_bytes()
    path.unlink()
    made |= {f"recipe/{name}": recipe_text(name).encode() for name in shipped_recipes()}
    made["recipe/all"] = Recipe(stages=({"binarize": "weights", "lr": 0.5}, {"binarize": "all"})).to_yaml().encode()
    made["run/run"] = run_folder(network.siman_description.plan)
    images, labels = idx_bytes(np.arange(32).reshape(2, 4, 4)), idx_bytes(np.array([0, 1]))
    made["idx/plain"] = SEPARATOR.join((images, labels, images, labels))
    made["idx/gzip"] = SEPARATOR.join(gzip.compress(part, mtime=0) for part in (images, labels, images, labels))
    made |= {f"cifar/protocol{protocol}": cifar_bytes(protocol) for protocol in (2, 4, 5)}
    made |= {
        f"tar/{name}": tar_bytes(number) for name, number in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT))
    }
    return made


def main() -> int:
    SEEDS.mkdir(exist_ok=True)
    for name, content in seeds().items():
        target = SEEDS / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        print(f"{len(content):7,} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
