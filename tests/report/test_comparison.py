"""Two runs beside each other: what the page says follows from the figures, whatever they are."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from chromium import opened
from torch import Tensor
from trained_run import Trained

from siman_convert.cli import run as siman
from siman_convert.errors import InputError
from siman_convert.report.comparison import Pair, comparison_page, findings, means, pair
from siman_convert.report.content import Content, gather
from siman_convert.report.statistics import layer_statistics

SHAPE = (32, 576)
Draw = Callable[[], Tensor]


def laplacian() -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample(SHAPE)


def gaussian() -> Tensor:
    return torch.randn(SHAPE)


def uniform() -> Tensor:
    return torch.rand(SHAPE)


@pytest.fixture(scope="module")
def content(trained: Trained) -> Content:
    return gather(trained.run, which="last", images=False)


def run_of(content: Content, name: str, decay: float, draws: list[Draw]) -> Content:
    """As a run of that name and decay, with a layer for each of these distributions."""
    torch.manual_seed(len(name))
    layers = tuple(layer_statistics(f"layer{i}", draw(), "half") for i, draw in enumerate(draws))
    recipe = content.recipe.model_copy(update={"latent_weight_decay": decay})
    return replace(content, folder=Path(name), recipe=recipe, layers=layers)


def test_figures_that_agree_with_the_paper(content: Content) -> None:
    two = pair(run_of(content, "without", 0.0, [gaussian] * 4), run_of(content, "with", 0.01, [laplacian] * 4))
    ones, entropies, shapes, flips, _ = findings(two)
    assert "0.36" in ones or "0.37 with" in ones
    assert "lower with decay in 4 layers: the paper's direction" in ones
    assert "So it is in 4 layers: the paper's direction" in entropies
    assert "nearer to a Laplacian with decay in 4 layers: the paper's direction" in shapes
    assert "with decay: Laplacian in 4; with less or none: Gaussian in 4" in shapes
    assert "% of a layer's bits flip" in flips
    (first, _), (second, _) = means(two)
    assert (first, second) == pytest.approx((0.541, 0.368), abs=0.01)


def test_figures_that_do_not(content: Content) -> None:
    two = pair(run_of(content, "without", 0.0, [laplacian] * 4), run_of(content, "with", 0.01, [gaussian] * 4))
    ones, entropies, shapes, *_ = findings(two)
    assert "lower with decay in 0 layers: against the paper" in ones
    assert "So it is in 0 layers: against the paper" in entropies
    assert "in 0 layers: against the paper" in shapes


def test_a_lower_share_alone_is_not_more_information(content: Content) -> None:
    two = pair(run_of(content, "without", 0.0, [uniform] * 4), run_of(content, "with", 0.01, [gaussian] * 4))
    ones, entropies, *_ = findings(two)
    assert "lower with decay in 4 layers: the paper's direction" in ones
    assert "So it is in 0 layers: against the paper" in entropies


def test_figures_that_say_nothing(content: Content) -> None:
    mixed = [laplacian, gaussian, laplacian, gaussian]
    two = pair(run_of(content, "without", 0.0, mixed), run_of(content, "with", 0.01, mixed[::-1]))
    assert all("in 2 layers: no clear direction" in line for line in findings(two)[:3])


def test_flips_that_one_run_did_not_record_are_not_compared(content: Content) -> None:
    first, second = run_of(content, "without", 0.0, [uniform]), run_of(content, "with", 0.01, [gaussian])
    old = tuple({key: value for key, value in record.items() if key != "flip_rate"} for record in second.history)
    assert not any("flip" in line for line in findings(pair(first, replace(second, history=old))))


def test_runs_of_one_decay_say_nothing_about_it(content: Content) -> None:
    two = pair(run_of(content, "one", 0.01, [laplacian]), run_of(content, "two", 0.01, [uniform]))
    assert findings(two) == [
        "Both runs have the same weight decay on latent weights: they say nothing about what it does."
    ]


def test_what_else_differs_is_said(content: Content) -> None:
    first, second = run_of(content, "one", 0.01, [laplacian]), run_of(content, "two", 0.0, [uniform])
    (table, _) = comparison_page(pair(first, second)).sections[1].tables
    assert [row[0] for row in table.rows] == ["latent_weight_decay"]
    assert "Nothing else differs" in table.caption
    longer = replace(second, recipe=second.recipe.model_copy(update={"epochs": 77}))
    (table, _) = comparison_page(pair(first, longer)).sections[1].tables
    assert {row[0] for row in table.rows} == {"latent_weight_decay", "epochs"}
    assert "What else differs" in table.caption


def test_runs_of_different_networks_are_refused(content: Content) -> None:
    first, second = run_of(content, "one", 0.01, [laplacian]), run_of(content, "two", 0.0, [uniform] * 2)
    with pytest.raises(InputError, match="not the same binary layers"):
        pair(first, second)


def test_runs_of_one_name_are_told_apart_by_their_folders(content: Content) -> None:
    first, second = run_of(content, "a/run", 0.01, [laplacian]), run_of(content, "b/run", 0.0, [uniform])
    two = pair(first, second)
    assert isinstance(two, Pair)
    assert two.labels == ("a/run", "b/run")


@pytest.mark.slow
def test_as_a_user_types_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, decay in (("with", 0.01), ("without", 0.0)):
        shutil.copytree(trained.run.folder, tmp_path / "runs" / name)
        file = tmp_path / "runs" / name / "recipe.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "latent_weight_decay": decay}))
    assert siman(["report", "--compare", "with", "without", "--png", "figures"]) == 0
    said = capsys.readouterr().out
    assert "lower with decay in 0 layers" in said  # it is one network twice
    assert "One run of each" in said
    page = tmp_path / "runs" / "compare-with-without.html"
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"ones", "entropy", "weights", "top1"}
    dom, console = opened(page, tmp_path / "profile")
    assert console == []
    assert 'data-drawn="4"' in dom
    assert siman(["report", "--compare", "with", "without", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
