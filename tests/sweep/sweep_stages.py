"""One model all the way: plan, convert, one training step, freeze, safetensors and back, ONNX, every operator, the whole network.

Random weights, noise for images. timm starts many networks with branches switched off (zero gammas of last BatchNorms, layer
scales of 1e-6, NFNet's zero gains), where any two versions of a branch would agree; so those are drawn anew first, and
BatchNorms estimated. `operators` compares each binary convolution on the inputs it gets, bit by bit, in torch, stock ONNX
Runtime, our kernels and the reference. `network` compares torch with ONNX Runtime on whole images, by the bounds of `siman
verify`.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import timm
import torch
from torch import Tensor, nn

from siman_convert.calibrate import estimate_batch_norm
from siman_convert.costs import plan_costs
from siman_convert.data import Preprocess
from siman_convert.description import Description, describe
from siman_convert.errors import InputError, SimanError
from siman_convert.frozen import freeze
from siman_convert.model_table import STAGES, Row, family_of
from siman_convert.models import create
from siman_convert.objective import Objective
from siman_convert.onnx_export import binary_nodes, build_onnx
from siman_convert.operator_check import check_operators
from siman_convert.packed import load, save_packed
from siman_convert.plans import Plan, Size, make_plan
from siman_convert.recipe import Recipe
from siman_convert.runtime import native
from siman_convert.surgery import apply_plan, binary_layers
from siman_convert.trace import trace
from siman_convert.train import TrainingStep, make_optimizer
from siman_convert.verification import (
    compare,
    different_tensors,
    graph_runner,
    model_failures,
    tapped_graph,
    torch_runner,
)
from siman_convert.watch import Watcher

CLASSES = 10
NOTHING = "nothing to binarize"
SIDES = (96, 128, 160)  # tried before a model's own size, on which everything takes longer
DRAWS = 5
BATCH, COMPARED = 4, 2  # images of the training step and of BatchNorm; of the comparisons


class StageError(Exception):
    """What a stage found wrong, in one line."""


class BlindError(StageError):
    """The network gives every image the same answer."""


def sweep_model(name: str, side: int | None = None, last: str = STAGES[-1]) -> Row:
    """The row of one model, its stages up to `last`.

    `side`: of its images; None: the smallest of SIDES that it takes, else its own.
    """
    started = time.process_time()
    row: Row = {"name": name, "family": family_of(name), "stages": {}}
    passed: Row = row["stages"]
    made: dict[str, Any] = {}
    for stage in STAGES[: STAGES.index(last) + 1]:
        try:
            _STAGE[stage](name, side, row, made)
            passed[stage] = "passed"
        except Exception as error:  # whatever it is belongs into the row
            text = str(error) if isinstance(error, StageError | SimanError) else f"{type(error).__name__}: {error}"
            passed[stage] = " ".join(text.split())[:300]
            break
        if not row["binarized"]:
            break
    row["outcome"] = "failed" if set(passed.values()) != {"passed"} else "passed" if row["binarized"] else NOTHING
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def _plan(name: str, side: int | None, row: Row, made: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    plan = make_plan(model, name=name)
    row["convolutions"], row["binarized"] = len(plan.decisions), len(plan.binarized)
    row["kept"] = dict(sorted(Counter(_kind(d.reason) for d in plan.decisions if not d.binarize).items()))
    row["binary_macs"] = round(1 - plan_costs(model, plan).float_macs_share, 4)
    if plan.binarized:
        made["plan"], made["size"] = plan, _size(model, plan, side)
        row["input_size"] = list(made["size"])


def _kind(reason: str) -> str:
    """A reason without the figures of one layer."""
    return reason.partition(":")[0] if reason.startswith(("depthwise", "one input")) else reason


def _size(model: nn.Module, plan: Plan, side: int | None) -> Size:
    channels, height, width = plan.input_size
    for smaller in (side,) if side else SIDES:
        size = (channels, smaller, smaller)
        try:
            if smaller < min(height, width):
                trace(model, size)
                return size
        except InputError:
            continue
    return plan.input_size


def _convert(name: str, _side: int | None, _row: Row, made: dict[str, Any]) -> None:
    """Random weights may be such that a layer's signs are the same for every image: they are drawn anew then."""
    for seed in range(DRAWS):
        with suppress(BlindError):
            return _draw(name, seed, made)
    raise BlindError(f"{DRAWS} draws of random weights give every image the same logits")


