"""`siman export`: a run or a packed file to one self-contained file, and how to run that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import QUIET, RUNS, Json, megabytes, percent, print_json

if TYPE_CHECKING:
    from siman_convert.exporting import Exported
    from siman_convert.onnx_fold import Folding


def export(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|FILE",
            help="A run, or a .safetensors file; default: the newest run.",
            autocompletion=complete.runs,
        ),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="onnx, safetensors or all (both).")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", help="File or folder to write; default: the run's folder, or the file's.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last weights instead of the best.")] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store the remaining full-precision weights as float16.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize the remaining convolutions and the classifier (ONNX).")
    ] = False,
    with_preprocess: Annotated[
        bool, typer.Option("--with-preprocess", help="Resize, crop and normalise in the graph: uint8 images in (ONNX).")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", "--data-dir", help="Images to verify and calibrate on; default: the run's.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images to verify on.")] = 256,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="NAME", help="Upload files and model card to the Hugging Face hub."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export to one file, verified on real images before it is written.

    The ONNX file runs in any ONNX Runtime, and anywhere siman's own readers run.
    """
    from siman_convert.errors import InputError
    from siman_convert.names import is_file, require_subject

    if last and what is not None and is_file(what):
        raise InputError(f"{what} holds one network; --last is for runs")
    require_subject(what, RUNS)
    from siman_convert.cli.terminal import Terminal
    from siman_convert.exporting import FORMATS, export

    if format not in FORMATS:
        raise InputError(f"--format {format!r}: expected {', '.join(FORMATS)}")
    with Terminal(aside=as_json) as terminal:
        exported = export(
            what,
            format=format,
            output=output,
            which="last" if last else "best",
            half=half,
            int8=int8,
            with_preprocess=with_preprocess,
            data=data,
            images=images,
            push_to_hub=push_to_hub,
            runs=RUNS,
            watcher=terminal,
        )
    if as_json:
        print_json(_record(exported))
    else:
        _print(exported)


def _print(exported: Exported) -> None:
    from siman_convert.cli.int8_text import quantization_lines
    from siman_convert.cli.verification_text import summary_lines
    from siman_convert.snippet import snippet

    costs, folding, accuracy = exported.costs, exported.folding, exported.description.accuracy
    print(f"folded    {_folded(folding)}")
    for refusal in folding.refused:
        print(f"kept      {refusal.node} behind {refusal.layer}: {refusal.reason}")
    if exported.quantization is not None:
        for line in quantization_lines(exported.quantization):
            print(line)
    also = ", before float16" if exported.description.half else ", before int8" if exported.variant.int8 else ""
    smaller = costs.bytes_before / max(1, costs.bytes_after)
    sizes = f"{costs.bytes_before:,} -> {costs.bytes_after:,} bytes, {smaller:.1f} times smaller"
    print(f"weights   {sizes} (as `siman inspect` says{also})")
    if accuracy is not None:
        print(
            f"accuracy  top-1 {percent(accuracy.top1)} of {accuracy.images:,} images of {accuracy.data}, before export"
        )
    if exported.change is not None:
        change = exported.change
        what = "int8" if exported.variant.int8 else "float16"
        print(f"{what:<9} top-1 {percent(change.before)} -> {percent(change.after)} on {change.images:,} images")
    for line in summary_lines(exported.verification):
        print(f"verified  {line}")
    for path in exported.files:
        print(f"wrote     {path}  {megabytes(path.stat().st_size)}")
    if exported.card:
        print(f"wrote     {exported.card}  the model card")
    if exported.uploaded_to:
        print(f"uploaded  {exported.uploaded_to}")
    for path in exported.files if not QUIET.get() else ():
        print(f"\n{snippet(path, exported.description, exported.variant)}")


def _folded(folding: Folding) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in sorted(folding.folded.items())) or "nothing"
    return f"{parts} into {folding.operators} binary convolutions"


def _record(exported: Exported) -> dict[str, Any]:
    from dataclasses import asdict

    from siman_convert.cli.verification_text import verification_record

    costs, folding = exported.costs, exported.folding
    return {
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in exported.files],
        "card": str(exported.card) if exported.card else None,
        "uploaded_to": exported.uploaded_to,
        "weights": {"bytes_before": costs.bytes_before, "bytes_after": costs.bytes_after},
        "folding": {
            "operators": folding.operators,
            "folded": dict(sorted(folding.folded.items())),
            "refused": [refusal._asdict() for refusal in folding.refused],
        },
        "quantization": asdict(exported.quantization) if exported.quantization else None,
        "half": exported.description.half,
        **asdict(exported.variant),
        "accuracy": asdict(exported.description.accuracy) if exported.description.accuracy else None,
        "accuracy_change": asdict(exported.change) if exported.change else None,
        "verification": verification_record(exported.verification),
    }
