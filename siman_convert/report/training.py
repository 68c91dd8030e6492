"""Figures of the training: accuracy and loss, and how many bits each epoch flips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from siman_convert.report.charts import (
    BINARY,
    BLUE,
    FULL_PRECISION,
    GREEN,
    ORANGE,
    Chart,
    Figure,
    colours,
    data,
    epochs,
    legend,
    reference,
)
from siman_convert.report.content import Content
from siman_convert.runs import Record

PHASES = {
    "full-precision": FULL_PRECISION,
    "activations": "binary activations",
    "weights": "binary weights",
    "binary": BINARY,
}
_COLOURS = {FULL_PRECISION: BLUE, "binary activations": GREEN, "binary weights": GREEN, BINARY: ORANGE}
VALIDATION, TRAINING = "validation", "training"


def training_figures(content: Content) -> Iterator[Figure]:
    """Top-1 and loss over the epochs; bit flips where the run recorded them."""
    if not content.history:
        return
    start = content.newest("full-precision")
    line = {} if start is None else {"full precision": start["top1"]}
    yield Figure("top1", "Accuracy", _top1_caption(content), _curves(content, "top1", "top-1, %", line))
    yield Figure("loss", "Loss", _loss_caption(content), _curves(content, "loss", "loss", {}))
    if any("flip_rate" in record for record in content.history):
        yield Figure("flips", "Bits that flip", _flips_caption(content), _flips(content))


def _curves(content: Content, field: str, title: str, line: dict[str, float]) -> Chart:
    rows = [row for record in content.history for row in _points(content, record, field)]
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    base = alt.Chart(data(rows)).encode(
        x=epochs(rows, "epoch"),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, nice=True)),
        color=alt.Color(
            "phase:N", scale=colours(phases, [_COLOURS[phase] for phase in phases]), legend=legend(lines=True)
        ),
        strokeDash=alt.StrokeDash(
            "images:N", scale=alt.Scale(domain=[VALIDATION, TRAINING], range=[[1, 0], [3, 3]]), legend=None
        ),
        tooltip=[
            alt.Tooltip("what:N", title="network"),
            alt.Tooltip("images:N"),
            alt.Tooltip("epoch:Q"),
            alt.Tooltip("value:Q", title=title, format=".3f" if field == "loss" else ".2f"),
        ],
    )
    trained, again = alt.datum.kind != "again", alt.datum.kind == "again"
    parts: list[Chart] = [reference(line, "y")] if line else []
    parts.append(base.transform_filter(trained).mark_line(strokeWidth=2))
    parts.append(base.transform_filter(trained).mark_circle(size=30, opacity=1))
    if any(row["kind"] == "again" for row in rows):
        parts.append(base.transform_filter(again).mark_point(shape="diamond", size=90, filled=True, opacity=1))
    return alt.layer(*parts).properties(height=260)


def _points(content: Content, record: Record, field: str) -> Iterator[dict[str, Any]]:
    """Binary epochs are counted on from the full-precision ones."""
    phase, before = record["phase"], content.recipe.fp_epochs
    epoch = record["epoch"] + (0 if phase == "full-precision" else before)
    again = bool(record.get("re_estimated"))
    what = PHASES[phase] + (", BatchNorm re-estimated" if again else "" if "train_loss" in record else ", untrained")
    row = {"phase": PHASES[phase], "epoch": epoch, "what": what, "kind": "again" if again else "trained"}
    yield {**row, "images": VALIDATION, "value": record[field]}
    if f"train_{field}" in record:
        yield {**row, "images": TRAINING, "value": record[f"train_{field}"]}


def _top1_caption(content: Content) -> str:
    start, top1 = content.newest("full-precision"), content.binary_top1()
    text = "Share of images whose most probable class is the right one, after every epoch; solid: validation, dotted: training. "
    first = next((record for record in content.history if record["phase"] != "full-precision"), None)
    if first is not None and content.recipe.binary_epochs:
        text += (
            f"Where the binary line begins, the convolutions have just been replaced and nothing has been trained yet "
            f"({first['top1']:.1f} %). "
        )
    if start is not None and top1 is not None:
        text += f"Binary ends {_apart(top1 - start['top1'])} full precision ({start['top1']:.1f} %). "
    if any(record.get("re_estimated") for record in content.history):
        text += "The diamond: BatchNorm's statistics taken anew after the last epoch. "
    return text + "Training images are augmented, which makes them harder."


def _apart(points: float) -> str:
    if abs(points) < 0.005:
        return "level with"
    return f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"


def _loss_caption(content: Content) -> str:
    text = (
        "What training minimises; dotted: training images, solid: validation, where it is the labels' cross-entropy. "
    )
    if content.recipe.distils and content.newest("full-precision") is not None:
        text += (
            "Binary epochs may learn from the full-precision network's answers rather than from labels: their training loss "
            "is then a distance to those, on a scale of its own. "
        )
    return text + "A binary network's loss moves in jumps where many bits change at once; that is no fault by itself."


def _flips(content: Content) -> Chart:
    rows = list(_flip_rows(content))
    sizes = {layer.name: layer.filters * layer.size for layer in content.layers}
    x = epochs(rows, "binary epoch")
    y = alt.Y("share:Q", title="bits that changed, %", scale=alt.Scale(type="sqrt"))
    layers = alt.Chart(data(rows)).encode(
        x=x,
        y=y,
        detail="layer:N",
        color=alt.Color(
            "depth:Q",
            scale=alt.Scale(range=["#7db4e8", "#5a62c9"]),
            legend=None,
        ),
        tooltip=["layer:N", "epoch:Q", alt.Tooltip("share:Q", title="flipped, %", format=".3f")],
    )
    mean = alt.Chart(data(list(_mean_rows(rows, sizes)))).encode(
        x=x, y=y, tooltip=["layer:N", "epoch:Q", alt.Tooltip("share:Q", title="flipped, %", format=".3f")]
    )
    return alt.layer(
        layers.mark_line(strokeWidth=1.2, opacity=0.8),
        layers.mark_circle(size=14, opacity=0.8),
        mean.mark_line(strokeWidth=3, color=ORANGE),
        mean.mark_circle(size=36, color=ORANGE, opacity=1),
    ).properties(height=260)


def _flip_rows(content: Content) -> Iterator[dict[str, Any]]:
    for record in content.history:
        for depth, (layer, share) in enumerate(record.get("flip_rate", {}).items(), start=1):
            yield {"layer": layer, "depth": depth, "epoch": record["epoch"], "share": 100 * share}


def _mean_rows(rows: Sequence[dict[str, Any]], sizes: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The share of all the network's bits."""
    for epoch in dict.fromkeys(row["epoch"] for row in rows):
        known = [(sizes.get(row["layer"], 0), row["share"]) for row in rows if row["epoch"] == epoch]
        total = sum(size for size, _ in known)
        if total:
            mean = sum(size * share for size, share in known) / total
            yield {"layer": "all layers", "epoch": epoch, "share": mean}


def _flips_caption(content: Content) -> str:
    recorded = [record for record in content.history if "flip_rate" in record]
    missing = sum("train_loss" in r and r["phase"] in ("weights", "binary") for r in content.history) - len(recorded)
    text = (
        "A one-bit weight cannot move a little: it stays or it flips. This is the share of a layer's weights that ended "
        "an epoch as "
        "the other bit than they began it: light the first layers, dark the last, thick all together. The learning rate "
        "falls to nothing at the end, so the "
        "lines should too. Lines that stay high say that bits go back and forth; a layer at 0 from the start has not learned."
    )
    return text + (f" {missing} epochs of this run were trained before siman recorded it." if missing > 0 else "")
