"""Figures of what the network answers: which class it takes for which, and its worst mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt
import numpy as np

from siman_convert.report.charts import BLUE, ORANGE, Chart, Figure, colours, data, legend
from siman_convert.report.predictions import Mistake, Predictions

SHOWN = 20  # classes of a matrix, at most
NUMBERED = 12  # up to so many classes the cells hold numbers
RIGHT, WRONG = "right", "taken for another"


def answer_figures(found: Predictions) -> Iterator[Figure]:
    """The confusion matrix."""
    chosen = confused_classes(found)
    yield Figure("confusion", "Which class is taken for which", _caption(found, len(chosen)), _matrix(found, chosen))


def confused_classes(found: Predictions) -> list[int]:
    """All classes, or of many the SHOWN with the most mistakes that begin or end at them, in their own order."""
    errors = found.confusion - np.diag(found.confusion.diagonal())
    involved = errors.sum(axis=0) + errors.sum(axis=1)
    return sorted(np.argsort(-involved, kind="stable")[:SHOWN].tolist())


def _matrix(found: Predictions, chosen: list[int]) -> Chart:
    rows = [_cell(found, truth, answer) for truth in chosen for answer in chosen if found.confusion[truth, answer]]
    names = [_label(found.classes, index) for index in chosen]
    label = alt.Axis(labelLimit=90, labelAngle=-45, ticks=False, domain=False)
    base = alt.Chart(data(rows)).encode(
        x=alt.X("answer:N", title="answer", scale=alt.Scale(domain=names), axis=label),
        y=alt.Y(
            "truth:N",
            title="truth",
            scale=alt.Scale(domain=names),
            axis=alt.Axis(labelLimit=90, ticks=False, domain=False),
        ),
    )
    cells = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color("kind:N", scale=colours([RIGHT, WRONG], [BLUE, ORANGE]), legend=legend()),
        opacity=alt.Opacity("share:Q", scale=alt.Scale(type="sqrt", domain=[0, 100], range=[0.12, 1]), legend=None),
        tooltip=[
            "truth:N",
            "answer:N",
            alt.Tooltip("count:Q", title="images"),
            alt.Tooltip("share:Q", title="% of the truth's images", format=".1f"),
        ],
    )
    height = max(220, 24 * len(chosen))
    if len(chosen) > NUMBERED:
        return alt.layer(cells).properties(height=height)
    return alt.layer(cells, base.mark_text(fontSize=11).encode(text="count:Q")).properties(height=height)


def _cell(found: Predictions, truth: int, answer: int) -> dict[str, Any]:
    count = int(found.confusion[truth, answer])
    return {
        "truth": _label(found.classes, truth),
        "answer": _label(found.classes, answer),
        "count": count,
        "share": round(100 * count / int(found.confusion[truth].sum()), 2),
        "kind": RIGHT if truth == answer else WRONG,
    }


def _label(classes: tuple[str, ...], index: int) -> str:
    """The class's name; with its number where another has the same."""
    name = classes[index]
    return name if classes.count(name) == 1 else f"{name} ({index})"


def _caption(found: Predictions, shown: int) -> str:
    errors = found.confusion - np.diag(found.confusion.diagonal())
    text = "Each row holds the images of one class, each column what the binary network answered, "
    text += f"of {found.images:,} validation images. "
    if shown < len(found.classes):
        text += f"Of {len(found.classes):,} classes the {shown} with the most mistakes. "
    if not errors.sum():
        return text + "Not one image is misclassified."
    truth, answer = np.unravel_index(int(errors.argmax()), errors.shape)
    return text + (
        f"{int(errors.sum()):,} are misclassified; the most frequent mistake, {int(errors.max())} times, is "
        f"{found.classes[int(truth)]} taken for {found.classes[int(answer)]}. Stronger colour: a larger share of its row."
    )


def mistake_text(mistake: Mistake) -> str:
    return f"{mistake.answer} at {_percent(mistake.answer_probability)}, {mistake.truth} at {_percent(mistake.truth_probability)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%" if share >= 0.01 else "under\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%"
