"""What a plan changes around the binary convolutions, for people: one line for each reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from siman_convert.topology import Topology

SHOWN = 4  # names on a line; --json has all


def topology_lines(topology: Topology) -> Iterator[str]:
    """Nothing where nothing was asked for."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for shortcut in topology.shortcuts:
        groups["shortcut" if shortcut.norm else "no shortcut", shortcut.reason].append(shortcut.conv)
    for activation in topology.activations:
        groups["PReLU" if activation.prelu else "no PReLU", activation.reason].append(activation.name)
    kinds = ("shortcut", "no shortcut", "PReLU", "no PReLU")
    for (kind, reason), names in sorted(groups.items(), key=lambda group: (kinds.index(group[0][0]), -len(group[1]))):
        yield f"{kind:<12} {len(names):>3}  {reason}: {_some(names)}"
    if topology.shifts:
        yield f"{'shifts':<12} {'all':>3}  learned thresholds instead of the sample's mean, and two shifts around each new PReLU"


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
