"""The model card beside an export: the hub's library reads it, its figures are measured ones, no name in it can do anything."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exported_run import Life, copied, graphs_once, life, printed  # noqa: F401  fixtures
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from packed_models import one_thread  # noqa: F401  a fixture
from PIL import Image

from siman_convert import evaluate, export, exporting, load
from siman_convert.card import MARK, escape
from siman_convert.cli import run as siman
from siman_convert.description import Accuracy, describe, description_of
from siman_convert.exporting import Exported
from siman_convert.runs import Run

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>alert(1)</script>", "[click](https://evil.example)", "| a | b |", "`code`", "# head", "*b*_i_~~s~~", "---", "a\nb",
    "https://evil.example www.evil.example", "![x](y)", "&lt;b&gt;", "\u202ereversed", "- item", "1. one", "$x$", "key: 'v\"",
    "\\", "{% x %}", "日本語", " ", "```",
]  # fmt: skip


def card_of(exported: Exported) -> ModelCard:
    assert exported.card is not None
    return ModelCard.load(exported.card)


def measured(card: ModelCard) -> dict[str, float]:
    """Metric -> value in the model index."""
    results = card.data.to_dict().get("model-index", [{"results": []}])[0]["results"]
    return {metric["name"]: metric["value"] for result in results for metric in result["metrics"]}


def test_the_hub_reads_the_header_and_finds_what_was_measured(life: Life) -> None:
    card = ModelCard.load(life.run.folder / "README.md")
    data = card.data.to_dict()
    accuracy = evaluate(life.run, device="cpu")
    assert (data["library_name"], data["pipeline_tag"]) == ("siman", "image-classification")
    assert {"onnx", "safetensors", "binary-neural-network", "test_resnet"} <= set(data["tags"])
    assert not {"license", "datasets", "base_model"} & set(data)  # nobody said; local images; random weights
    assert measured(card) == {
        "top-1 on 97 validation images": pytest.approx(accuracy.top1 / 100, abs=1e-6),
        "top-5 on 97 validation images": pytest.approx(accuracy.top5 / 100, abs=1e-6),
    }
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "small-digits"
    assert f"Top-1 {accuracy.top1:.2f} %" in card.text


def test_sizes_and_digests_are_those_of_the_files(life: Life) -> None:
    text = (life.run.folder / "README.md").read_text()
    for path in (life.onnx, life.safetensors):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| {path.name} | {path.stat().st_size:,} | {digest} |" in text
    (line,) = re.findall(r"weights   ([\d,]+) -> ([\d,]+) bytes", life.exported)
    assert f"Weights: {line[0]} bytes in full precision, {line[1]} packed" in text
    assert "| 11 | binary | " in text
    assert "| 1 | full precision | stem: reads the image |" in text
    assert life.run.info().recipe_digest in text
    assert "    lr: 0.01\n" in text
    assert "momentum" not in text  # as siman's defaults have it


def test_nothing_of_this_machine_is_named(copied: Life) -> None:
    """Paths of data, run and teacher are the user's own affair."""
    recipe = copied.run.folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        .replace("teacher: null", "teacher: resnet18=/home/somebody/t.pth")
        .replace("distill_weight: 0.0", "distill_weight: 0.5")
    )
    text = export(copied.run.folder, format="safetensors").card.read_text()  # type: ignore[union-attr]
    assert "    teacher: resnet18\n" in text
    for private in ("/home", str(copied.folder), copied.run.name, copied.run.info().data):
        assert private not in text


@pytest.mark.parametrize("flag", ["half", "int8"])
def test_rounded_weights_have_the_accuracy_measured_of_them_or_none(life: Life, flag: str, tmp_path: Path) -> None:
    found = export(life.run.folder, output=tmp_path, images=16, **{flag: True})  # type: ignore[arg-type]
    assert found.change is not None
    assert measured(card_of(found)) == {
        "top-1 on 16 validation images": pytest.approx(found.change.after / 100, abs=1e-6)
    }
    if flag == "half":
        export(life.run.folder, output=tmp_path, half=True, format="safetensors", images=16)
        again = export(tmp_path / "model.safetensors", data=life.run.info().data, output=tmp_path / "again", images=16)
        assert measured(card_of(again)) == {}
        assert "before float16" in card_of(again).text


