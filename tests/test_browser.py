"""The browser example in headless Chromium: stock ONNX Runtime Web on an exported file, and what a user who chooses files sees.

Needs Chromium, Node and `npm install` in examples/browser; skipped without them, unless SIMAN_REQUIRE_CHROMIUM is set.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from exported_run import Life, graphs_once, life, printed
from PIL import Image

__all__ = ["graphs_once", "life"]
PAGE = Path(__file__).parent.parent / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY = bool(CHROMIUM and shutil.which("node") and (PAGE / "node_modules").is_dir())
pytestmark = pytest.mark.skipif(
    not READY and not os.environ.get("SIMAN_REQUIRE_CHROMIUM"),
    reason="needs Chromium, Node and npm install in examples/browser",
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(PAGE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    printed("export", str(life.run.folder), "--with-preprocess", "--output", str(folder))
    return folder / "model.onnx"


def drive(url: str, *arguments: object) -> dict[str, Any]:
    command = ["node", "drive.mjs", str(CHROMIUM), url, *map(str, arguments)]
    done = subprocess.run(command, cwd=PAGE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_what_the_page_shows_is_what_onnx_runtime_computes_elsewhere(url: str, model: Path, tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(model)
    images, expected = [], []
    for number in range(6):
        size = (8 + 5 * number, 31)
        pixels = Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size)
        images.append(tmp_path / f"{number}.png")
        pixels.save(images[-1])
        expected.append(session.run(None, {session.get_inputs()[0].name: np.asarray(pixels)[None]})[0][0])
    seen = drive(url, "classify", model, *images)
    assert seen["complaints"] == []
    assert "test_resnet, 10 classes" in seen["opened"]
    equal = [np.allclose(a["logits"], e, atol=1e-3) for a, e in zip(seen["answers"], expected, strict=True)]
    assert sum(equal) >= 5, "rounding may turn a sign in one image, not in two"
    for answer in seen["answers"]:
        logits = np.array(answer["logits"])
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-logits, kind="stable")[:5]
        assert answer["rows"] == [[str(i), f"{100 * shares[i]:.1f} %"] for i in best]
        assert answer["status"].endswith(" ms")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "This file was not written by siman export."),
        (b"\xff" * 40, "This is not an ONNX file."),
        (None, "This model takes normalised numbers, not images: write it with siman export --with-preprocess."),
    ],
)
def test_a_file_that_is_no_such_model_is_named(
    url: str, life: Life, tmp_path: Path, content: bytes | None, line: str
) -> None:
    file = life.onnx if content is None else tmp_path / "model.onnx"
    if content is not None:
        file.write_bytes(content)
    seen = drive(url, "classify", file)
    assert seen["opened"] == line
    assert seen["complaints"] == []


def test_it_times_two_files_in_turns(url: str, life: Life) -> None:
    timed = drive(url, "time", 3, life.onnx, life.onnx)
    assert np.shape(timed["milliseconds"]) == (3, 2)
    assert np.all(np.array(timed["milliseconds"]) > 0)
    assert len(timed["openings"]) == 2
