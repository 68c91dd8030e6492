"""How a plan and its figures are shown: a table for people, a record for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from siman_convert.costs import Costs, LayerCost
from siman_convert.plans import ConvDecision, Plan

NONE = "-"
UNITS = ("", "k", "M", "G", "T", "P")


def render_plan(console: Console, plan: Plan, costs: Costs) -> None:
    """One row for each layer, the totals, and what stays in full precision."""
    wide = console.width >= 120
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), pad_edge=False, header_style="bold")
    name_width = min(max(len(row.name) for row in costs.rows), max(16, console.width - (100 if wide else 76)))
    table.add_column("layer", overflow="fold", width=name_width)
    table.add_column("", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for title in ("1-bit\nMACs", "float\nMACs", "bytes\nbefore", "bytes\nafter"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in costs.rows:
        table.add_row(*_cells(row, name_width), style="" if row.binarize else "dim")
    table.add_section()
    totals = (costs.binary_macs, costs.float_macs, costs.bytes_before, costs.bytes_after)
    table.add_row("total", "", "", "", *map(si, totals), style="bold")
    console.print(f"[bold]{escape(plan.model)}[/] on an image of {_by(plan.input_size)}", highlight=False)
    console.print(table)
    console.print(_summary(plan, costs), highlight=False)


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


def _cells(row: LayerCost, name_width: int) -> tuple[str, ...]:
    decision = "1-bit" if row.binarize else "float"
    return (
        escape(_fold(row.name or "(the model itself)", name_width)),
        f"[green]{decision}[/]" if row.binarize else decision,
        "linear" if row.type == "linear" else _kernel(row.decision) if row.decision else "",
        _by(row.output_shape) if row.output_shape else "",
        si(row.binary_macs) if row.binary_macs else NONE,
        si(row.float_macs) if row.float_macs else NONE,
        si(row.bytes_before) if row.bytes_before else NONE,
        si(row.bytes_after) if row.bytes_after else NONE,
        escape(row.reason),
    )


def _fold(name: str, width: int) -> str:
    """Break a dotted name behind a dot where it gets too long."""
    lines = [""]
    for part in name.split("."):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f"{part}."
    return "\n".join(lines).removesuffix(".")


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
        f"[bold]{len(plan.binarized)} of {len(plan.decisions)}[/] convolutions binarized. "
        f"Left in full precision: [bold]{costs.float_macs_share:.1%}[/] of the MACs, "
        f"[bold]{costs.float_bytes_share:.1%}[/] of the bytes. "
        f"Size {si(costs.bytes_before)}B -> [bold]{si(costs.bytes_after)}B[/], {smaller:.1f} times smaller."
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