@pytest.fixture
def hostile(life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """An export whose names are all of a hostile user's making."""
    model = load(life.safetensors)
    description = description_of(model)
    classes = tuple(HOSTILE[: len(description.classes)])
    accuracy = Accuracy(50.0, 60.0, 10, "\n---\nlicense: mit\n<b>data</b>")
    describe(model, replace(description, classes=classes, accuracy=accuracy, recipe_digest="<i>x</i>"))
    monkeypatch.setattr(exporting, "verification_source", lambda *_: (None, False))
    monkeypatch.setattr(exporting, "verify_file", lambda *_: exporting.Verification([], [], None, []))
    return export(model, output=tmp_path / "a`<b>|c.onnx")


def test_names_of_users_do_nothing(hostile: Exported) -> None:
    card = card_of(hostile)
    data = card.data.to_dict()
    assert "license" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == " --- license: mit <b>data</b>"
    html = MarkdownIt("gfm-like", {"linkify": False}).render(card.content.split("---\n", 2)[2])
    allowed = {"p", "h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "a"}
    assert set(re.findall(r"<([a-z0-9]+)", html)) == allowed
    assert {link.split("/")[2] for link in re.findall(r'href="([^"]*)"', html)} == {"github.com", "arxiv.org"}
    assert len(re.findall(r"<h[12]>", html)) == 7


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    document = f"| a | b |\n|---|---|\n| before {escape(text)} after | second |\n"
    html = MarkdownIt("gfm-like", {"linkify": False}).render(document)
    cells = re.findall(r"<td>(.*?)</td>", html)
    assert len(cells) == 2
    assert not re.search(r"<[a-z]", cells[0])
    shown = cells[0]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    plain = "".join(c if c.isprintable() else " " for c in text).strip() or "(no name)"
    assert shown == f"before {plain} after"
    assert not re.search(r"(?<!\\)://", escape(text))
    assert "www." not in escape(text)


def test_the_code_of_the_card_runs(life: Life, tmp_path: Path) -> None:
    """Each Python block, in the folder of the file; stock ONNX Runtime's without siman and torch."""
    found = export(life.run.folder, with_preprocess=True, output=tmp_path, images=8)
    Image.new("RGB", (40, 30), (200, 100, 0)).save(tmp_path / "photo.jpg")
    stock, ours = re.findall(r"```python\n(.*?)```", card_of(found).text, re.DOTALL)
    alone = "import sys; sys.modules['siman_convert'] = sys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", alone + stock], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in range(10)
    done = subprocess.run([sys.executable, "-c", ours], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_readme_that_is_not_ours_stays(life: Life, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    assert siman(["export", str(life.run.folder), "--output", str(tmp_path), "--images", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["card"] is None
    assert "README.md is not siman's: it stays" in captured.err
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_the_card_is_renamed_last(life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any rename, no card tells of a file that is not there."""
    renamed: list[str] = []
    real = Path.replace

    def record(self: Path, target: Any) -> Path:
        if Path(target).parent == tmp_path and Path(target).name[0] != ".":
            renamed.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", record)
    export(life.run.folder, format="all", output=tmp_path, images=4)
    assert sorted(renamed[:-1]) == ["model.onnx", "model.safetensors"]
    assert renamed[-1] == "README.md"
    assert MARK in (tmp_path / "README.md").read_text()


def test_a_pretrained_start_names_timms_weights(copied: Life) -> None:
    file = copied.run.folder / "run.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "weights": "pretrained", "data": "hfds/ylecun/mnist"}))
    assert Run(copied.run.folder).info().weights == "pretrained"
    exported = export(copied.run.folder, format="safetensors", data=str(info["data"]), images=4)
    data = card_of(exported).data.to_dict()
    assert data["base_model"] == "timm/test_resnet.r160_in1k"
    assert data["datasets"] == ["ylecun/mnist"]
