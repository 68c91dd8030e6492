"""timm's data sets: torchvision's for real, the others through stand-ins for packages that are not installed."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_makers import ramp_split
from PIL import Image

from siman_convert.data import (
    BadImage,
    Preprocess,
    StreamSplit,
    batches_per_epoch,
    eval_loader,
    iterate,
    open_source,
    timm_source,
    train_loader,
    train_transform,
)
from siman_convert.data.preprocess import Augment
from siman_convert.errors import InputError

PRE = Preprocess((3, 16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center")


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Make every optional package look installed; tests of missing ones undo it."""
    monkeypatch.setattr(timm_source, "find_spec", lambda _: True)


@pytest.mark.parametrize(
    ("spec", "packages"),
    [("hfds/a/b", "datasets"), ("wds/x", "webdataset"), ("tfds/m", "tensorflow tensorflow-datasets")],
)
def test_missing_packages_are_named(monkeypatch, spec, packages):
    monkeypatch.setattr(timm_source, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"^{spec}: needs a package that is not installed: pip install {packages}$"):
        open_source(spec)


def test_torchvision_reads_what_lies_in_the_folder(make_idx):
    root = make_idx()
    (root / "FashionMNIST" / "raw").mkdir(parents=True)
    for file in root.glob("*ubyte"):
        file.rename(root / "FashionMNIST" / "raw" / file.name)
    source = open_source(f"torch/fashion_mnist:{root}")
    assert (source.kind, len(source.classes), len(source.train), len(source.val)) == ("timm", 10, 9, 6)
    assert source.image_size == (5, 5)
    assert source.train.read(4)[1] == source.train.label(4) == 1
    with pytest.raises(InputError, match="leave out --val-split"):
        open_source(f"torch/fashion_mnist:{root}", val_split=0.1)


def test_torchvision_says_where_to_put_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"cannot be opened: .*; give the folder it lies in as torch/cifar10:FOLDER"):
        open_source(f"torch/cifar10:{tmp_path}")
    with pytest.raises(InputError, match="hfds/: names no data set; expected hfds/NAME"):
        open_source("hfds/")


class Reader:
    """As timm's ReaderHfds: index to (open file, label)."""

    def __init__(self, labels: list[int], names: tuple[str, ...] = ()) -> None:
        self.labels = labels
        self.class_to_idx = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.new("RGB", (9, 7), (index, 0, 0)).save(file, "PNG")
        broken = index == 3
        return io.BytesIO(file.getvalue()[: 40 if broken else None]), self.labels[index]


def serve(monkeypatch, splits: dict[str, object]) -> None:
    def create(name: str, *, split: str, **_: object) -> object:
        if split not in splits:
            raise ValueError(f"Unknown split {split!r} of {name}.\nShould be one of {list(splits)}.")
        return splits[split]

    monkeypatch.setattr("timm.data.create_dataset", create)


def test_hfds_reads_through_timms_reader_and_hides_no_bad_image(monkeypatch):
    names = ("cat", "dog")
    train, val = Reader([0, 1, 0, 1, 1, 0], names), Reader([1, 0], names)
    serve(monkeypatch, {"train": SimpleNamespace(reader=train), "test": SimpleNamespace(reader=val)})
    source = open_source("hfds/me/pets")
    assert (source.name, source.classes, source.image_size) == ("pets", names, (7, 9))
    assert (len(source.train), len(source.val), source.train.label(4)) == (6, 2, 1)
    assert source.train.read(4)[0].getpixel((0, 0)) == (4, 0, 0)
    with pytest.raises(BadImage, match=r"^hfds/me/pets:train\[3\]: "):
        source.train.read(3)


