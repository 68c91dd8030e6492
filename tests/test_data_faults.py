"""Images that are broken, odd, gone or unreadable, in whole conversions: skipped, named once, counted, the same after a kill."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_resume import Killed, killed_at, outcome

from siman_convert.cli import run as run_command
from siman_convert.data import BadImage, StreamSplit, open_source
from siman_convert.errors import InputError
from siman_convert.runs import Run

RNG = np.random.default_rng(7)


def image(mode: str = "RGB", shade: int | None = None) -> Image.Image:
    pixels = (
        RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8) if shade is None else np.full((24, 20, 3), shade, np.uint8)
    )
    return Image.fromarray(pixels).convert(mode)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def bomb() -> bytes:
    """A PNG of a few bytes that declares 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


ANIMATED = {"save_all": True, "append_images": [image(), image()]}
ODD = {  # has to be taken
    "upper.JPG": encoded(image(), "JPEG"),
    "mixed.JpEg": encoded(image(), "JPEG"),
    "cmyk.jpg": encoded(image("CMYK"), "JPEG"),
    "grey.jpg": encoded(image("L"), "JPEG"),
    "rotated.jpg": encoded(image(), "JPEG", exif=rotated()),
    "sixteen.png": encoded(Image.fromarray(RNG.integers(0, 65536, (24, 20), dtype=np.uint16)), "PNG"),
    "palette.png": encoded(image("P"), "PNG", transparency=bytes(range(256))),
    "alpha.png": encoded(image("RGBA"), "PNG"),
    "bits.png": encoded(image("1"), "PNG"),
    "animated.gif": encoded(image(), "GIF", **ANIMATED),
    "animated.png": encoded(image(), "PNG", **ANIMATED),
    "animated.webp": encoded(image(), "WEBP", **ANIMATED),
    "float.tif": encoded(Image.fromarray(RNG.random((24, 20), dtype=np.float32) * 255), "TIFF"),
    "jpeg-inside.png": encoded(image(), "JPEG"),
    os.fsdecode(b"caf\xe9 \xff\n.png"): encoded(image(), "PNG"),
    "a b'c\"$(x).png": encoded(image(), "PNG"),
}
WHOLE = encoded(image(), "JPEG")
BROKEN = {  # has to be skipped, named and counted
    "empty.jpg": b"",
    "half.jpg": WHOLE[: len(WHOLE) // 2],
    "header.jpg": WHOLE[:180],
    "text.jpg": b"<html>404 not found</html>",
    "half.png": encoded(image(), "PNG")[:200],
    "half.gif": encoded(image(), "GIF")[:60],
    "half.webp": encoded(image(), "WEBP")[:60],
    "bomb.png": bomb(),
    "nothing.png": b"\0" * 4096,
}


def place_odd_things(folder: Path) -> None:
    """What is no image at all: passed over without a word."""
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent.parent)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "folder.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    """make_images(broken=..., odd=...): two classes of 14 training and 4 validation images, and the named ones in class a."""

    def make(broken: dict[str, bytes], odd: dict[str, bytes] | None = None) -> Path:
        root = tmp_path / "images"
        for split, count in (("train", 14), ("val", 4)):
            for number in range(2 * count):
                folder = root / split / "ab"[number % 2]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number}.png").write_bytes(encoded(image(), "PNG"))
        for name, content in {**broken, **(odd or {})}.items():
            (root / "train" / "a" / name).write_bytes(content)
        return root

    return make


def command(data: Path, output: Path, *extra: str) -> list[str]:
    return [
        "convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), "--device", "cpu",
        "--experiment", "run", "--epochs", "2", "-b", "8", "--img-size", "32", "--set", "calibration_images=16",
        "--set", "final_calibration_images=16", *extra,
    ]  # fmt: skip


def resume(output: Path, *extra: str) -> list[str]:
    return ["convert", "--resume", str(output / "run"), "--device", "cpu", *extra]


@pytest.mark.slow
def test_a_zoo_of_images_trains_and_ends_alike_after_a_kill(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = make_images(BROKEN, ODD)
    place_odd_things(data / "train" / "a")
    (data / "val" / "b" / "half.jpg").write_bytes(BROKEN["half.jpg"])
    allowed = ["--set", "max_bad_images=0.3"]
    assert run_command(command(data, tmp_path / "whole", *allowed)) == 0
    said = capsys.readouterr().out
    bad = {str(data / "train" / "a" / name) for name in BROKEN} | {str(data / "val" / "b" / "half.jpg")}
    notes = [
        line.removeprefix("note skipped an unreadable image: ")
        for line in said.splitlines()
        if "unreadable image:" in line
    ]
    assert sorted(note.partition(": ")[0] for note in notes) == sorted(bad)  # each once in two epochs
    assert f"unreadable      {len(bad)} images skipped" in said
    whole = Run(tmp_path / "whole" / "run")
    assert whole.info().images == (28 + len(ODD) + len(BROKEN), 9)
    assert [record["images"] for record in whole.metrics()] == [8] * len(whole.metrics())

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.train.Phase._step", 10)  # of 7 an epoch
        run_command(command(data, cut, *allowed, "--save-every", "0", "-j", "1"))
    assert (Run(cut / "run").progress().epoch, Run(cut / "run").progress().step) == (1, 2)
    capsys.readouterr()
    assert run_command(resume(cut, "-j", "2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["bad_images"] == len(bad)
    assert outcome(Run(cut / "run")) == outcome(whole)
    assert set(Run(cut / "run").progress().bad_images) == bad


def test_too_many_broken_images_are_one_line_that_names_the_first(
    make_images: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_images(BROKEN)
    assert run_command(command(data, tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = re.fullmatch(
        r"siman: \d of 45 images cannot be read, more than max_bad_images = 0.05 allows "
        r"\(--set max_bad_images=0.2 would skip more\); first: (.+?): .+",
        line,
    )
    assert said
    assert Path(said[1]).name in BROKEN


def test_an_image_that_disappears_between_epochs(
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on without it. A resume would see a shorter list and draw other orders: it refuses, and says what helps."""
    data = make_images({})
    lost = data / "train" / "b" / "13.png"
    kept = lost.read_bytes()

    def lose(_terminal: object, record: dict[str, object], _epochs: int) -> None:
        if record["epoch"] == 1:
            lost.unlink()

    whole = Run(tmp_path / "whole" / "run")
    with monkeypatch.context() as patch:
        patch.setattr("siman_convert.cli.terminal.Terminal.end_epoch", lose)
        assert run_command(command(data, whole.folder.parent)) == 0
    assert f"skipped an unreadable image: {lost}: No such file or directory" in capsys.readouterr().out

    lost.write_bytes(kept)
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.train.Phase._step", 5)  # of 4 an epoch
        run_command(command(data, cut))
    lost.unlink()
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_command(resume(cut)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its images changed since the run started (27 + 8 for training and validation, 28 + 8 then" in line
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    lost.touch()
    assert run_command(resume(cut)) == 0
    assert outcome(Run(cut / "run")) == outcome(whole)


def loading_processes(parent: int) -> list[int]:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_a_loading_process_that_is_killed_is_one_line_and_a_run_to_go_on_with(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = make_images({})
    siman = [sys.executable, "-m", "siman_convert"]
    arguments = [*siman, *command(data, tmp_path / "cut", "-j", "1", "--save-every", "0")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("binary untrained"):
                break
        while process.poll() is None and not (workers := loading_processes(process.pid)):
            time.sleep(0.002)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
    (line,) = errors.splitlines()
    assert line.startswith("siman: a data loading process ended: worker (pid")
    assert run_command(resume(tmp_path / "cut")) == 0
    assert run_command(command(data, tmp_path / "whole")) == 0
    assert outcome(Run(tmp_path / "cut" / "run")) == outcome(Run(tmp_path / "whole" / "run"))


def test_folders_of_other_kinds_of_files_say_which(tmp_path: Path) -> None:
    for name in ("train/a/1.heic", "train/a/2.HEIC", "train/a/3.xml", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(WHOLE)
    with pytest.raises(
        InputError, match=r"train/a: class folder without images \(.jpg, .png and others\), but with .heic, .xml files"
    ):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"no data set recognised: .* found 3 files .*, but with .heic, .xml files$"):
        open_source(str(tmp_path / "train" / "a"))
    shutil.rmtree(tmp_path / "train" / "b")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(InputError, match=r"has train/ but no val/"):
        open_source(str(tmp_path))


def as_nobody(action: Callable[[], str]) -> str:
    """What `action` returns in a process of a user who may not read everything; the superuser may."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="becomes another user")
def test_files_and_folders_without_permission(make_images: Callable[..., Path]) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others
        Path(name).chmod(0o755)
        data = Path(name).resolve() / "images"
        shutil.copytree(make_images({}), data)
        (data / "train" / "a" / "0.png").chmod(0)

        def read_first() -> str:
            source = open_source(str(data))
            assert not isinstance(source.train, StreamSplit)
            try:
                return str(source.train.read(0)[1])
            except BadImage as error:
                return str(error)

        def open_all() -> str:
            try:
                return open_source(str(data)).name
            except InputError as error:
                return str(error)

        assert as_nobody(read_first) == f"{data}/train/a/0.png: Permission denied"
        (data / "train" / "b").chmod(0)
        assert as_nobody(open_all) == f"{data}/train/b: cannot be read (Permission denied); check its permissions"
