"""siman report as a user types it: what it writes, that Chromium draws it, and what bad input gets."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import opened
from PIL import Image
from trained_run import CLASSES, HOSTILE, Trained

from siman_convert.cli import run as siman
from siman_convert.cli.report import LIBRARIES
from siman_convert.report.answers import confused_classes
from siman_convert.report.content import Content, gather
from siman_convert.report.page import render
from siman_convert.report.predictions import Predictions
from siman_convert.report.single import run_page
from siman_convert.report.statistics import layer_statistics
from siman_convert.runs import Run
from siman_convert.subjects import load_run_model, open_run_data

FIGURES = ("top1", "loss", "flips", "weights", "ones", "entropy", "cosine", "confusion", "bytes")
TIMED = ("time", "contest")
ERROR = re.compile(r"siman: .*\n")


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Run:
    """The run in a folder of the test's own; its images are where they were."""
    shutil.copytree(trained.run.folder, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def content(trained: Trained) -> Content:
    return gather(trained.run, device="cpu")


def figures_of(html: str) -> dict[str, Any]:
    """The charts' documents, by key."""
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(data)
    return found


def rows_of(chart: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a chart, or of one of its layers."""
    rows: list[dict[str, Any]] = part["data"].get("values") or chart["datasets"][part["data"]["name"]]
    return rows


def test_report_of_a_run_is_drawn_by_chromium_without_a_word_on_the_console(copied: Run, tmp_path: Path) -> None:
    assert siman(["bench", str(copied.folder), "--seconds", "0.001", "--threads", "1"]) == 0
    assert siman(["report", str(copied.folder), "--device", "cpu"]) == 0
    page = copied.folder / "report.html"
    html = page.read_text(encoding="utf-8")
    assert set(figures_of(html)) == {*FIGURES, *TIMED}
    for width in (1280, 500):
        dom, console = opened(page, tmp_path / f"profile-{width}", width)
        assert console == []
        assert f'data-drawn="{len(FIGURES) + len(TIMED)}"' in dom
        places = re.findall(r'data-figure="(\w+)"(.*?)<figcaption>', dom, re.DOTALL)
        assert {key for key, _ in places} == {*FIGURES, *TIMED}
        for key, drawn in places:
            assert len(re.findall(r"<path|<text", drawn)) > 10, f"{key} is empty at {width}"
    assert HOSTILE not in html.replace("\\u003c", "<").split("<script", 1)[0]  # in text it is escaped


def test_the_curve_is_of_the_distribution_that_the_caption_counts(content: Content) -> None:
    """One layer of each kind; where none is near, there is no curve."""
    torch.manual_seed(0)
    drawn = {
        "Laplacian": torch.distributions.Laplace(0.0, 1.0).sample((16, 1152)),
        "Gaussian": torch.randn(16, 1152),
        "uniform": torch.rand(16, 1152),
        "none of them": torch.randn(16, 1152).sign() + 0.01 * torch.randn(16, 1152),
    }
    layers = tuple(layer_statistics(f"layer of {name}", weights, "half") for name, weights in drawn.items())
    html = render(run_page(replace(content, layers=layers)))
    caption = "Laplacian in 1, Gaussian in 1, uniform in 1, none of them in 1 of 4 layers (without a dotted curve where"
    assert caption in html
    chart = figures_of(html)["weights"]
    rows = rows_of(chart, chart)
    for name, layer in zip(drawn, layers, strict=True):
        of_layer = [row for row in rows if row["layer"] == layer.name]
        middle = of_layer[len(of_layer) // 2]["nearest"]  # at 0
        peak = {"Laplacian": 0.707, "Gaussian": 0.399, "uniform": 0.289, "none of them": None}[name]
        assert middle == (None if peak is None else pytest.approx(peak, rel=0.03))
        laplacian = [row["laplacian"] for row in of_layer]
        assert laplacian == pytest.approx(layer.laplacian().tolist(), abs=1e-4)
    texts = [row for part in chart["layer"] if "data" in part for row in rows_of(chart, part) if "name" in row]
    assert texts == [{"layer": layer.name, "name": f"nearest: {layer.shape}"} for layer in layers]


def test_the_page_loads_nothing(copied: Run) -> None:
    assert siman(["report", str(copied.folder), "--device", "cpu"]) == 0
    html = (copied.folder / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert set(re.findall(r"<link[^>]*>", body)) == {'<link rel="icon" href="data:,">'}
    assert not re.findall(r'(?:src|href)="(?!data:)', body)
    assert "url(" not in body
    assert "<script src" not in html


def test_names_that_end_scripts_are_text(content: Content, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    assert content.predictions is not None
    hostile = replace(content.predictions, classes=("0", "1", name))
    mistakes = tuple(replace(one, truth=name, answer=name) for one in hostile.mistakes)
    layers = tuple(replace(layer, name=f"{name}{layer.name}") for layer in content.layers)
    text = json.dumps(content.history).replace('"layer', f'"{name}layer').replace('"conv', f'"{name}conv')
    changed = replace(content, layers=layers, history=tuple(json.loads(text)), folder=Path(name), left_out=name)
    html = render(run_page(replace(changed, predictions=replace(hostile, mistakes=mistakes))))
    assert name not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert name in json.dumps(figures_of(html), ensure_ascii=False)
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    dom, console = opened(page, tmp_path / "profile")
    assert console == []
    assert f'data-drawn="{len(FIGURES)}"' in dom


@pytest.mark.slow
def test_pngs_of_every_figure(copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "figures"
    assert (
        siman(
            ["report", str(copied.folder), "--png", str(folder), "--device", "cpu", "--html", str(tmp_path / "a.html")]
        )
        == 0
    )
    assert f"{len(FIGURES)} figures in {folder}" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {f"{key}.png" for key in FIGURES}
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.width > 1000, path
            pixels = np.asarray(image.convert("L"))
        assert pixels[0, 0] == 255, path
        assert 0.005 < (pixels < 200).mean() < 0.9, path
    assert (tmp_path / "a.html").is_file()
    assert not (copied.folder / "report.html").exists()


def test_json_holds_the_statistics(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "report",
        "run",
        "--output",
        str(trained.folder / "runs"),
        "--html",
        str(tmp_path / "a.html"),
        "--json",
    ]
    assert siman([*arguments, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["bytes"] == (tmp_path / "a.html").stat().st_size < 2_000_000
    (run,) = found["runs"]
    assert run["top1"] == pytest.approx(trained.run.progress().best_top1)
    assert np.sum(run["confusion"]) == 120
    assert [layer["name"] for layer in run["layers"]] == list(trained.run.plan().binarized)
    assert all(layer["bits"]["half"]["ones"]["mean"] <= 0.5 for layer in run["layers"])


def test_images_that_are_not_there_are_left_out_in_one_line(
    trained: Trained, copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads((copied.folder / "run.json").read_text())
    (copied.folder / "run.json").write_text(json.dumps({**info, "data": str(tmp_path / "gone")}))
    assert siman(["report", str(copied.folder), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert (
        f"without confusion matrix and misclassified images: no such path: {tmp_path / 'gone'}" in said.splitlines()[0]
    )
    html = (copied.folder / "report.html").read_text(encoding="utf-8")
    assert "Without confusion matrix" in html
    assert set(figures_of(html)) == set(FIGURES) - {"confusion"}
    assert siman(["report", str(copied.folder), "--device", "cpu", "--data", str(trained.folder / "images")]) == 0
    assert "confusion" in figures_of((copied.folder / "report.html").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert siman(["report", str(copied.folder), "--data", str(tmp_path / "nothing")]) == 2
    assert ERROR.fullmatch(capsys.readouterr().err)


def test_runs_from_before_flips_were_recorded(copied: Run) -> None:
    path = copied.folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum("flip_rate" in record for record in records) == 2
    old = [{key: value for key, value in record.items() if key != "flip_rate"} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert siman(["report", str(copied.folder), "--device", "cpu"]) == 0
    assert set(figures_of((copied.folder / "report.html").read_text(encoding="utf-8"))) == set(FIGURES) - {"flips"}


def test_a_run_that_trained_nothing(copied: Run, tmp_path: Path) -> None:
    """As the recipe post-training leaves it: one evaluation."""
    path = copied.folder / "metrics.jsonl"
    (only,) = (line for line in path.read_text().splitlines() if '"epoch": 0' in line)
    path.write_text(only + "\n")
    assert siman(["report", str(copied.folder), "--device", "cpu"]) == 0
    dom, console = opened(copied.folder / "report.html", tmp_path / "profile")
    assert console == []
    assert f'data-drawn="{len(FIGURES) - 1}"' in dom


def test_predictions_against_the_model_one_image_at_a_time(trained: Trained, content: Content) -> None:
    from siman_convert.data import Preprocess, eval_transform

    model, split = load_run_model(trained.run), open_run_data(trained.run).val
    transform = eval_transform(Preprocess.from_dict(trained.run.info().preprocess))
    confusion, losses = np.zeros((3, 3), dtype=int), []
    for index in range(len(split)):
        image, label = split.read(index)
        with torch.no_grad():
            logs = model(transform(image)[None]).double().log_softmax(dim=1)[0]
        confusion[label, int(logs.argmax())] += 1
        if logs.argmax() != label:
            losses.append(float(logs[label].exp()))
    found = content.predictions
    assert found is not None
    assert found.confusion.tolist() == confusion.tolist()
    assert found.top1 == pytest.approx(100 * confusion.trace() / 120)
    assert losses, "the network makes no mistake: nothing is tested"
    assert [one.truth_probability for one in found.mistakes] == pytest.approx(sorted(losses)[:12], rel=1e-4)
    assert all(one.png.startswith(b"\x89PNG") and one.truth != one.answer for one in found.mistakes)
    assert {one.truth for one in found.mistakes} <= set(CLASSES)


def test_of_many_classes_the_most_confused_are_shown() -> None:
    confusion = np.eye(300, dtype=np.int64) * 50
    confusion[7, 250], confusion[31, 7] = 9, 4
    shown = confused_classes(Predictions(tuple(map(str, range(300))), confusion, ()))
    assert len(shown) == 20
    assert {7, 31, 250} <= set(shown)
    assert shown == sorted(shown)


def test_best_and_last_are_told_apart(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, which in (([], "best"), (["--last"], "last")):
        arguments = ["report", str(trained.run.folder), "--html", str(tmp_path / "a.html"), "--json", "--device", "cpu"]
        assert siman([*arguments, *flag]) == 0
        assert json.loads(capsys.readouterr().out)["runs"][0]["weights"] == which


@pytest.mark.parametrize("missing", LIBRARIES)
def test_without_its_libraries_it_says_what_to_install(
    missing: str, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else known(name))
    assert siman(["report", str(trained.run.folder)]) == 2
    said = capsys.readouterr().err
    assert ERROR.fullmatch(said)
    assert missing in said
    assert "pip install 'siman-convert[report]'" in said


def test_bad_input(copied: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    run = str(copied.folder)
    for arguments, said in (
        (["nowhere"], "no run at nowhere"),
        ([run, "--html", str(tmp_path)], "is a folder"),
        ([run, "--html", str(tmp_path / "no" / "a.html")], "there is no folder"),
        ([run, "--png", str(tmp_path / "file")], "is a file"),
        ([run, "--compare", run, run], "goes with no other RUN"),
        (["--compare", run, run], "twice"),
        (["--compare", run], "requires 2 arguments"),
        ([run, "--device", "tpu"], "not usable here"),
    ):
        assert siman(["report", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert ERROR.fullmatch(error), error
        assert said in error
    (copied.folder / "bench.json").write_text('{"layers": 3}')
    assert siman(["report", run]) == 2
    assert "run that again, or remove it" in capsys.readouterr().err
