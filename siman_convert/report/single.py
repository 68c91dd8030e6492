"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterator

from siman_convert.environment import siman_version
from siman_convert.report.answers import answer_figures, mistake_text
from siman_convert.report.content import Content
from siman_convert.report.page import Image, Page, Section, Table, Tile
from siman_convert.report.resources import resource_figures
from siman_convert.report.training import training_figures
from siman_convert.report.weights import weight_figures

_INTRODUCTION = (
    "In a binary convolution every weight and every input is +1 or -1, so that a multiplication becomes an XOR and a sum "
    "a count of bits. "
    "Training keeps a full-precision, latent weight behind each bit; SiMaN reads the bit off its magnitude: large is +1, "
    "small is -1."
)


def run_page(content: Content) -> Page:
    """Training, weights, bytes and time, answers and sizes of a run."""
    info = content.info
    notes = (
        [] if content.left_out is None else [f"Without confusion matrix and misclassified images: {content.left_out}"]
    )
    return Page(
        kind="siman report",
        title=content.name,
        lead=f"{info.model}, {len(info.classes):,} classes, on {info.data_name}. {_INTRODUCTION}",
        tiles=list(_tiles(content)),
        notes=notes,
        sections=[section for section in _sections(content) if section.figures or section.tables or section.mistakes],
        footer=f"Written by siman {siman_version()}; the run began {info.created}. {content.which.capitalize()} weights.",
    )


def _tiles(content: Content) -> Iterator[Tile]:
    start, top1, costs = content.newest("full-precision"), content.binary_top1(), content.costs
    if start is not None:
        yield Tile("full precision", f"{start['top1']:.2f} %", "top-1")
    if top1 is not None:
        yield Tile("binary", f"{top1:.2f} %", f"top-1, {content.which} weights")
    smaller = costs.bytes_before / max(1, costs.bytes_after)
    yield Tile(
        "weights",
        _bytes(costs.bytes_after),
        f"packed; {_bytes(costs.bytes_before)} before, {smaller:.1f} times smaller",
    )
    yield Tile("one-bit work", f"{100 * (1 - costs.float_macs_share):.1f} %", "of the multiply-accumulates of an image")
    binary = sum(row.binarize for row in costs.rows)
    convs = sum(row.decision is not None for row in costs.rows)
    yield Tile("binary layers", f"{binary} of {convs}", "convolutions")


def _sections(content: Content) -> Iterator[Section]:
    yield Section("training", "Training", figures=list(training_figures(content)))
    yield Section(
        "bits",
        "Weights and their bits",
        "What lies behind the bits, layer by layer, in the order of the network. half and analytic are SiMaN's two ways "
        "of choosing bits.",
        figures=list(weight_figures(content.layers)),
    )
    if content.predictions is not None:
        found = content.predictions
        yield Section(
            "answers",
            "What it gets wrong",
            figures=list(answer_figures(found)),
            mistakes=[Image(one.data_url, one.truth, one.answer, mistake_text(one)) for one in found.mistakes],
            mistakes_caption="Misclassified validation images whose true class got the least probability, as the network sees "
            "them: resized and cropped. Look here for wrong labels first.",
        )
    text = "" if content.timing else f"For the times: siman bench {content.folder}, then siman report again."
    yield Section("resources", "Bytes and time", text, figures=list(resource_figures(content.costs, content.timing)))
    yield Section("sizes", "Sizes", tables=[_size_table(content)])


def _size_table(content: Content) -> Table:
    costs = content.costs
    rows = [
        (
            row.name,
            "binary" if row.binarize else row.reason,
            "x".join(map(str, row.output_shape)) if row.output_shape else "",
            _count(row.binary_macs),
            _count(row.float_macs),
            f"{row.bytes_before:,}",
            f"{row.bytes_after:,}",
        )
        for row in costs.rows
    ]
    total = (f"{costs.bytes_before:,}", f"{costs.bytes_after:,}")
    rows.append(("all", "", "", _count(costs.binary_macs), _count(costs.float_macs), *total))
    files = ", ".join(f"{name} {_bytes(size)}" for name, size in content.exports.items())
    return Table(
        "sizes-table",
        "Layer by layer",
        (
            "layer",
            "what it becomes, or why it stays",
            "output",
            "1-bit MACs",
            "float MACs",
            "bytes before",
            "bytes packed",
        ),
        rows,
        f"Multiply-accumulates (MACs) of one image of {'x'.join(map(str, content.plan.input_size))}; bytes of "
        "what the model file holds. "
        + (f"Exported files of this run: {files}." if files else "This run has not been exported: siman export."),
        total=True,
    )


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _count(value: int) -> str:
    """1.23 M, 456 k, or nothing for none."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value) if value else ""
