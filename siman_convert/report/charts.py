"""What all figures share: their form, their colours, and small pieces of Vega-Lite charts.

Colours lie in the middle between black and white, so that one chart is read on light and on dark ground; text and rules take the
page's colours through its style sheet, by the names of marks that are given here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

INK = "#1c2330"  # on white; the page replaces it
BLUE, ORANGE, GREEN, GREY = "#4f86e0", "#df7a1c", "#2f9e6e", "#8b929c"
FULL_PRECISION, BINARY = "full precision", "binary"
FEW_EPOCHS = 12
ROW = 17  # pixels a layer has on an axis of layers
Row = Mapping[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart  # what altair says that its methods give


@dataclass(frozen=True)
class Figure:
    """key: its file name and anchor. chart: as wide as its place. still: what a PNG shows in its stead, where that differs.

    wide: it takes the whole width of the page.
    """

    key: str
    title: str
    caption: str
    chart: alt.TopLevelMixin
    still: alt.TopLevelMixin | None = None
    wide: bool = False


def data(rows: Sequence[Row]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])


def colours(names: Sequence[str], values: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=list(values))


def epochs(rows: Sequence[Row], title: str) -> alt.X:
    """The axis of the rows' epochs: a tick for each of a few, which vega would put between them."""
    found = sorted({int(row["epoch"]) for row in rows})
    ticks = {"values": found} if len(found) <= FEW_EPOCHS else {"tickMinStep": 1}
    return alt.X("epoch:Q", title=title, axis=alt.Axis(format="d", grid=False, **ticks))


def legend(*, lines: bool = False, offset: int = 8) -> alt.Legend:
    """Above the chart, so that narrow screens keep its width. lines: its symbols are strokes, not dots or squares."""
    key = alt.Legend(
        title=None, orient="top", columns=2, offset=offset, symbolStrokeWidth=2, symbolOpacity=1, labelLimit=260
    )
    if lines:
        key.symbolType, key.symbolSize = "stroke", 300
    return key


def layer_axis(field: str = "layer") -> alt.Y:
    """Layers from the first at the top to the last."""
    return alt.Y(
        f"{field}:N", sort=None, title=None, axis=alt.Axis(labelLimit=150, ticks=False, domain=False, grid=True)
    )


def layers_high(count: int) -> int:
    return ROW * max(3, count)


def reference(position: Mapping[str, float], axis: str) -> Chart:
    """Dashed lines at known places of an axis, x or y, each with its name."""
    base = alt.Chart(data([{"at": at, "name": name} for name, at in position.items()]))
    if axis == "x":
        rules = base.mark_rule(strokeDash=[4, 3], color=GREY).encode(x="at:Q")
        names = base.mark_text(baseline="bottom", dy=-3, fontSize=10).encode(x="at:Q", y=alt.value(0), text="name:N")
    else:
        rules = base.mark_rule(strokeDash=[4, 3], color=GREY).encode(y="at:Q")
        names = base.mark_text(align="left", baseline="bottom", dx=4, dy=-3, fontSize=11).encode(
            x=alt.value(0), y="at:Q", text="name:N"
        )
    return alt.layer(rules, names)


def finished(chart: alt.TopLevelMixin, width: int | str = "container") -> dict[str, Any]:
    """The Vega-Lite document of a chart, `width` pixels wide or as wide as its place."""
    spec: dict[str, Any] = chart.to_dict()
    if "layer" in spec or "mark" in spec:
        spec["width"] = width
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["background"] = "transparent" if width == "container" else "white"
    spec["config"] = {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "axis": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "gridOpacity": 0.6},
        "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "padding": 0},
        "title": {"fontSize": 11, "fontWeight": "normal"},
    }
    return spec
