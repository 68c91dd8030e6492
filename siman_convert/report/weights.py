"""Figures of the binary layers' weights: their distribution, and what their bits are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import exp
from typing import Any

import altair as alt

from siman_convert.report.charts import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Chart,
    Figure,
    colours,
    data,
    layer_axis,
    layers_high,
    legend,
    reference,
)
from siman_convert.report.statistics import FAR, BitStatistics, LayerStatistics, Spread

BEST_SHARES = {"Laplacian": exp(-1), "Gaussian": 0.54, "uniform": 2 / 3}  # of ones, for the three distributions
ONE, ZERO = "bit 1, used as +1", "bit 0, used as -1"
_ACROSS = 4  # histograms beside each other in a PNG


def weight_figures(layers: Sequence[LayerStatistics]) -> Iterator[Figure]:
    """For a network with binary layers."""
    if not layers:
        return
    used = layers[0].used
    histograms = Figure(
        "weights", "Latent weights", _histogram_caption(layers), _histogram(layers), _histograms(layers), wide=True
    )
    yield histograms
    yield Figure(
        "ones",
        "Share of ones",
        _ones_caption(used),
        _dots(layers, "share of a filter's bits that are 1", _ones, BEST_SHARES),
    )
    yield Figure(
        "entropy", "Information in a bit", _entropy_caption(layers), _dots(layers, "bits of information", _entropy)
    )
    yield Figure("cosine", "Agreement of weights and bits", _cosine_caption(layers), _dots(layers, "cosine", _cosine))


def _ones(bits: BitStatistics) -> Spread:
    return bits.ones


def _entropy(bits: BitStatistics) -> Spread:
    return bits.entropy


def _cosine(bits: BitStatistics) -> Spread:
    return bits.cosine


# ------------------------------------------------------------------------------------------------------ histograms


def _histogram(layers: Sequence[LayerStatistics]) -> Chart:
    """One layer at a time, chosen from a list."""
    names = [layer.name for layer in layers]
    chosen = alt.param("shown", value=names[0], bind=alt.binding_select(options=names, name="layer "))
    parts = alt.layer(*_histogram_parts(layers, still=False), data=data(list(_histogram_rows(layers))))
    return parts.transform_filter("datum.layer == shown").add_params(chosen).properties(height=260)


def _histograms(layers: Sequence[LayerStatistics]) -> alt.ConcatChart:
    """All layers beside each other."""
    charts = [
        alt.layer(*_histogram_parts([layer], still=True), data=data(list(_histogram_rows([layer])))).properties(
            title=f"{layer.name}: {layer.shape}", width=170, height=110
        )
        for layer in layers
    ]
    return alt.concat(*charts, columns=_ACROSS)


def _histogram_parts(layers: Sequence[LayerStatistics], *, still: bool) -> list[Chart]:
    title = "standard deviations" if still else "latent weight, in standard deviations of its filter"
    x = alt.X("from:Q", title=title)
    bars = (
        alt.Chart()
        .mark_rect(opacity=0.75)
        .encode(
            x=x,
            x2="to:Q",
            y=alt.Y("density:Q", title="density"),
            y2=alt.datum(0),
            color=alt.Color("bit:N", scale=colours([ONE, ZERO], [ORANGE, BLUE]), legend=legend()),
            tooltip=[
                "layer:N",
                alt.Tooltip("centre:Q", title="weight", format=".2f"),
                alt.Tooltip("density:Q", format=".3f"),
                alt.Tooltip("laplacian:Q", format=".3f", title="Laplacian"),
                alt.Tooltip("nearest:Q", format=".3f", title="nearest"),
            ],
        )
    )
    curves = [
        alt.Chart(name=f"ink_{name}")
        .mark_line(strokeWidth=1.5, color=INK, strokeDash=dash)
        .encode(x="centre:Q", y=f"{name}:Q", order="centre:Q")
        for name, dash in (("laplacian", [1, 0]), ("nearest", [1, 3]))
    ]
    rules = alt.Chart(data(list(_threshold_rows(layers)))).mark_rule(color=GREY, strokeDash=[4, 3]).encode(x="at:Q")
    return [bars, *curves, rules] if still else [bars, *curves, *_of_shown(layers, rules)]


def _of_shown(layers: Sequence[LayerStatistics], rules: Chart) -> Iterator[Chart]:
    """What of one chart for all layers is drawn for the chosen one alone: thresholds, and the name of what is nearest."""
    yield rules.transform_filter("datum.layer == shown")
    names = alt.Chart(data([{"layer": layer.name, "name": f"nearest: {layer.shape}"} for layer in layers]))
    place = {"x": alt.value("width"), "y": alt.value(2)}
    text = names.mark_text(align="right", baseline="top", fontSize=11).encode(text="name:N", **place)
    yield text.transform_filter("datum.layer == shown")


def _histogram_rows(layers: Sequence[LayerStatistics]) -> Iterator[dict[str, Any]]:
    for layer in layers:
        half_width = (layer.histogram.centres[1] - layer.histogram.centres[0]) / 2
        nearest = layer.nearest_density()
        dotted = [None] * len(layer.histogram.centres) if nearest is None else [round(float(y), 4) for y in nearest]
        rows = zip(layer.histogram.centres, layer.histogram.density, layer.laplacian(), dotted, strict=True)
        for centre, density, laplacian, height in rows:
            yield {
                "layer": layer.name,
                "centre": round(float(centre), 3),
                "from": round(float(centre - half_width), 3),
                "to": round(float(centre + half_width), 3),
                "density": round(float(density), 4),
                "laplacian": round(float(laplacian), 4),
                "nearest": height,
                "bit": ONE if _is_one(layer, float(centre)) else ZERO,
            }


def _threshold(layer: LayerStatistics) -> float:
    return 0.0 if layer.used == "sign" else layer.bits[layer.used].threshold.mean


def _is_one(layer: LayerStatistics, z: float) -> bool:
    return z >= 0 if layer.used == "sign" else abs(z) >= _threshold(layer)


def _threshold_rows(layers: Sequence[LayerStatistics]) -> Iterator[dict[str, Any]]:
    for layer in layers:
        for at in {_threshold(layer), -_threshold(layer)}:
            yield {"layer": layer.name, "at": at}


def _histogram_caption(layers: Sequence[LayerStatistics]) -> str:
    used = layers[0].used
    rule = {
        "half": "SiMaN looks at magnitudes, not signs: the half of a filter's weights that lies farther from 0 than the "
        "dashed lines gets bit 1, the half between them bit 0.",
        "analytic": "SiMaN looks at magnitudes, not signs: weights beyond the dashed lines get bit 1, those between them bit 0; "
        "the lines are where bits agree best with magnitudes.",
        "sign": "This network takes the sign, as XNOR-Net does, and not SiMaN's magnitudes: the dashed line is at 0.",
    }[used]
    counts = Counter(layer.shape for layer in layers)
    nearest = ", ".join(f"{shape} in {count}" for shape, count in counts.most_common())
    none = f" (without a dotted curve where all gaps are {FAR} or more)" if "none of them" in counts else ""
    return (
        "Training moves full-precision (latent) weights; the network only ever uses the bit that each of them stands for. "
        f"{rule} Thresholds are each filter's own, the lines their mean. Spikes, where there are any, come from SiMaN's "
        "clip, which sets a layer's smallest and largest magnitudes to common values. The solid curve is the Laplacian fitted to "
        "the layer, which is what l2 is said to drive weights to; the dotted one the nearest of Laplacian, Gaussian and uniform, "
        f"by the largest gap between the cumulative distributions: {nearest} of {len(layers)} layers{none}."
    )


# ------------------------------------------------------------------------------------------- one figure a layer


def _dots(
    layers: Sequence[LayerStatistics],
    title: str,
    figure: Callable[[BitStatistics], Spread],
    lines: dict[str, float] | None = None,
) -> Chart:
    rows = [
        {"layer": layer.name, "bits": selection, **vars(figure(bits))}
        for layer in layers
        for selection, bits in layer.bits.items()
    ]
    return dots(rows, "bits", {"half": ORANGE, "analytic": BLUE}, title, len(layers), lines)


def dots(
    rows: Sequence[dict[str, Any]],
    kind: str,
    kinds: dict[str, str],
    title: str,
    layers: int,
    lines: dict[str, float] | None = None,
) -> Chart:
    """A dot for each layer (down) and kind (colour): mean, and as a bar the quartiles over the filters."""
    base = alt.Chart(data(rows)).encode(
        y=layer_axis(),
        color=alt.Color(
            f"{kind}:N",
            scale=colours(list(kinds), list(kinds.values())),
            legend=legend(offset=8 if lines is None else 22),
        ),
        tooltip=[
            "layer:N",
            f"{kind}:N",
            alt.Tooltip("mean:Q", format=".4f"),
            alt.Tooltip("low:Q", title="first quartile", format=".4f"),
            alt.Tooltip("high:Q", title="third quartile", format=".4f"),
        ],
    )
    scale = alt.Scale(zero=False, nice=True)
    bars = base.mark_rule(strokeWidth=4, opacity=0.35).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q")
    points = base.mark_circle(size=60, opacity=1).encode(x=alt.X("mean:Q", scale=scale))
    parts: list[Chart] = [bars, points] if lines is None else [reference(lines, "x"), bars, points]
    return alt.layer(*parts).properties(height=layers_high(layers))


def _ones_caption(used: str) -> str:
    now = {
        "half": "This network uses half.",
        "analytic": "This network uses analytic.",
        "sign": "This network uses neither.",
    }
    return (
        "How many of a filter's bits are 1. half: the larger half of the magnitudes, so always one half (less only where "
        "magnitudes "
        "are equal). analytic: the share that aligns bits and magnitudes best, k*/n in the paper. It depends on the "
        "distribution of "
        "the weights alone: dashed, what it is for three of them; 1 where all are about equal. Dots are means over the "
        f"filters of a layer, bars their middle half. {now[used]}"
    )


def _entropy_caption(layers: Sequence[LayerStatistics]) -> str:
    means = [layer.bits["analytic"].entropy.mean for layer in layers]
    return (
        "A bit that is 1 as often as 0 carries one bit of information; one that is 1 in 37 % of the cases (1/e, the best "
        "share for Laplacian weights) carries 0.95. half fills its bits by construction; analytic carries "
        f"{min(means):.3f} to {max(means):.3f} here. This is why half is siman's default."
    )


def _cosine_caption(layers: Sequence[LayerStatistics]) -> str:
    gaps = [layer.bits["analytic"].cosine.mean - layer.bits["half"].cosine.mean for layer in layers]
    return (
        "How well bits in {0, 1} stand for the magnitudes of the weights: the cosine of the angle between the two vectors "
        "of a filter; 1 would be no loss. analytic is the best there is; half gives up "
        f"{min(gaps):.3f} to {max(gaps):.3f} of it for fuller bits."
    )
