"""What each part of fine-tuning is worth, one factor at a time: ResNet-20 on Fashion-MNIST, 6 epochs, 3 seeds a row.

    python benchmarks/ablation.py siman                 one row, all seeds: trains what is missing, prints the table
    python benchmarks/ablation.py sign --seeds 0
    python benchmarks/ablation.py --table               the table of what is there

Every row starts, seed by seed, from the same full-precision network, which the first row of a seed trains. Figures are
appended to benchmarks/ablation.jsonl, one line for each row and seed; what is there is not made again, and a run that was
interrupted goes on where it was. Top-1 in percent of all 10,000 test images, of the last weights: no epoch is selected on them.

Data: the four IDX files of Fashion-MNIST (Debian: dataset-fashion-mnist), of which the first 20,000 training images are used,
zero-padded to 32x32, mean 0.286, std 0.353, random crop with padding 4, horizontal flip. Full precision: 13 epochs, SGD 0.1,
momentum 0.9, weight decay 5e-4, cosine by epoch, batch 128. A row takes 6 x 157 steps of 128 images for each seed.
"""

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import siman_convert
from siman_convert.conversion import Options, Result
from siman_convert.environment import describe_environment
from siman_convert.evaluation import resolve_device
from siman_convert.files import replacing
from siman_convert.recipe import Recipe, load_recipe
from siman_convert.runs import Run

MODEL = "siman_resnet20"
RESULTS = Path(__file__).with_suffix(".jsonl")
DATA = {
    "img_size": 32, "pad_to_size": True, "mean": 3 * [0.286], "std": 3 * [0.353], "crop_padding": 4, "hflip": 0.5,
    "batch_size": 128,
    "channels_last": True,  # a sixth less time on the CPU that the table was made on; the rounding apart, the same
}  # fmt: skip
FULL_PRECISION = {
    "epochs": 0, "opt": "sgd", "lr": 0.1, "weight_decay": 5e-4, "sched_on_updates": False,
}  # fmt: skip
FIGURES = ("full_precision", "converted", "last_epoch", "re_estimated")
TWO_STEPS = [{"binarize": "activations", "epochs": 3}, {"binarize": "all", "epochs": 3}]


class Row(NamedTuple):
    """What differs, as recipe fields; the recipe they change; whether it starts from the full-precision network."""

    what: str
    changes: dict[str, Any]
    recipe: str = "quick"
    pretrained: bool = True


ROWS = {
    "siman": Row("the recipe `quick`", {}),
    "sign": Row("bits by sign, not by magnitude", {"binarizer": "sign"}),
    "analytic": Row("the paper's closed form for the number of ones", {"binarizer": "analytic"}),
    "no-clip": Row("no clip of the latent weights", {"clip_percent": 0.0}),
    "copy": Row("weights copied, not remapped", {"init": "copy"}),
    "scratch": Row("random latent weights", {"init": "scratch"}),
    "labels": Row("labels in place of the teacher", {"distill_weight": 0.0, "label_weight": 1.0}),
    "sgd": Row("SGD 0.05 in place of AdamW 0.003", {"opt": "sgd", "lr": 0.05}),
    "two-step": Row("3 epochs of binary activations alone, then 3 of all", {"stages": TWO_STEPS}),
    "paper": Row("`paper-cifar10`, no warm-up, no pretrained weights", {"warmup_epochs": 0}, "paper-cifar10", False),
}


