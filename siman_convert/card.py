"""The model card: README.md beside an exported file, with the metadata header of the Hugging Face hub.

It says what was measured and nothing else. Names of users' making (classes, data sets, files, layers) are escaped, so that they
are read as they are; no path of this machine is named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from siman_convert.costs import Costs
from siman_convert.description import Description
from siman_convert.errors import one_line
from siman_convert.metrics import AccuracyChange, tells_top5
from siman_convert.onnx_file import Variant
from siman_convert.plans import ConvDecision
from siman_convert.recipe import Recipe
from siman_convert.runs import Run
from siman_convert.snippet import python_lines
from siman_convert.verification import Verification

NAME = "README.md"
MARK = "<!-- model card written by siman: exporting into this folder replaces it -->"
SHOWN_CLASSES = 20
_MARKDOWN = re.compile(
    r"([\\`*_{}\[\]<>#|~&$!@]|:(?=//)|(?<=www)\.)"
)  # what can mean something within a line; links too


@dataclass(frozen=True)
class File:
    """A file as it was written: its name, size, and SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What a card tells. run: where the weights were trained, None where only their file is known."""

    files: Sequence[File]
    description: Description
    variant: Variant
    costs: Costs
    change: AccuracyChange | None
    verification: Verification
    run: Run | None


def is_replaceable(path: Path) -> bool:
    """Whether a card may be written there: nothing is, or a card of ours."""
    if not path.exists():
        return True
    return path.is_file() and path.stat().st_size < 1 << 20 and MARK.encode() in path.read_bytes()


def model_card(facts: Facts) -> str:
    """The whole text: header and Markdown."""
    architecture = escape(facts.description.architecture)
    sections = (_what, _files, _accuracy, _usage, _plan, _recipe, _classes)
    body = "\n\n".join("\n".join(section(facts)).strip() for section in sections)
    return f"---\n{_header(facts).to_yaml()}\n---\n{MARK}\n\n# {architecture}, a binary neural network\n\n{body}\n"


def escape(text: str) -> str:
    """Markdown that shows `text` on one line, in a table too; control characters become spaces."""
    return _MARKDOWN.sub(r"\\\1", one_line(text)).strip() or "(no name)"


def _header(facts: Facts) -> ModelCardData:
    """No licence: it is for who publishes to say. Accuracy as a share from 0 to 1, of these very weights only."""
    description, base = facts.description, _base_model(facts.run)
    formats = sorted({file.name.rpartition(".")[2] for file in facts.files})
    tags = [
        *formats,
        "image-classification",
        "binary-neural-network",
        "siman",
        "timm",
        one_line(description.architecture),
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_hub_dataset(facts.run) or "image-folder",
            dataset_name=one_line(_data(facts)),
            metric_type="accuracy",
            metric_name=f"{name} on {images} validation images",
            metric_value=round(value / 100, 6),
        )
        for name, value, images in _measured(facts)
    ]
    dataset = _hub_dataset(facts.run)
    return ModelCardData(
        library_name="siman",
        pipeline_tag="image-classification",
        tags=tags,
        datasets=[dataset] if dataset else None,
        base_model=base,
        base_model_relation="quantized" if base else None,
        metrics=["accuracy"] if results else None,
        model_name=f"{one_line(description.architecture)} (SiMaN)",
        eval_results=results or None,
    )


def _measured(facts: Facts) -> Iterator[tuple[str, float, int]]:
    """(metric, percent, images) of the weights in the file; nothing where they were rounded and not measured since."""
    accuracy, change = facts.description.accuracy, facts.change
    if change is not None:
        yield "top-1", change.after, change.images
    elif accuracy is not None and not facts.description.half and not facts.variant.int8:
        yield "top-1", accuracy.top1, accuracy.images
        if tells_top5(len(facts.description.classes)):
            yield "top-5", accuracy.top5, accuracy.images


def _what(facts: Facts) -> Iterator[str]:
    plan, costs = facts.description.plan, facts.costs
    yield (
        f"{escape(facts.description.architecture)} from [timm](https://github.com/huggingface/pytorch-image-models), of whose "
        f"{len(plan.decisions)} convolutions {len(plan.binarized)} have weights and inputs of one bit, by SiMaN "
        "([Sign-to-Magnitude Network Binarization](https://arxiv.org/abs/2102.07981)). They are "
        f"{100 * (1 - costs.float_macs_share):.1f} % of the multiply-accumulates. It tells "
        f"{len(facts.description.classes):,} classes apart."
    )


def _files(facts: Facts) -> Iterator[str]:
    yield from ("## Files", "", "| file | bytes | SHA-256 |", "|---|---|---|")
    yield from (f"| {escape(file.name)} | {file.bytes:,} | {file.sha256} |" for file in facts.files)
    costs = facts.costs
    smaller = costs.bytes_before / max(1, costs.bytes_after)
    also = ", before int8" if facts.variant.int8 else ", before float16" if facts.description.half else ""
    yield ""
    sizes = f"{costs.bytes_before:,} bytes in full precision, {costs.bytes_after:,} packed{also}"
    yield f"Weights: {sizes}; {smaller:.1f} times smaller."


def _accuracy(facts: Facts) -> Iterator[str]:
    yield from ("## Accuracy", "")
    accuracy, change = facts.description.accuracy, facts.change
    if accuracy is None:
        yield "Not measured."
    else:
        top5 = f", top-5 {accuracy.top5:.2f} %" if tells_top5(len(facts.description.classes)) else ""
        what = f"{accuracy.images:,} validation images of {escape(accuracy.data)}"
        yield f"Top-1 {accuracy.top1:.2f} %{top5} of {what}, in torch before export."
    if change is not None:
        what = "8 bits" if facts.variant.int8 else "float16"
        cost = f"top-1 {change.before:.2f} % before, {change.after:.2f} % after, on {change.images:,} images"
        yield from ("", f"The other weights in {what}: {cost}.")
    for check in facts.verification.models:
        pair = " and ".join(check.backends)
        yield ""
        yield f"Verified before it was written: {pair} agree in top-1 on {check.agreeing:,} of {check.images:,} images."


def _usage(facts: Facts) -> Iterator[str]:
    yield from ("## Use", "")
    takes = (
        "decoded images of any size; preprocessing is in the graph"
        if facts.variant.takes_images
        else "normalised pixels"
    )
    for file in facts.files:
        path = Path(file.name)
        onnx = path.suffix == ".onnx"
        needs = (
            f"`pip install onnxruntime pillow` is all it needs (it takes {takes})"
            if onnx
            else "As a torch module, with siman"
        )
        yield from (f"{needs}:", "", "```python", *python_lines(path, facts.description, facts.variant), "```", "")
        if onnx:
            yield "With siman installed, its binary kernels run the same file:"
            code = (
                "import siman_convert",
                f"session = siman_convert.session({file.name!r})  # an onnxruntime.InferenceSession",
            )
            yield from ("", "```python", *code, "```", "")


def _plan(facts: Facts) -> Iterator[str]:
    yield from ("## What is binary", "", "| convolutions | | why |", "|---|---|---|")
    decisions = facts.description.plan.decisions
    yield f"| {len(facts.description.plan.binarized)} | binary | {_taps(decisions)} |"
    kept = Counter(decision.reason for decision in decisions if not decision.binarize)
    yield from (f"| {count} | full precision | {escape(reason)} |" for reason, count in kept.most_common())


def _taps(decisions: Sequence[ConvDecision]) -> str:
    taps = [d.in_channels // d.groups * d.kernel_size[0] * d.kernel_size[1] for d in decisions if d.binarize]
    return f"{min(taps)} to {max(taps)} weights a filter" if taps else ""


def _recipe(facts: Facts) -> Iterator[str]:
    """Indented, not fenced: no value can end it."""
    yield from ("## Training", "")
    if facts.run is not None:
        recipe = facts.run.recipe()
        usual = Recipe().model_dump(mode="json")
        changed = {name: value for name, value in recipe.model_dump(mode="json").items() if value != usual[name]}
        if isinstance(changed.get("teacher"), str):
            changed["teacher"] = changed["teacher"].partition("=")[0]  # NAME=FILE
        yield from ("The recipe, where it differs from siman's defaults:", "")
        yield from (f"    {line}" for line in _yaml(changed).splitlines())
        yield ""
        if unfinished := facts.run.unfinished():
            yield from (
                f"These are not the weights of a finished training: it was {unfinished} when they were exported.",
                "",
            )
    description, version = facts.description, escape(facts.description.siman_version)
    yield f"SHA-256 of the recipe: {escape(description.recipe_digest)}. Weights: {description.weights}. siman {version}."


def _classes(facts: Facts) -> Iterator[str]:
    classes = facts.description.classes
    more = f" and {len(classes) - SHOWN_CLASSES:,} more" if len(classes) > SHOWN_CLASSES else ""
    yield from ("## Classes", "", "In order: " + ", ".join(map(escape, classes[:SHOWN_CLASSES])) + more + ".")
    yield from (
        "",
        "All of them and the preprocessing stand in the file's metadata, under `siman`, as JSON.",
    )


def _data(facts: Facts) -> str:
    return facts.description.accuracy.data if facts.description.accuracy else "unknown"


def _hub_dataset(run: Run | None) -> str | None:
    """The hub's name of the data a run was trained on, where they came from there."""
    spec = run.info().data if run else ""
    name = spec.partition("/")[2] if spec.startswith("hfds/") else ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name or None


def _base_model(run: Run | None) -> str | None:
    """timm's pretrained weights on the hub, where the run started from them."""
    if run is None or run.info().weights != "pretrained":
        return None
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(run.info().model)
    named = str(cfg.hf_hub_id) if cfg else ""
    return named if named.startswith("timm/") else None


def _yaml(fields: dict[str, object]) -> str:
    import yaml

    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=False) if fields else "# nothing"
