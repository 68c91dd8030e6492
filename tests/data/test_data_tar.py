import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siman_convert.data import BadImage, Preprocess, eval_loader, eval_transform, iterate, open_source
from siman_convert.errors import InputError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


PICTURES = {f"root/{c}/{i}.png": png(10 * k + i) for k, c in enumerate(("dog", "cat")) for i in range(5)}


def check_cats(source) -> None:
    assert (source.kind, source.classes, source.image_size) == ("tar", ("cat", "dog"), (6, 7))
    for split in (source.train, source.val):
        for i in range(len(split)):
            image, label = split.read(i)
            number = int(Path(split.members[i]).stem)
            expected = np.random.default_rng(10 * (1 - label) + number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_one_tar_is_cut_by_val_split(tmp_path):
    path = write_tar(tmp_path / "pets.tar", PICTURES)
    with pytest.raises(InputError, match=r"one tar file holds no val split; add --val-split 0.1"):
        open_source(str(path))
    source = open_source(str(path), val_split=0.2)
    assert (source.name, len(source.train), len(source.val)) == ("pets", 8, 2)
    check_cats(source)


def test_a_tar_of_class_tars_and_train_beside_val(tmp_path):
    inner = {}
    for name in ("cat", "dog"):
        pictures = {Path(k).name: v for k, v in PICTURES.items() if name in k}
        inner[f"{name}.tar"] = write_tar(tmp_path / f"{name}.tar", pictures).read_bytes()
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "train.tar", inner)
    write_tar(tmp_path / "set" / "val.tar", PICTURES)
    source = open_source(str(tmp_path / "set"))
    assert (source.name, len(source.train), len(source.val)) == ("set", 10, 10)
    check_cats(source)


def test_workers_read_the_same_as_the_main_process(tmp_path):
    source = open_source(str(write_tar(tmp_path / "pets.tar", PICTURES)), val_split=0.2)
    transform = eval_transform(Preprocess((3, 8, 8), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center"))
    batches = [list(iterate(eval_loader(source.train, transform, batch_size=2, workers=w))) for w in (0, 2)]
    for one, other in zip(*batches, strict=True):
        assert (one.images == other.images).all()


def test_damaged_members_and_files(tmp_path):
    path = write_tar(tmp_path / "x.tar", {**PICTURES, "root/cat/9.png": b"broken"})
    source = open_source(str(path), val_split=0.2)
    split = next(s for s in (source.train, source.val) if "root/cat/9.png" in s.members)
    with pytest.raises(BadImage, match=f"{path}:root/cat/9.png: not an image"):
        split.read(split.members.index("root/cat/9.png"))
    path.write_bytes(b"not a tar" * 200)
    with pytest.raises(InputError, match="not a readable, uncompressed tar file"):
        open_source(str(path), val_split=0.2)
    write_tar(path, PICTURES, "w:gz")
    with pytest.raises(InputError, match="not a readable, uncompressed tar file"):
        open_source(str(path), val_split=0.2)
    write_tar(path, {"flat.png": png(0), "a/readme.txt": b"x"})
    with pytest.raises(InputError, match=r"no images in class folders in it; expected CLASS/IMAGE.jpg"):
        open_source(str(path), val_split=0.2)


def test_classes_that_differ(tmp_path):
    write_tar(tmp_path / "train.tar", PICTURES)
    write_tar(tmp_path / "val.tar", {"cat/1.png": png(1), "owl/1.png": png(2)})
    with pytest.raises(InputError, match=r"classes differ between train.tar and val.tar, such as dog, owl"):
        open_source(str(tmp_path))