def main() -> None:
    """Make the figures of a row that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS, help="what to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning; 6 in the table")
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the four IDX files"
    )
    parser.add_argument("--fp-epochs", type=int, default=13, help="of full precision before it; 13 in the table")
    parser.add_argument("--images", type=int, default=20_000, help="training images; 20,000 in the table")
    parser.add_argument("--output", type=Path, default=Path("runs-ablation"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="print the table, train nothing")
    arguments = parser.parse_args()
    if arguments.row and not arguments.table:
        data = subset(arguments.data, arguments.images, arguments.output)
        for seed in arguments.seeds:
            measure(arguments.row, seed, data, arguments)
    elif not arguments.table:
        parser.error(f"name a row ({', '.join(ROWS)}) or --table")
    print(table(read(arguments.results)))


def measure(row: str, seed: int, data: Path, arguments: argparse.Namespace) -> None:
    """Append the figures of one row and seed, unless they are there."""
    setting = {name: getattr(arguments, name) for name in ("epochs", "fp_epochs", "images")} | {
        "row": row,
        "seed": seed,
    }
    if any(setting.items() <= record.items() for record in read(arguments.results)):
        return
    start = Recipe.model_validate({**DATA, **FULL_PRECISION, "fp_epochs": arguments.fp_epochs, "seed": seed})
    full_precision = trained(f"full-precision-{seed}", data, start, "none", arguments)
    what = ROWS[row]
    recipe = load_recipe(what.recipe, {**DATA, "epochs": arguments.epochs, "seed": seed, **what.changes})
    weights = str(Run(full_precision.run).weights("full-precision")) if what.pretrained else "none"
    result = trained(f"{row}-{arguments.epochs}-{seed}", data, recipe, weights, arguments)
    binary = [record for record in Run(result.run).metrics() if record["phase"] == "binary"]
    facts = describe_environment(resolve_device(arguments.device))
    record = {
        **setting,
        "full_precision": full_precision.full_precision_top1,
        "converted": binary[0]["top1"],
        "last_epoch": next(r["top1"] for r in reversed(binary) if not r.get("re_estimated")),
        "re_estimated": result.last_top1,
        "recipe_digest": recipe.digest(),
        "device": facts["device"],
        "torch": facts["packages"]["torch"],
    }
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, sort_keys=True) + "\n")
    print(json.dumps(record, sort_keys=True), file=sys.stderr)


def trained(name: str, data: Path, recipe: Recipe, weights: str, arguments: argparse.Namespace) -> Result:
    """The run of that name, begun, gone on with, or as it ended."""
    options = Options(output=arguments.output, experiment=name, device=arguments.device)
    run = Run(arguments.output / name)
    if (run.folder / "run.json").is_file():
        result = siman_convert.resume(run, options=options)
    else:
        result = siman_convert.convert(MODEL, str(data), recipe=recipe, weights=weights, options=options)
    assert result is not None
    print(f"{name}: {result.full_precision_top1} -> {result.last_top1}", file=sys.stderr)
    return result


def subset(source: Path, images: int, output: Path) -> Path:
    """A folder of IDX files: the first so many training images, and all test images."""
    folder = output / f"fashion-mnist-{images}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", images), ("t10k", None)):
        for kind, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
            target = folder / f"{name}-{kind}"
            if not target.exists():
                with replacing(target) as temporary:
                    temporary.write_bytes(_first(_content(source, f"{name}-{kind}"), header, count))
    return folder


def _content(source: Path, name: str) -> bytes:
    plain = source / name
    return plain.read_bytes() if plain.is_file() else gzip.decompress((source / f"{name}.gz").read_bytes())


def _first(content: bytes, header: int, count: int | None) -> bytes:
    """The first `count` items of an IDX file of bytes."""
    shape = np.frombuffer(content, ">u4", (header - 4) // 4, offset=4).copy()
    shape[0] = min(int(shape[0]), count or int(shape[0]))
    return content[:4] + shape.tobytes() + content[header : header + int(np.prod(shape, dtype=np.int64))]


def read(results: Path) -> list[dict[str, Any]]:
    """The figures made so far."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, of rows with the same length and data."""
    lines = [
        "| row | what differs | epochs | seeds | full precision | converted | last epoch | BatchNorm re-estimated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        lengths = sorted({_setting(r) for r in records if r["row"] == name})
        for length in lengths:
            same = [r for r in records if r["row"] == name and _setting(r) == length]
            figures = " | ".join(_spread([r[key] for r in same]) for key in FIGURES)
            lines.append(f"| `{name}` | {row.what} | {length[0]} | {len(same)} | {figures} |")
    return "\n".join(lines)


def _setting(record: dict[str, Any]) -> tuple[int, int, int]:
    return record["epochs"], record["fp_epochs"], record["images"]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
