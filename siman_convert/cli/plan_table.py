"""How a plan and its figures are shown: a table for people, a record for programs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from siman_convert.cli.lines import folded, table_lines
from siman_convert.costs import Costs, LayerCost
from siman_convert.plans import ConvDecision, Plan

NONE = "-"
ITSELF = "(the model itself)"
UNITS = ("", "k", "M", "G", "T", "P")
TITLES = (
    ("", "", "", "", "1-bit", "float", "bytes", "bytes"),
    ("layer", "", "kernel", "output", "MACs", "MACs", "before", "after"),
)


def plan_lines(plan: Plan, costs: Costs, width: int | None) -> Iterator[Text]:
    """One row for each layer, the totals, why what is binary, and what it saves; `width`: see `lines`."""
    yield Text(f"{plan.model} on an image of {_by(plan.input_size)}", style="bold")
    totals = (costs.binary_macs, costs.float_macs, costs.bytes_before, costs.bytes_after)
    rows = [*TITLES, *map(_cells, costs.rows), ("total", "", "", "", *map(si, totals))]
    titles, table = len(TITLES), table_lines(rows, width, right=range(4, 8))
    yield from (Text(line, style="bold") for line in table[:titles])
    for row, line in zip(costs.rows, table[titles:], strict=False):
        text = Text(line, style="" if row.binarize else "dim")
        text.highlight_regex(r"(?<= )1-bit(?= )", "green")
        yield text
    yield Text(table[-1], style="bold")
    yield Text()
    yield from (Text(folded(line, width, indent=18)) for line in _reasons(costs))
    yield Text(folded(_summary(plan, costs), width))


def inspect_record(plan: Plan, costs: Costs) -> dict[str, Any]:
    """The same as JSON: whole numbers, shares from 0 to 1."""
    return {
        "model": plan.model,
        "input_size": list(plan.input_size),
        "convolutions": len(plan.decisions),
        "binarized": len(plan.binarized),
        "totals": {
            "binary_macs": costs.binary_macs,
            "float_macs": costs.float_macs,
            "bytes_before": costs.bytes_before,
            "bytes_after": costs.bytes_after,
            "float_macs_share": costs.float_macs_share,
            "float_bytes_share": costs.float_bytes_share,
        },
        "topology": plan.to_dict()["topology"],
        "layers": [_layer_record(row) for row in costs.rows],
    }


def si(count: int) -> str:
    """Three digits and a unit: 999, 1.00k, 147k, 1.68G."""
    value, power = float(count), 0
    while value >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    if power == 0:
        return str(count)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{UNITS[power]}"


def _cells(row: LayerCost) -> tuple[str, ...]:
    return (
        row.name or ITSELF,
        "1-bit" if row.binarize else "float",
        "linear" if row.type == "linear" else _kernel(row.decision) if row.decision else "",
        _by(row.output_shape) if row.output_shape else "",
        si(row.binary_macs) if row.binary_macs else NONE,
        si(row.float_macs) if row.float_macs else NONE,
        si(row.bytes_before) if row.bytes_before else NONE,
        si(row.bytes_after) if row.bytes_after else NONE,
    )


def _reasons(costs: Costs) -> Iterator[str]:
    """Each reason once, with the layers that it is the reason of; where no rule keeps a layer, that is how many taps it has."""
    taps: list[int] = []
    groups: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for row in costs.rows:
        found = re.fullmatch(r"(\d+) taps? a filter", row.reason)
        if row.binarize and found:
            taps.append(int(found[1]))
        else:
            groups[row.binarize, row.reason].append(row.name or ITSELF)
    if taps:
        least, most = min(taps), max(taps)
        yield f"{'1-bit':<12} {len(taps):>3}  {least if least == most else f'{least} to {most}'} taps a filter"
    for (binary, reason), names in sorted(groups.items(), key=lambda group: not group[0][0]):
        yield f"{'1-bit' if binary else 'float':<12} {len(names):>3}  {reason}: {', '.join(names)}"


def _kernel(decision: ConvDecision) -> str:
    """3x3, then what is not 1: /2 the stride, d2 the dilation, g32 the groups."""
    text = _by(decision.kernel_size)
    if decision.stride != (1, 1):
        text += f" /{_by(decision.stride) if decision.stride[0] != decision.stride[1] else decision.stride[0]}"
    if decision.dilation != (1, 1):
        text += f" d{_by(decision.dilation) if decision.dilation[0] != decision.dilation[1] else decision.dilation[0]}"
    return text if decision.groups == 1 else f"{text} g{decision.groups}"


def _summary(plan: Plan, costs: Costs) -> str:
    smaller = costs.bytes_before / max(1, costs.bytes_after)
    return (
        f"{len(plan.binarized)} of {len(plan.decisions)} convolutions binarized. "
        f"Left in full precision: {costs.float_macs_share:.1%} of the MACs, {costs.float_bytes_share:.1%} of the bytes. "
        f"Size {si(costs.bytes_before)}B -> {si(costs.bytes_after)}B, {smaller:.1f} times smaller."
    )


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))


def _layer_record(row: LayerCost) -> dict[str, Any]:
    conv = row.decision
    return {
        "name": row.name,
        "type": row.type,
        "binarize": row.binarize,
        "reason": row.reason,
        "kernel_size": list(conv.kernel_size) if conv else None,
        "stride": list(conv.stride) if conv else None,
        "dilation": list(conv.dilation) if conv else None,
        "groups": conv.groups if conv else None,
        "calls": conv.calls if conv else None,
        "input_shape": list(row.input_shape) if row.input_shape else None,
        "output_shape": list(row.output_shape) if row.output_shape else None,
        "binary_macs": row.binary_macs,
        "float_macs": row.float_macs,
        "bytes_before": row.bytes_before,
        "bytes_after": row.bytes_after,
    }
