import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siman_convert.data import BadImage, open_source
from siman_convert.data.folder import natural_key
from siman_convert.errors import InputError


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_train_and_val_folders(make_folder, val):
    root = make_folder({"train/c10": 3, "train/c2": 2, f"{val}/c2": 1, f"{val}/c10": 1}, size=(12, 10))
    source = open_source(str(root))
    assert (source.kind, source.classes, source.image_size) == ("imagefolder", ("c2", "c10"), (12, 10))
    assert (source.name, source.spec) == (root.name.strip("-."), str(root))
    assert [source.train.label(i) for i in range(5)] == [0, 0, 1, 1, 1]
    image, label = source.train.read(2)
    assert (image.mode, image.size, label) == ("RGB", (10, 12), 1)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(root / "train/c10/0.png")))


def test_images_at_any_depth_and_of_common_kinds_hidden_ones_left_out(make_folder):
    root = make_folder({"train/a": 1, "train/b": 1, "train/a/deep/er": 1, "train/.git": 1, "val/a": 1, "val/b": 1})
    for name in ("x.JPG", "y.bmp", "z.webp", "._z.png", "notes.txt"):
        Image.new("RGB", (3, 3)).save(root / "train/a" / name, format="PNG")
    source = open_source(str(root))
    assert source.classes == ("a", "b")
    assert sorted(source.train.paths) == ["a/0.png", "a/deep/er/0.png", "a/x.JPG", "a/y.bmp", "a/z.webp", "b/0.png"]


def test_one_folder_of_classes_is_cut_alike_every_time(make_folder):
    root = make_folder({"a": 10, "b": 20, "c": 1})
    with pytest.raises(
        InputError, match=r"a folder of classes; sort it into train/ and val/, or hold out .* --val-split 0.1"
    ):
        open_source(str(root))
    first, again, other = (open_source(str(root), val_split=0.25, seed=seed) for seed in (3, 3, 4))
    assert first.val.paths == again.val.paths != other.val.paths
    assert np.bincount(first.val.labels, minlength=3).tolist() == [2, 5, 0]
    assert sorted([*first.train.paths, *first.val.paths]) == sorted(other.train.paths + other.val.paths)
    assert not set(first.train.paths) & set(first.val.paths)


def test_train_without_val_is_cut_as_well(make_folder):
    root = make_folder({"train/a": 5, "train/b": 5})
    with pytest.raises(
        InputError, match=r"has train/ but no val/, validation/, test/; add one, or hold out 10 % .* --val-split 0.1"
    ):
        open_source(str(root))
    assert len(open_source(str(root), val_split=0.2).val) == 2


def test_the_train_split_alone_is_met_with_its_parent(make_folder):
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    with pytest.raises(InputError, match=rf"train: a folder of classes; val/ lies beside it: give {root}, or hold out"):
        open_source(str(root / "train"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_val_split_out_of_range(make_folder, share):
    with pytest.raises(InputError, match="expected a share between 0 and 1"):
        open_source(str(make_folder({"a": 2, "b": 2})), val_split=share)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 1, "train/b": 0, "val/a": 1, "val/b": 1}, "train/b: class folder without images"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0}, "val/b: class folder without images"),
        ({"train": 3, "val/a": 1}, "train: images but no class folders"),
        ({"train": 0, "val/a": 1}, "train: no class folders with images"),
        ({"train": 0}, "has train/ but no val/"),
        ({"val/a": 1}, "has val/ but no train/"),
        ({"train/a": 1, "val/a": 1}, "one class only"),
        (
            {f"train/{c}": 1 for c in "abcdex"} | {"val/x": 1, "val/y": 1},
            "only in train/: a, b, c and 2 more; only in val/: y",
        ),
        ({"a": 0, "b": 0}, r"no data set recognised: .* found 2 folders \(a, b\)"),
        ({".": 3}, r"no data set recognised: .* found 3 files \(0.png, 1.png, 2.png\)"),
        ({}, "found an empty folder"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(make_folder, counts, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(str(make_folder(counts)))
    assert "\n" not in str(caught.value)


def test_val_split_beside_a_val_folder_is_refused(make_folder):
    root = make_folder({"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    with pytest.raises(InputError, match="has its own val/; leave out --val-split"):
        open_source(str(root), val_split=0.5)


def test_names_that_are_not_utf8_are_read_and_shown_escaped(make_folder):
    root = make_folder({"a": 2, "b": 2})
    odd = os.fsencode(root) + b"/caf\xe9\n"
    Path(os.fsdecode(odd)).mkdir()
    for name in (b"/\xff\xfe.png", b"/ok.png"):
        Image.new("RGB", (4, 4)).save(os.fsdecode(odd + name))
    source = open_source(str(root), val_split=0.5)
    assert source.classes == ("a", "b", r"caf\xe9\n")
    bad = os.fsdecode(odd + b"/\xff\xfe.png")
    os.truncate(bad, 20)
    odd_image = next(s for s in (source.train, source.val) if any("\udcff" in p for p in s.paths))
    index = next(i for i, p in enumerate(odd_image.paths) if "\udcff" in p)
    with pytest.raises(BadImage) as caught:
        odd_image.read(index)
    assert caught.value.path.encode("utf-8").endswith(rb"caf\xe9\n/\xff\xfe.png")


def test_links_are_followed_and_loops_end(make_folder):
    root = make_folder({"train/a": 2, "train/b": 1, "val/a": 1, "val/b": 1})
    (root / "train/a/loop").symlink_to(root / "train/a")
    (root / "train/a/up").symlink_to(root / "train")
    (root / "train/a/self").symlink_to(root / "train/a/self")
    (root / "train/a/dangling.png").symlink_to(root / "nowhere.png")
    (root / "train/c").symlink_to(root / "train/b")
    (root / "val/c").symlink_to(root / "val/b")
    source = open_source(str(root))
    assert source.classes == ("a", "b", "c")
    assert [p for p in source.train.paths if p.startswith("a/")] == ["a/0.png", "a/1.png"]


def test_an_unreadable_image_is_named_with_its_reason(make_folder):
    root = make_folder({"train/a": 2, "train/b": 1, "val/a": 1, "val/b": 1})
    (root / "train/a/0.png").write_bytes(b"no image")
    source = open_source(f"{root}/../{root.name}")
    assert source.spec == str(root)
    with pytest.raises(BadImage, match=f"{root}/train/a/0.png: not an image that Pillow can identify"):
        source.train.read(0)
    (root / "train/b/0.png").unlink()
    with pytest.raises(BadImage, match=r"b/0.png: No such file or directory"):
        source.train.read(2)


def test_nothing_readable_at_all(make_folder):
    root = make_folder({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"no image of those looked at can be read; the first: .*a/0.png: "):
        open_source(str(root))


def test_natural_order_does_not_depend_on_the_order_found():
    names = ["n10", "n9", "N9", "a", "10", "9", "x²", "x2", "", "9a", "é"]
    expected = sorted(names, key=natural_key)
    random.Random(0).shuffle(names)
    assert sorted(names, key=natural_key) == expected
    assert expected.index("n9") < expected.index("n10")
