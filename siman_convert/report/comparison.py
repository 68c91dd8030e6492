"""The page of two runs of one network beside each other: what weight decay on latent weights does to their bits.

The paper's claim (arXiv 2102.07981): l2 drives latent weights to a Laplacian distribution, for which the best share of
ones k*/n is
1/e and a bit carries 0.95 bit of information; so SiMaN leaves it out. Every sentence on the page follows from the figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from siman_convert.environment import siman_version
from siman_convert.errors import InputError
from siman_convert.report.charts import BLUE, ORANGE, Chart, Figure, colours, data, epochs, legend
from siman_convert.report.content import Content
from siman_convert.report.page import Page, Section, Table, Tile
from siman_convert.report.statistics import LayerStatistics
from siman_convert.report.weights import BEST_SHARES, dots

CLEAR = 0.75  # share of the layers that have to agree before a direction is called one
_ACROSS = 4


@dataclass(frozen=True)
class Pair:
    """Two runs; `more` has the larger decay on its latents, None where both have the same. labels: what they are called."""

    first: Content
    second: Content
    labels: tuple[str, str]

    @property
    def colours(self) -> dict[str, str]:
        return dict(zip(self.labels, (ORANGE, BLUE), strict=True))

    @property
    def layers(self) -> list[tuple[LayerStatistics, LayerStatistics]]:
        return list(zip(self.first.layers, self.second.layers, strict=True))

    def ordered(self) -> tuple[int, int] | None:
        """Which of the two (0, 1) has more decay, and which less; None where they have the same."""
        decays = [content.recipe.latent_weight_decay for content in (self.first, self.second)]
        return None if decays[0] == decays[1] else (0, 1) if decays[0] > decays[1] else (1, 0)


def pair(first: Content, second: Content) -> Pair:
    """Raises InputError where the two have not the same binary layers."""
    if first.folder.resolve() == second.folder.resolve():
        raise InputError(f"--compare {first.folder} twice: expected two runs")
    shapes = [[(layer.name, layer.filters, layer.size) for layer in content.layers] for content in (first, second)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise InputError(
            f"--compare: {first.name} ({first.info.model}) and {second.name} ({second.info.model}) have not the same "
            f"binary layers; expected two runs of one network"
        )
    same = first.name == second.name
    return Pair(first, second, (str(first.folder), str(second.folder)) if same else (first.name, second.name))


def comparison_page(two: Pair) -> Page:
    """Distribution of latent weights, k*/n and entropy of two runs, what differs in their recipes, and what follows."""
    first, second = two.first, two.second
    return Page(
        kind="siman report --compare",
        title=f"{two.labels[0]} and {two.labels[1]}",
        lead="SiMaN trains binary layers without weight decay: l2 is said to drive latent weights to a Laplacian distribution, "
        "for which a bit that is chosen for best agreement is 1 in 37 % of the cases only and carries 0.95 bit of "
        f"information. Here are two runs of {first.info.model} on {first.info.data_name}, at the end of training.",
        tiles=list(_tiles(two)),
        notes=findings(two),
        sections=[
            Section(
                "bits", "What becomes of the bits", figures=[_ones(two), _entropy(two), _weights(two), _accuracy(two)]
            ),
            Section("tables", "In figures", tables=[_differences(two), _layer_table(two)]),
        ],
        footer=f"Written by siman {siman_version()}; runs of {first.info.created} and {second.info.created}. Last weights.",
    )


# ----------------------------------------------------------------------------------------------------------- words


def _tiles(two: Pair) -> Iterator[Tile]:
    for place, (label, content) in enumerate(zip(two.labels, (two.first, two.second), strict=True)):
        decay = content.recipe.latent_weight_decay
        ones, _ = means(two)[place]
        yield Tile(label, f"{ones:.3f}", f"mean k*/n; weight decay on latents {decay:g}")
    for label, content in zip(two.labels, (two.first, two.second), strict=True):
        newest = content.newest("binary")
        if newest is not None:
            yield Tile(label, f"{newest['top1']:.2f} %", "top-1 of the last weights")


def means(two: Pair) -> list[tuple[float, float]]:
    """Of each run: k*/n and entropy of the analytic bits, mean over the layers."""
    return [
        (
            float(np.mean([layer.bits["analytic"].ones.mean for layer in content.layers])),
            float(np.mean([layer.bits["analytic"].entropy.mean for layer in content.layers])),
        )
        for content in (two.first, two.second)
    ]


def findings(two: Pair) -> list[str]:
    """What the figures say, in sentences; a direction is named only where CLEAR of the layers share it."""
    order = two.ordered()
    if order is None:
        return ["Both runs have the same weight decay on latent weights: they say nothing about what it does."]
    with_decay, without = (means(two)[place] for place in order)
    layers = [(layer[order[0]], layer[order[1]]) for layer in two.layers]
    bits = [(a.bits["analytic"], b.bits["analytic"]) for a, b in layers]
    lower = sum(a.ones.mean < b.ones.mean for a, b in bits)
    fuller = sum(a.entropy.mean < b.entropy.mean for a, b in bits)
    nearer = sum(a.distances["Laplacian"] < b.distances["Laplacian"] for a, b in layers)
    count = len(layers)
    return [
        f"k*/n, mean over {count} layers: {with_decay[0]:.3f} with decay, {without[0]:.3f} with less or none; the paper "
        f"expects 0.37 "
        f"with decay and more without. It is lower with decay in {lower} layers: {_direction(lower, count)}.",
        f"Information in an analytic bit: {with_decay[1]:.3f} with decay, {without[1]:.3f} with less or none; the paper "
        f"expects more without. So it is in {fuller} layers: {_direction(fuller, count)}. A half bit carries 1 in both.",
        f"Weights are nearer to a Laplacian with decay in {nearer} layers: {_direction(nearer, count)}. Nearest of three "
        f"distributions with decay: {_shapes(layers, 0)}; with less or none: {_shapes(layers, 1)}.",
        *_flip_finding(two, order),
        "One run of each: another seed, network or length may say something else.",
    ]


def _flip_finding(two: Pair, order: tuple[int, int]) -> list[str]:
    """How many bits flip in an epoch, where both runs recorded it: mean over layers and epochs."""
    shares = [
        [share for record in content.history for share in record.get("flip_rate", {}).values()]
        for content in (two.first, two.second)
    ]
    if not all(shares):
        return []
    more, less = (100 * float(np.mean(shares[place])) for place in order)
    return [
        f"In an epoch {more:.1f} % of a layer's bits flip with decay, {less:.1f} % with less or none, means over the training."
    ]


def _direction(count: int, of: int) -> str:
    """Whether so many layers agree with the paper, or with its opposite."""
    if count >= CLEAR * of:
        return "the paper's direction"
    return "against the paper" if count <= (1 - CLEAR) * of else "no clear direction"


def _shapes(layers: Sequence[tuple[LayerStatistics, LayerStatistics]], place: int) -> str:
    counts = Counter(layer[place].shape for layer in layers)
    return ", ".join(f"{name} in {count}" for name, count in counts.most_common())


# --------------------------------------------------------------------------------------------------------- figures


def _ones(two: Pair) -> Figure:
    chart = dots(list(_rows(two, "ones")), "run", two.colours, "k*/n", len(two.layers), BEST_SHARES)
    return Figure(
        "ones",
        "Best share of ones, k*/n",
        "For each layer the share of ones that aligns a filter's bits best with its magnitudes. It depends on the "
        "weights' distribution "
        "alone; dashed, what it is for three of them; 1 where all magnitudes are about equal. Dots are means over the "
        "filters, bars their middle half.",
        chart,
    )


def _entropy(two: Pair) -> Figure:
    chart = dots(list(_rows(two, "entropy")), "run", two.colours, "bits of information", len(two.layers))
    return Figure(
        "entropy",
        "Information in an analytic bit",
        "What one bit of a filter carries when the share of ones is k*/n: 1 for one half, less to both sides of it (0.95 "
        "for 1/e, 0.92 for 2/3).",
        chart,
    )


def _rows(two: Pair, field: str) -> Iterator[dict[str, Any]]:
    for layers in two.layers:
        for label, layer in zip(two.labels, layers, strict=True):
            yield {"layer": layer.name, "run": label, **vars(getattr(layer.bits["analytic"], field))}


def _weights(two: Pair) -> Figure:
    names = [layer.name for layer, _ in two.layers]
    chosen = alt.param("shown", value=names[0], bind=alt.binding_select(options=names, name="layer "))
    chart = _densities(two, two.layers).transform_filter("datum.layer == shown").add_params(chosen)
    stills = [
        _densities(two, [layers], "standard deviations").properties(title=layers[0].name, width=170, height=110)
        for layers in two.layers
    ]
    return Figure(
        "weights",
        "Latent weights",
        "The distribution of a layer's latent weights in standard deviations of their filters, so that only its shape "
        "counts. A Laplacian "
        "has a sharp peak at 0 and long tails, a uniform one is flat and ends; SiMaN's clip pushes small magnitudes away from 0.",
        chart.properties(height=260),
        alt.concat(*stills, columns=_ACROSS),
    )


def _densities(
    two: Pair,
    layers: Sequence[tuple[LayerStatistics, LayerStatistics]],
    title: str = "latent weight, in standard deviations of its filter",
) -> Chart:
    rows = [
        {"layer": layer.name, "run": label, "weight": round(float(centre), 3), "density": round(float(density), 4)}
        for both in layers
        for label, layer in zip(two.labels, both, strict=True)
        for centre, density in zip(layer.histogram.centres, layer.histogram.density, strict=True)
    ]
    chart: Chart = alt.Chart(data(rows)).mark_line(interpolate="step", strokeWidth=1.8)
    return chart.encode(
        x=alt.X("weight:Q", title=title),
        y=alt.Y("density:Q"),
        color=alt.Color(
            "run:N", scale=colours(list(two.colours), list(two.colours.values())), legend=legend(lines=True)
        ),
        tooltip=["layer:N", "run:N", "weight:Q", "density:Q"],
    )


def _accuracy(two: Pair) -> Figure:
    rows = [
        {"run": label, "epoch": record["epoch"], "top1": record["top1"]}
        for label, content in zip(two.labels, (two.first, two.second), strict=True)
        for record in content.history
        if record["phase"] == "binary" and not record.get("re_estimated")
    ]
    chart: Chart = (
        alt.Chart(data(rows))
        .mark_line(strokeWidth=2, point=True)
        .encode(
            x=epochs(rows, "binary epoch"),
            y=alt.Y("top1:Q", title="top-1, %", scale=alt.Scale(zero=False)),
            color=alt.Color("run:N", scale=colours(list(two.colours), list(two.colours.values())), legend=legend()),
            tooltip=["run:N", "epoch:Q", alt.Tooltip("top1:Q", format=".2f")],
        )
    )
    return Figure("top1", "Accuracy", "Validation top-1 after every binary epoch.", chart.properties(height=260))


# ---------------------------------------------------------------------------------------------------------- tables


def _differences(two: Pair) -> Table:
    recipes = [content.recipe.model_dump(mode="json") for content in (two.first, two.second)]
    rows = [
        (name, *(str(recipe[name]) for recipe in recipes))
        for name in recipes[0]
        if recipes[0][name] != recipes[1][name]
    ]
    infos = [content.info for content in (two.first, two.second)]
    rows += [
        (name, *(str(getattr(info, name)) for info in infos))
        for name in ("data", "weights")
        if getattr(infos[0], name) != getattr(infos[1], name)
    ]
    only = [row[0] for row in rows] == ["latent_weight_decay"]
    caption = (
        "Nothing else differs, so what differs in the figures comes from it, or from chance."
        if only
        else "What else differs than the weight decay may be the reason for what differs in the figures."
    )
    return Table("differences", "What differs between the runs", ("field", *two.labels), rows, caption)


def _layer_table(two: Pair) -> Table:
    first, second = two.labels
    rows = [
        (
            a.name,
            f"{a.shape}, {b.shape}",
            *(f"{layer.bits['analytic'].ones.mean:.3f}" for layer in (a, b)),
            *(f"{layer.bits['analytic'].entropy.mean:.3f}" for layer in (a, b)),
            *(f"{layer.distances['Laplacian']:.3f}" for layer in (a, b)),
        )
        for a, b in two.layers
    ]
    columns = ["layer", "nearest distribution"]
    columns += [f"{what}, {label}" for what in ("k*/n", "entropy", "gap") for label in (first, second)]
    return Table(
        "layers-table",
        "Layer by layer",
        columns,
        rows,
        "Gap to a Laplacian: the largest difference between the cumulative distributions of the weights and of the "
        "Laplacian that fits them best; 0 is the same distribution.",
    )
