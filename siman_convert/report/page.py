"""One HTML page, whole in itself: text, figures, and the library that draws them. It loads nothing.

Whatever comes from users (class names, paths, layer names) is escaped by jinja2 in the text, and cannot end a script in the data.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from siman_convert.files import replacing
from siman_convert.report.charts import Figure, finished

PNG_WIDTH, PNG_SCALE = 760, 2.0  # of the drawing, and pixels for each of its own


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under columns' names; with `total` the last row sums the others up."""

    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    total: bool = False


@dataclass(frozen=True)
class Image:
    """A misclassified image; url: its PNG as a data URL."""

    url: str
    truth: str
    answer: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading with figures, images and tables in this order."""

    key: str
    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    mistakes: Sequence[Image] = ()
    mistakes_caption: str = ""
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    kind: str
    title: str
    lead: str
    sections: Sequence[Section]
    footer: str
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("page.html.jinja")).render(
        page=page,
        style=Markup(_resource("style.css")),
        figures=Markup(_script_safe({figure.key: finished(figure.chart) for figure in page.figures})),
        library=Markup(_library()),
    )


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, on white."""
    chart = figure.still or figure.chart
    return vl_convert.vegalite_to_png(finished(chart, PNG_WIDTH), vl_version=_version(), scale=PNG_SCALE)


def _script_safe(values: dict[str, Any]) -> str:
    """JSON that holds no `<`: it cannot end the script it stands in, or begin a comment."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@functools.cache
def _library() -> str:
    """vega, vega-lite and vega-embed as one script, which takes a second or more to put together."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _version())


def _version() -> str:
    """The Vega-Lite version that altair writes, as vl_convert names it: 6.4."""
    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _resource(name: str) -> str:
    return (importlib.resources.files("siman_convert.report") / name).read_text(encoding="utf-8")


def write_pngs(page: Page, folder: Path) -> list[Path]:
    """One PNG file a figure, named by its key, in a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in page.figures:
        path = folder / f"{figure.key}.png"
        with replacing(path) as temporary:
            temporary.write_bytes(png(figure))
        paths.append(path)
    return paths
