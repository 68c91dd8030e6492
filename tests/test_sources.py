"""Whole conversions from WebDataset shards and from a data set in Hugging Face's format, both made here from real images."""

import gc
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from siman_convert.cli import run as run_command
from siman_convert.data import Preprocess, eval_transform, iterate, open_source, train_loader
from siman_convert.errors import InputError
from siman_convert.runs import Run

# webdataset leaves the shards it was not asked to finish to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO.*shards:pytest.PytestUnraisableExceptionWarning"
)

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
NAMES = [f"digit {label}" for label in range(10)]
SHARDS = {"train": (16, 16, 16, 16), "validation": (8, 7, 6)}  # images each


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Its warnings come within the test that caused them."""
    yield
    gc.collect()


def pictures() -> Iterator[tuple[bytes, int]]:
    """PNG files of digits with their labels."""
    data = load_digits()
    for pixels, label in zip(data.images, data.target, strict=True):
        file = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype("uint8")).save(file, "PNG")
        yield file.getvalue(), int(label)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with _info.json and classes.txt: 64 training and 21 validation images."""
    folder = tmp_path_factory.mktemp("shards")
    source, info = pictures(), {}
    for split, counts in SHARDS.items():
        files = [f"{split}-{number}.tar" for number in range(len(counts))]
        info[split] = {
            "name": split,
            "num_samples": sum(counts),
            "filenames": files,
            "shard_lengths": counts,
        }
        for file, count in zip(files, counts, strict=True):
            with webdataset.TarWriter(str(folder / file)) as writer:
                for number in range(count):
                    image, label = next(source)
                    writer.write({"__key__": f"{number:03d}", "png": image, "cls": label})
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set with splits train (64) and test (21) as `datasets` writes it; its cache stays in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    source, folder = pictures(), tmp_path / "digits-in-parquet"
    folder.mkdir()
    for split, count in (("train", 64), ("test", 21)):
        rows = [
            {"image": {"bytes": image, "path": None}, "label": label}
            for image, label in (next(source) for _ in range(count))
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def command(output: Path, data: str, *extra: str) -> list[str]:
    return [
        "convert", "test_resnet", "--data", data, "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--epochs", "1", "-b", "8", "--set", "calibration_images=32",
        "--set", "final_calibration_images=32", "--img-size", "32", *extra,
    ]  # fmt: skip


def evaluated(run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[float, int]:
    """Top-1 and images of the last weights, by `siman eval` in this process."""
    capsys.readouterr()
    assert run_command(["eval", str(run.folder), "--last", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    return result["top1"], result["images"]


@pytest.mark.slow
def test_two_processes_on_webdataset_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Started by accelerate. timm's reader would repeat and leave out validation images to make shares equal."""
    done = subprocess.run(
        [*ACCELERATE, "-m", "siman_convert", *command(tmp_path, f"wds/{shards}")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu, 1 thread, 2 processes" in done.stdout
    assert done.stdout.count("binary 1/1") == 1
    run = Run(tmp_path / "run")
    assert run.info().classes == tuple(NAMES)
    assert [record["images"] for record in run.metrics()] == [21, 21, 21]
    last = run.metrics()[-1]
    assert evaluated(run, capsys) == (last["top1"], 21)


def test_a_stream_of_too_few_shards_is_an_error_and_not_a_hang(shards: Path) -> None:
    """Of 4 shards the fifth process gets none."""
    source = open_source(f"wds/{shards}")
    transform = eval_transform(Preprocess((3, 8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center"))

    def batches(rank: int) -> list[int]:
        loader = train_loader(source.train, transform, batch_size=4, epoch=0, seed=0, rank=rank, world=5)
        return [len(batch.targets) for batch in iterate(loader)]

    assert [batches(rank) for rank in range(4)] == 4 * [[4, 4, 4, 4]]
    with pytest.raises(
        InputError, match="training images ended after 0 of 4 batches; expected a shard or more for every"
    ):
        batches(4)


@pytest.mark.slow
def test_a_data_set_of_hugging_face(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command(tmp_path, f"hfds/{parquet}")) == 0
    run = Run(tmp_path / "run")
    assert run.info().classes == tuple(NAMES)
    last = run.metrics()[-1]
    assert (last["epoch"], last["images"]) == (1, 21)
    assert evaluated(run, capsys) == (last["top1"], 21)


def test_one_split_of_hugging_face_is_cut(parquet: Path) -> None:
    (parquet / "test.parquet").unlink()
    source = open_source(f"hfds/{parquet}", val_split=0.25)
    labels = [source.val.label(index) for index in range(len(source.val))]  # type: ignore[union-attr]
    assert set(labels) == set(range(10))
    assert (len(source.train) + len(source.val), source.image_size) == (64, (8, 8))
