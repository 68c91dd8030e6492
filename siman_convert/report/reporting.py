"""Writing reports: of a run, or of two runs beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siman_convert.errors import InputError
from siman_convert.files import disk_errors, write_text
from siman_convert.report.comparison import comparison_page, findings, pair
from siman_convert.report.content import Content, gather
from siman_convert.report.page import Page, render, write_pngs
from siman_convert.report.single import run_page
from siman_convert.runs import find_run
from siman_convert.watch import Watcher


@dataclass(frozen=True)
class Written:
    """What was written, and of what. findings: of a comparison, what its figures say."""

    html: Path
    pngs: tuple[Path, ...]
    contents: tuple[Content, ...]
    findings: tuple[str, ...] = ()


def report(
    what: str | Path | None = None,
    *,
    which: str = "best",
    data: str | None = None,
    html: Path | None = None,
    png: Path | None = None,
    output: Path = Path("runs"),
    device: str = "auto",
    workers: int = 0,
    watcher: Watcher | None = None,
) -> Written:
    """One HTML file about a run's `best` or `last` weights; None: the newest run in `output`.

    html: where to; None: report.html in the run's folder. png: a folder that every figure is put into as well. `data`: see
    `content.gather`. Raises InputError.
    """
    run = find_run(what, output)
    html = html or run.folder / "report.html"
    _require_writable(html, png)
    content = gather(run, which=which, data=data, device=device, workers=workers, watcher=watcher)
    return _write(run_page(content), html, png, (content,))


def compare(
    first: str | Path,
    second: str | Path,
    *,
    html: Path | None = None,
    png: Path | None = None,
    output: Path = Path("runs"),
) -> Written:
    """One HTML file about the last weights of two runs; html: None: compare-FIRST-SECOND.html beside the first.

    Raises InputError.
    """
    runs = [find_run(which, output) for which in (first, second)]
    html = html or runs[0].folder.parent / f"compare-{runs[0].name}-{runs[1].name}.html"
    _require_writable(html, png)
    two = pair(*(gather(run, which="last", images=False) for run in runs))
    return _write(comparison_page(two), html, png, (two.first, two.second), tuple(findings(two)))


def _write(
    page: Page, html: Path, png: Path | None, contents: tuple[Content, ...], found: tuple[str, ...] = ()
) -> Written:
    with disk_errors(html.parent):
        write_text(html, render(page))
    pngs: list[Path] = []
    if png is not None:
        with disk_errors(png):
            pngs = write_pngs(page, png)
    return Written(html, tuple(pngs), contents, found)


def _require_writable(html: Path, png: Path | None) -> None:
    """InputError, before anything is computed, where a path cannot be what it is to be."""
    if html.is_dir() or not html.parent.is_dir():
        why = "is a folder" if html.is_dir() else f"there is no folder {html.parent}"
        raise InputError(f"--html {html}: {why}; expected a file to write in a folder that exists")
    if png is not None and png.exists() and not png.is_dir():
        raise InputError(f"--png {png}: is a file; expected a folder, or a path to make one at")