def test_hfds_with_one_split_is_cut_and_unnamed_classes_are_numbered(monkeypatch):
    serve(monkeypatch, {"train": SimpleNamespace(reader=Reader([0, 1, 2] * 4))})
    with pytest.raises(InputError, match=r"split 'validation' cannot be opened: .*Unknown split.*; .*--val-split 0.1$"):
        open_source("hfds/x")
    source = open_source("hfds/x", val_split=0.25)
    assert source.classes == ("0", "1", "2")
    assert sorted(source.val.label(i) for i in range(len(source.val))) == [0, 1, 2]
    reds = {
        split.read(i)[0].getpixel((0, 0))[0]
        for split in (source.train, source.val)
        for i in range(len(split))
        if int(split.indices[i]) != 3
    }
    assert reds == set(range(12)) - {3}


class Stream(torch.utils.data.IterableDataset):
    """As timm's IterableImageDataset: sharded over workers as found on first use, going on with its shuffle."""

    def __init__(self, count: int, classes: dict[str, int], is_training: bool, seed: int) -> None:
        self.count, self.shuffle, self.sharding = count, is_training, None
        self.generator = np.random.default_rng(seed)
        self.reader = SimpleNamespace(num_samples=count, class_to_idx=classes, batch_size=1)

    def set_loader_cfg(self, num_workers: int) -> None:
        self.workers = max(1, num_workers)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        self.sharding = self.sharding or ((info.id, info.num_workers) if info else (0, 1))
        assert self.workers == self.sharding[1]
        order = self.generator.permutation(self.count) if self.shuffle else np.arange(self.count)
        for index in order[self.sharding[0] :: self.sharding[1]]:
            yield ramp_split(self.count).read(int(index))


def serve_streams(monkeypatch, counts: dict[str, int], classes: dict[str, int]) -> None:
    def create(_: str, *, split: str, is_training: bool, seed: int = 42, **__: object) -> Stream:
        if split not in counts:
            raise ValueError(f"no split {split}")
        return Stream(counts[split], classes, is_training, seed)

    monkeypatch.setattr("timm.data.create_dataset", create)


def test_streams_resume_and_evaluate(monkeypatch):
    serve_streams(monkeypatch, {"train": 20, "val": 7}, {"a": 0, "b": 1})
    source = open_source("tfds/toy")
    assert (source.classes, len(source.train), source.image_size) == (("a", "b"), 20, (16, 16))
    assert isinstance(source.train, StreamSplit)
    transform = train_transform(PRE, Augment(reprob=0.5))

    def batches(workers: int, epoch: int, start: int = 0):
        loader = train_loader(
            source.train, transform, batch_size=4, epoch=epoch, seed=0, workers=workers, start_batch=start
        )
        result = list(iterate(loader))
        assert len(result) == len(loader) == batches_per_epoch(source.train, 4, 1) - start
        return result

    def labels(batches) -> list[int]:
        return [int(target) for batch in batches for target in batch.targets]

    for workers in (0, 2, 0):  # no pass may disturb a later one
        whole, resumed, later = batches(workers, 1), batches(workers, 1, start=2), batches(workers, 2)
        for one, other in zip(whole[2:], resumed, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)
        assert labels(whole) != labels(later)
        assert len(set(labels(whole))) == (20 if workers == 0 else len(labels(whole)))
        evaluated = list(iterate(eval_loader(source.val, transform, batch_size=3, workers=workers)))
        assert sorted(labels(evaluated)) == list(range(7))


def test_streams_that_lack_something(monkeypatch, tmp_path):
    serve_streams(monkeypatch, {"train": 3, "validation": 3}, {})
    with pytest.raises(InputError, match=r"tfds/x: names no classes; put classes.txt"):
        open_source("tfds/x")
    with pytest.raises(InputError, match="wds//no/where: no such folder"):
        open_source("wds//no/where")
    with pytest.raises(InputError, match="a stream cannot be split"):
        open_source(f"wds/{tmp_path}", val_split=0.1)
    (tmp_path / "classes.txt").write_text("ape\nbee\n\n", encoding="utf-8")
    assert open_source(f"wds/{tmp_path}").classes == ("ape", "bee")
    serve_streams(monkeypatch, {"train": 0, "validation": 3}, {})
    with pytest.raises(InputError, match="does not declare how many samples"):
        open_source(f"wds/{tmp_path}")
