"""The table behind `siman models`: what the plan makes of every timm architecture and of the paper's networks.

It ships with the package, since asking timm itself takes seconds. `python -m siman_convert.model_table` makes it anew (about half
an hour on one core; it goes on where it was stopped); a test holds a sample of its rows against fresh plans.
"""

import difflib
import fnmatch
import importlib.resources
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from siman_convert.errors import InputError
from siman_convert.files import write_text

FILE = "models.jsonl"  # one row a line, sorted by name
Row = dict[str, Any]


def read_table() -> list[Row]:
    """The shipped rows: name, convolutions, binarized, timm_hub (see `has_weights_on_timm_hub`)."""
    text = (importlib.resources.files("siman_convert") / FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def matching(rows: Sequence[Row], pattern: str) -> list[Row]:
    """The rows whose name matches a glob, or contains `pattern`. InputError with close matches when there are none."""
    names = [row["name"] for row in rows]
    chosen = set(fnmatch.filter(names, pattern)) or {name for name in names if pattern in name}
    if not chosen:
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise InputError(f"no model matches {pattern!r}{hint}")
    return [row for row in rows if row["name"] in chosen]


def make_row(name: str) -> Row:
    """Plan one architecture with random weights, as it is in timm."""
    import timm
    import torch

    import siman_convert.networks  # noqa: F401  registers them with timm
    from siman_convert.plans import make_plan

    with torch.device("meta"):
        model = timm.create_model(name)
    plan = make_plan(model, name=name)
    counts = {"convolutions": len(plan.decisions), "binarized": len(plan.binarized)}
    return {"name": name, **counts, "timm_hub": has_weights_on_timm_hub(name)}


def has_weights_on_timm_hub(name: str) -> bool:
    """Whether the default pretrained weights of an architecture are in timm's own place on the hub."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    return cfg is not None and cfg.has_weights and (cfg.hf_hub_id or "").startswith("timm/")


def regenerate(path: Path) -> None:
    """Write rows for all of timm's architectures and for our networks, keeping the rows the file has."""
    import timm

    import siman_convert.networks  # noqa: F401  registers them with timm

    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    for name in timm.list_models():
        if name not in rows:
            rows[name] = make_row(name)
            write_text(path, "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
            print(name, file=sys.stderr)


if __name__ == "__main__":
    regenerate(Path(__file__).with_name(FILE))