def _draw(name: str, seed: int, made: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    model = create(name, CLASSES)
    _wake(model)
    apply_plan(model, made["plan"])
    made["images"] = torch.randn(BATCH, *made["size"]) + torch.randn(BATCH, made["size"][0], 1, 1)
    estimate_batch_norm(model, [made["images"]])
    made["model"] = model.eval()
    _logits(model, made["images"])


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Scales, those of norms and of branches, of both signs and away from zero; nothing else zero, and biases small.

    EdgeNeXt draws large biases: what is added for every image alike drowns what an image is.
    """
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.squeeze().ndim <= 1:
            signs = torch.randint(0, 2, parameter.shape) * 2 - 1
            parameter.copy_(torch.empty_like(parameter).uniform_(0.3, 1.2) * signs)
        elif not parameter.any():  # a classifier that starts at zero
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    if logits.shape != (len(images), CLASSES) or not logits.isfinite().all():
        raise StageError(f"logits of shape {tuple(logits.shape)}, finite: {bool(logits.isfinite().all())}")
    if torch.equal(logits[0], logits[1]):
        raise BlindError("two images have the same logits: nothing that is compared here would mean anything")
    return logits


def _train(_name: str, _side: int | None, _row: Row, made: dict[str, Any]) -> None:
    model, recipe = made["model"], Recipe()
    step, layers = TrainingStep(model, Objective()).train(), binary_layers(model)
    optimizer = make_optimizer(model, recipe, recipe.lr)
    before = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    for layer in layers.values():
        layer.clip_weights_(recipe.clip_percent)
    loss = step(made["images"], torch.arange(BATCH) % CLASSES)[0]
    loss.backward()
    still = [path for path, layer in layers.items() if layer.weight.grad is None or layer.alpha.grad is None]
    if still or not loss.isfinite():
        raise StageError(f"loss {float(loss):g}; no gradient in {', '.join(still[:3]) or 'none'}")
    optimizer.step()
    stuck = [path for path, layer in layers.items() if torch.equal(before[path], layer.weight)]
    if stuck:
        raise StageError(f"{len(stuck)} binary layers did not move, {stuck[0]} first")
    estimate_batch_norm(model, [made["images"]])


def _freeze(name: str, _side: int | None, _row: Row, made: dict[str, Any]) -> None:
    model, plan = made.pop("model").eval(), made["plan"]
    expected = _logits(model, made["images"])
    packed = freeze(model)
    if not torch.equal(_logits(packed, made["images"]), expected):
        raise StageError("the packed network answers otherwise than the trained one")
    preprocess = Preprocess(made["size"], "bicubic", (0.5,) * 3, (0.5,) * 3, 0.95, "center")
    classes = tuple(map(str, range(CLASSES)))
    made["packed"] = describe(packed, Description(name, plan, preprocess, classes, "best", "", None, "0"))


def _safetensors(_name: str, _side: int | None, _row: Row, made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_packed(made["packed"], path)
        loaded = load(path)
    if wrong := different_tensors(loaded, made["packed"]):
        raise StageError(wrong[0])
    if not torch.equal(_logits(loaded, made["images"]), _logits(made["packed"], made["images"])):
        raise StageError("the file, read back, answers otherwise")


def _onnx(_name: str, _side: int | None, row: Row, made: dict[str, Any]) -> None:
    graph: onnx.ModelProto = build_onnx(made["packed"])[0]
    nodes = {node.name.partition("#")[0] for node in binary_nodes(graph)}
    if missing := set(made["plan"].binarized) - nodes:
        raise StageError(f"{len(missing)} binary layers are not in the graph, {min(missing)} first")
    made["graph"], made["tapped"] = graph, tapped_graph(graph)
    row["operators"] = len(graph.graph.node)


def _operators(_name: str, _side: int | None, row: Row, made: dict[str, Any]) -> None:
    if native.variant() is None:
        raise StageError("our kernels are not built here")
    checks = list(check_operators(made["graph"], made["tapped"], made["images"][:COMPARED]))
    if wrong := [line for check in checks for line in check.failures()]:
        raise StageError(f"{len(wrong)} differences: {wrong[0]}")
    if any(set(check.different) != {"torch", "onnxruntime", "native"} for check in checks):
        raise StageError("an operator was not run in every backend")
    row["outputs_compared"] = sum(check.outputs for check in checks)


def _network(_name: str, _side: int | None, _row: Row, made: dict[str, Any]) -> None:
    layers = {node.name: node.input[0] for node in binary_nodes(made["graph"])}
    session = native.open_session(made["tapped"].SerializeToString())
    runners = torch_runner(made["packed"]), graph_runner(session.run, layers)
    found = compare(
        ("torch", "onnxruntime"), *runners, [made["images"][:COMPARED]], dict.fromkeys(layers, True), Watcher()
    )
    if wrong := list(model_failures(found)):
        raise StageError(wrong[0])


_STAGE: dict[str, Callable[[str, int | None, Row, dict[str, Any]], None]] = {
    "plan": _plan,
    "convert": _convert,
    "train": _train,
    "freeze": _freeze,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "operators": _operators,
    "network": _network,
}
