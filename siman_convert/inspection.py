"""The plan of a model or of a run, and what it costs, without any weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from siman_convert.costs import Costs, plan_costs
from siman_convert.models import create, require_known
from siman_convert.plans import Plan, make_plan
from siman_convert.runs import Run


def inspect_model(
    name: str, classes: int | None = None, *, keep: Sequence[str] = (), binarize: Sequence[str] = ()
) -> tuple[Plan, Costs]:
    """The plan of timm model `name` and its costs, without weights; `classes` defaults to the model's own."""
    require_known(name)
    with torch.device("meta"):
        model = create(name, classes)
    plan = make_plan(model, name=name, keep=keep, binarize=binarize)
    return plan, plan_costs(model, plan)


def inspect_run(folder: Path) -> tuple[Plan, Costs]:
    """The plan a run was made with and its costs."""
    run = Run(folder)
    info, plan = run.info(), run.plan()
    with torch.device("meta"):
        model = create(info.model, len(info.classes))
    return plan, plan_costs(model, plan)
