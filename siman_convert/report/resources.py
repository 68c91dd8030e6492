"""Figures of where a network's bytes and time go."""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt

from siman_convert.costs import Costs
from siman_convert.report.charts import (
    BINARY,
    BLUE,
    FULL_PRECISION,
    GREEN,
    GREY,
    ORANGE,
    Chart,
    Figure,
    colours,
    data,
    layer_axis,
    layers_high,
    legend,
)
from siman_convert.report.timing import Contest, Layers, Timing

_KINDS = {"binary": ORANGE, "convolution": BLUE, "8-bit": GREEN, "other": GREY}


def resource_figures(costs: Costs, timing: Timing | None) -> Iterator[Figure]:
    """Bytes always, time where `siman bench` has measured it."""
    yield Figure("bytes", "Where the bytes go", _bytes_caption(costs), _bytes(costs))
    if timing is not None:
        yield Figure("time", "Where the time goes", _time_caption(timing), _time(timing))
        if any(len(contest.results) > 1 for contest in timing.contests):
            yield Figure("contest", "Beside full precision", _contest_caption(timing), _contests(timing))


def _bytes(costs: Costs) -> Chart:
    rows = [
        {
            "layer": row.name,
            "kind": BINARY if row.binarize else FULL_PRECISION,
            "before": row.bytes_before / 1e3,
            "after": row.bytes_after / 1e3,
        }
        for row in costs.rows
        if row.bytes_before or row.bytes_after
    ]
    tooltip = [alt.Tooltip("layer:N"), alt.Tooltip("kind:N"), alt.Tooltip("before:Q", title="kB before", format=",.1f"),
               alt.Tooltip("after:Q", title="kB packed", format=",.1f")]  # fmt: skip
    base = alt.Chart(data(rows)).encode(y=layer_axis(), tooltip=tooltip)
    before = base.mark_bar(color=GREY, opacity=0.3, height=12).encode(x=alt.X("before:Q", title="kB"))
    after = base.mark_bar(height=12).encode(
        x="after:Q",
        color=alt.Color("kind:N", scale=colours([BINARY, FULL_PRECISION], [ORANGE, BLUE]), legend=legend()),
    )
    return alt.layer(before, after).properties(height=layers_high(len(rows)))


def _bytes_caption(costs: Costs) -> str:
    kept = sum(row.bytes_after for row in costs.rows if not row.binarize)
    return (
        "Grey: a layer's weights as 32-bit floats. Coloured: as they are packed; a binary convolution keeps one bit for "
        "each weight "
        "and one float for each output channel. What stays in full precision (first convolution, shortcuts of 1x1, BatchNorm, "
        f"classifier) is {100 * kept / max(1, costs.bytes_after):.0f} % of the packed bytes."
    )


def _time(timing: Timing) -> Chart:
    rows = [
        {
            "layer": row.name if row.count == 1 else f"{row.name} ({row.count})",
            "kind": row.kind,
            "us": row.microseconds,
        }
        for row in timing.layers.rows
    ]
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
    chart: Chart = (
        alt.Chart(data(rows))
        .mark_bar(height=12)
        .encode(
            y=layer_axis(),
            x=alt.X("us:Q", title="microseconds"),
            color=alt.Color("kind:N", scale=colours(kinds, [_KINDS[kind] for kind in kinds]), legend=legend()),
            tooltip=["layer:N", "kind:N", alt.Tooltip("us:Q", title="microseconds", format=",.0f")],
        )
    )
    return chart.properties(height=layers_high(len(rows)))


def _time_caption(timing: Timing) -> str:
    total = sum(row.microseconds for row in timing.layers.rows)
    binary = sum(row.microseconds for row in timing.layers.rows if row.kind == "binary")
    text = (
        f"Median time of each operator of {timing.subject}, {timing.layers.threads} thread(s), batch "
        f"{timing.layers.batch_size}, on "
        f"{timing.machine.processor}, by ONNX Runtime's profiler. "
    )
    if binary:
        return (
            text
            + f"Binary convolutions take {100 * binary / max(1e-9, total):.0f} % of it; the rest is left in full precision."
        )
    return text + "Without siman's kernels binary convolutions run as ordinary operators and have no rows of their own."


def _contests(timing: Timing) -> Chart:
    rows = [
        {
            "setting": _setting(contest),
            "name": result.name,
            "ms": result.median_ms,
            "kind": BINARY if place == 0 else "others",
        }
        for contest in timing.contests
        for place, result in enumerate(contest.results)
    ]
    for row in rows:
        row["bar"] = row["name"] if len(timing.contests) == 1 else f"{row['name']}, {row['setting']}"
    chart: Chart = (
        alt.Chart(data(rows))
        .mark_bar(height=14)
        .encode(
            y=alt.Y("bar:N", sort=None, title=None, axis=alt.Axis(labelLimit=240, ticks=False, domain=False)),
            x=alt.X("ms:Q", title="milliseconds"),
            color=alt.Color("kind:N", scale=colours([BINARY, "others"], [ORANGE, GREY]), legend=None),
            tooltip=["name:N", "setting:N", alt.Tooltip("ms:Q", title="milliseconds", format=".3f")],
        )
    )
    return chart.properties(height=22 * len(rows))


def _setting(measured: Contest | Layers) -> str:
    """1 thread, batch 16."""
    return f"{measured.threads} thread{'s' if measured.threads > 1 else ''}, batch {measured.batch_size}"


def _contest_caption(timing: Timing) -> str:
    first = timing.contests[0]
    ours, *others = first.results
    compared = "; ".join(f"{other.name} takes {other.median_ms / ours.median_ms:.2f} times as long" for other in others)
    kernels = f"siman's kernels ({timing.variant})" if timing.variant else "stock ONNX Runtime, without siman's kernels"
    return (
        f"Median time for a batch, the binary network in {kernels} beside the full-precision network of the same architecture. "
        f"With {_setting(first)}: {compared}."
    )
