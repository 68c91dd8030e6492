"""The plan of a model or of a run, and what it costs, without any weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from siman_convert.costs import Costs, plan_costs
from siman_convert.data import Preprocess, resolve_preprocess
from siman_convert.models import create, require_known
from siman_convert.onnx_file import read_onnx
from siman_convert.onnx_int8_plan import Quantization, read_quantization
from siman_convert.packed import read_description
from siman_convert.plans import Plan, Size, at_size, make_plan, native_input_size
from siman_convert.runs import Run


def plan(
    model: str | nn.Module,
    *,
    input_size: Size | None = None,
    keep: Sequence[str] = (),
    binarize: Sequence[str] = (),
    shortcuts: bool = False,
    prelu: bool = False,
    shifts: bool = False,
) -> Plan:
    """What would become binary in a timm model, given by name or as a module, and why; see `plans.make_plan`.

    >>> from siman_convert import plan
    >>> for decision in plan("resnet18").decisions[:2]:
    ...     print(decision.name, decision.binarize, "-", decision.reason)
    conv1 False - stem: reads the image
    layer1.0.conv1 True - 576 taps a filter
    """
    module, name = (model, "") if isinstance(model, nn.Module) else (_on_meta(model, None), model)
    return make_plan(
        module,
        name=name,
        input_size=input_size,
        keep=keep,
        binarize=binarize,
        shortcuts=shortcuts,
        prelu=prelu,
        shifts=shifts,
    )


def inspect_model(
    name: str,
    classes: int | None = None,
    *,
    img_size: int | None = None,
    keep: Sequence[str] = (),
    binarize: Sequence[str] = (),
    shortcuts: bool = False,
    prelu: bool = False,
    shifts: bool = False,
) -> tuple[Plan, Costs]:
    """The plan of timm model `name` and its costs, without weights; `classes` and `img_size` default to the model's own.

    `img_size` is a recipe's: the height and width that the network is to train and run at. Raises InputError.
    """
    model = _on_meta(name, classes)
    native = native_input_size(model)
    size = native
    if img_size is not None:
        size = resolve_preprocess(model, image_size=native[1:], img_size=img_size)[0].input_size
    wishes = {"shortcuts": shortcuts, "prelu": prelu, "shifts": shifts}
    decided = make_plan(model, name=name, input_size=size, keep=keep, binarize=binarize, **wishes)
    return decided, plan_costs(model, decided)


def _on_meta(name: str, classes: int | None) -> nn.Module:
    """timm's model, without memory for its weights. Raises InputError."""
    require_known(name)
    with torch.device("meta"):
        return create(name, classes)


def inspect_file(path: Path) -> tuple[Plan, Costs, Quantization | None]:
    """The plan an exported file was made with, its costs, and what else of the file is in 8 bits; None: it is not int8."""
    file = read_onnx(path) if path.suffix == ".onnx" else None
    description = file.description if file else read_description(path)
    quantization = read_quantization(file.model.graph) if file and file.variant.int8 else None
    decided, size = description.plan, description.preprocess.input_size
    return *_costed(decided, description.architecture, len(description.classes), size), quantization


def inspect_run(folder: Path) -> tuple[Plan, Costs]:
    """The plan a run was made with and its costs."""
    run = Run(folder)
    info, decided = run.info(), run.plan()
    return _costed(decided, info.model, len(info.classes), Preprocess.from_dict(info.preprocess).input_size)


def _costed(decided: Plan, name: str, classes: int, size: Size) -> tuple[Plan, Costs]:
    """A stored plan at the size that its network runs at, and its costs."""
    model = _on_meta(name, classes)
    decided = at_size(decided, model, size)
    return decided, plan_costs(model, decided)
