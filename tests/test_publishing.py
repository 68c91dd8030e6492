"""siman export --push-to-hub against a stub of the hub: what arrives there, and the one line where nothing can."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import json
from collections.abc import Iterator
from pathlib import Path

import hub_stub
import pytest
from exported_run import Life, graphs_once, life  # noqa: F401  fixtures
from hub_stub import LARGE, USER, Hub
from huggingface_hub import ModelCard

from siman_convert import exporting
from siman_convert.cli import run as siman
from siman_convert.verification import Verification

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's library to httpx


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stub.serving() as served:
        hub_stub.use(served.url, monkeypatch)
        yield served


@pytest.fixture(autouse=True)
def verified_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "verify_file", lambda *_: Verification([], [], None, []))


def pushed(life: Life, output: Path, name: str, *flags: str) -> int:
    return siman(["export", str(life.run.folder), "--output", str(output), "--push-to-hub", name, *flags])


def failed(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("siman: ")]
    assert len(lines) == 1
    return lines[0]


def test_files_and_card_arrive_in_one_commit(
    life: Life, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert pushed(life, tmp_path, "binary-net", "--format", "all", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["uploaded_to"] == f"{hub.url}/{USER}/binary-net"
    assert document["card"] == str(tmp_path / "README.md")
    assert hub.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(hub.files) == {"model.onnx", "model.safetensors", "README.md"}
    assert (hub.commits, hub.lfs) == (1, {"model.onnx", "model.safetensors"})  # both are large
    assert len(hub.files["README.md"]) < LARGE
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"


def test_a_name_with_its_owner(life: Life, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert pushed(life, tmp_path / "m.onnx", "a-team/net") == 0
    assert f"uploaded  {hub.url}/a-team/net\n" in capsys.readouterr().out
    assert set(hub.files) == {"m.onnx", "README.md"}
    assert "POST /api/models/a-team/net/commit/main" in hub.requests


def test_a_card_of_somebody_elses_stays_here_and_ours_is_uploaded(life: Life, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    assert pushed(life, tmp_path, "net") == 0
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert b"written by siman" in hub.files["README.md"]


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x", "a--b", ""])
def test_a_name_that_cannot_be(
    life: Life, hub: Hub, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(life, tmp_path, name) == 2
    assert "expected NAME or USER/NAME" in failed(capsys)
    assert (hub.requests, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unreachable", "no answer from 127.0.0.1:9; leave --push-to-hub out, and export again when online"),
        ("offline", "HF_HUB_OFFLINE is set; unset it"),
        ("nobody", "nobody is logged in at 127.0.0.1"),
        ("refused", "does not accept the token; `hf auth login`"),
    ],
)
def test_nothing_is_exported_where_it_could_not_be_uploaded(
    life: Life,
    hub: Hub,
    case: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case == "unreachable":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    elif case == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub_stub.use(hub.url, monkeypatch, token=None if case == "nobody" else "hf_other")
    assert pushed(life, tmp_path, "net") == 2
    line = failed(capsys)
    assert message in line
    assert "hf_" not in line
    assert (hub.commits, list(tmp_path.iterdir())) == (0, [])


@pytest.mark.parametrize("denied", ["/api/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_an_upload_that_fails_keeps_what_was_written(
    life: Life, hub: Hub, denied: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.denied = (denied,)
    assert pushed(life, tmp_path, "net") == 1
    line = failed(capsys)
    assert f"{tmp_path / 'model.onnx'}: written, but not uploaded to {USER}/net at 127.0.0.1" in line
    assert "`hf auth login` with a token that may write" in line or denied == "/lfs/"
    assert hub.commits == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "README.md"}
