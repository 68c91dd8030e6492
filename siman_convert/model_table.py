"""The table behind `siman models`: what the plan makes of every timm architecture and of the paper's networks.

It ships with the package, since asking timm itself takes seconds. `python -m siman_convert.model_table` makes it anew (about half
an hour on one core; it goes on where it was stopped); a test holds a sample of its rows against fresh plans.
"""

import difflib
import fnmatch
import importlib.resources
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from siman_convert.errors import InputError
from siman_convert.files import write_text

FILE = "models.jsonl"  # one row a line, sorted by name
COVERAGE = "coverage.jsonl"  # likewise, what became of the models that `python tests/sweep` took all the way
STAGES = ("plan", "convert", "train", "freeze", "safetensors", "onnx", "operators", "network")
Row = dict[str, Any]


def read_table() -> list[Row]:
    """The shipped rows: name, family (`family_of`), convolutions, binarized, parameters, timm_hub (`has_weights_on_timm_hub`)."""
    return _read(FILE)


def read_coverage() -> dict[str, Row]:
    """The rows of the sweep by model.

    name, family; convolutions, binarized, kept (reason -> convolutions), binary_macs (share, 0 to 1), input_size (C, H, W);
    stages (each of STAGES that was reached -> "passed", or what went wrong), outcome ("passed", "failed", "nothing to
    binarize"), operators of the ONNX graph, outputs_compared bit by bit, seconds of one core.
    """
    return {row["name"]: row for row in _read(COVERAGE)}


def _read(file: str) -> list[Row]:
    text = (importlib.resources.files("siman_convert") / file).read_text(encoding="utf-8")
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


def swept(row: Row, coverage: dict[str, Row]) -> Row | None:
    """What the sweep found of a model, else of one of its family, one that failed first; None: of neither."""
    family = [other for other in coverage.values() if other["family"] == row["family"]]
    return coverage.get(row["name"]) or min(family, key=lambda other: other["outcome"], default=None)


def family_of(name: str) -> str:
    """`module/word`: what the module of timm that an architecture is in calls by one word, whatever the size.

    `resnet/resnet` of resnet18 and resnet200d; resnet/seresnext, regnet/regnetx, efficientnet/tf_efficientnetv2.
    """
    from timm.models._registry import _model_to_module

    words = name.split("_")
    count = 2 if words[0] in ("tf", "legacy", "wide", "dm") and len(words) > 1 else 1
    sizeless = (
        r"[a-z0-9]*?v\d|.*?[a-z](?=\d+[a-z]{0,2}\d*$)|.*"  # the v2 of resnetv2 stays, the 18 of resnet18 does not
    )
    last = re.match(sizeless, words[count - 1])
    assert last
    return f"{_model_to_module[name]}/{'_'.join([*words[: count - 1], last.group()])}"


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
    counts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return {"name": name, "family": family_of(name), **counts, "timm_hub": has_weights_on_timm_hub(name)}


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
