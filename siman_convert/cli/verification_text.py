"""What a verification found: a few lines for people, a record for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from siman_convert.onnx_op import OP_NAME
from siman_convert.operator_check import OperatorCheck
from siman_convert.verification import NEAR, LayerFlips, ModelCheck, Verification


def summary_lines(found: Verification) -> Iterator[str]:
    """One line for each kind of operator, one for each pair of backends, one for preprocessing."""
    binary = [check for check in found.operators if check.operator == OP_NAME]
    yield _operators_line("operators", binary)
    if quantized := [check for check in found.operators if check.operator != OP_NAME]:
        yield _operators_line("8-bit operators", quantized)
    for check in found.models:
        yield _model_line(check)
    if found.pixels is not None:
        yield f"preprocessing in the graph: pixels within {found.pixels:.2f} of 255 of evaluation's"


def _operators_line(name: str, operators: list[OperatorCheck]) -> str:
    equal = sum(not any(check.different.values()) for check in operators)
    outputs = sum(check.outputs for check in operators)
    beside = sum(sum(check.neighbouring.values()) for check in operators)
    rounded = f"; {beside:,} beside a mean that rounds differently" if beside else ""
    backends = ", ".join(operators[0].different) if operators else "no backend"
    return f"{equal} of {len(operators)} {name} equal in {backends} and reference ({outputs:,} outputs{rounded})"


def _model_line(check: ModelCheck) -> str:
    flips, signs = sum(layer.flips for layer in check.layers), sum(layer.signs for layer in check.layers)
    share = 100 * check.agreeing / max(1, check.images)
    text = f"{' and '.join(check.backends)}: top-1 agrees on {check.agreeing} of {check.images} images ({share:.2f} %)"
    if check.without_flip:
        text += f"; logits within {check.largest_difference:.1e} on the {check.without_flip} without a flipped sign"
    if flips:
        farthest = max(layer.farthest for layer in check.layers)
        text += (
            f"; {flips:,} of {signs:,} signs flipped, the first of an image within {farthest:.1e} std of the threshold"
        )
    return text


def detail_lines(found: Verification) -> Iterator[str]:
    """The layers in which signs flipped, and every failure."""
    for check in found.models:
        flipped = [layer for layer in check.layers if layer.flips]
        if flipped:
            yield f"signs that {' and '.join(check.backends)} see differently (bound for the first ones: {NEAR:.0e} std)"
            yield from (f"  {_layer_line(layer)}" for layer in flipped)
    yield from (f"FAILED  {line}" for line in found.failures)


def _layer_line(layer: LayerFlips) -> str:
    first = f"first flips of an image within {layer.farthest:.1e} std" if layer.farthest else "none of them first"
    return f"{layer.layer}: {layer.flips:,} of {layer.signs:,} ({layer.flips / max(1, layer.signs):.1e}), {first}"


def verification_record(found: Verification) -> dict[str, Any]:
    """The same as JSON."""
    return {"passed": not found.failures, **asdict(found)}
