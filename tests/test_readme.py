"""Every command block of README.md and docs/*.md, run as it stands there but for what SMALLER shrinks.

`make demo` and `make test` are run by .ci/run. Fenced `sh` and `python` blocks of a document run in one folder,
in their order, as someone does who follows the page. That takes minutes: `pytest -m slow tests/test_readme.py`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from exported_run import digits_of_several_sizes
from PIL import Image

TOP = Path(__file__).parent.parent
DOCUMENTS = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BY_CI = ("make demo", "make test")
SMALLER = {  # on the page -> here: the same commands on a small network, few images, one or two processes
    r"\bresnet18\b": "test_resnet",
    r"/imagenet\b": "photos",
    r"convert test_resnet --data photos( --epochs 30)?": "convert test_resnet --data photos --img-size 32 --weights none"
    " --set calibration_images=40 --epochs 1",
    r"--nproc-per-node 8": "--nproc-per-node 2",
    r"--num_processes 8": "--num_processes 1",
    r"-j 8": "-j 0",
    r"siman bench": "siman bench --seconds 0.2",
    r"-b 16 --epochs 12": "-b 64 --epochs 1",
    r"--data digits": "--data digits --img-size 32",
    r'"calibration_images": 64': '"calibration_images": 64, "img_size": 32',
}


def blocks() -> Iterator[tuple[str, str, str]]:
    for document in DOCUMENTS:
        for kind, text in BLOCK.findall(document.read_text(encoding="utf-8")):
            if not all(line.startswith(BY_CI) for line in text.splitlines()):
                yield document.name, kind, text


BLOCKS = list(blocks())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each document: photos, and two files of the user's."""
    made = {}
    for document in DOCUMENTS:
        folder = tmp_path_factory.mktemp(document.stem)
        digits_of_several_sizes(folder / "photos")
        Image.open(next((folder / "photos" / "val" / "3").iterdir())).convert("RGB").save(folder / "photo.jpg")
        for name in ("siman_convert", "examples", "benchmarks", "tests", "docs", "Makefile", ".ci"):
            if (TOP / name).exists():
                (folder / name).symlink_to(TOP / name)
        made[document.name] = folder
    return made


def test_there_is_something_to_run() -> None:
    commands = "\n".join(text for _, _, text in BLOCKS)
    for command in ("convert", "export", "eval", "inspect", "verify", "predict", "bench", "report", "doctor", "models"):
        assert f"siman {command}" in commands, command


@pytest.mark.slow
@pytest.mark.parametrize(("document", "kind", "text"), BLOCKS, ids=[f"{d}:{t.splitlines()[0]}" for d, _, t in BLOCKS])
def test_block(document: str, kind: str, text: str, folders: dict[str, Path]) -> None:
    for pattern, replacement in SMALLER.items():
        text = re.sub(pattern, replacement, text)
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "sh" else [sys.executable, "-c", text]
    here = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folders[document], env=here, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
