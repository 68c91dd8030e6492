"""A trial export before training: what cannot become a file is refused in the first minute and not after the last epoch.

The graph depends on the network and its plan, not on trained weights, so the untrained network stands for the trained one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from torch import nn

from siman_convert.data import Preprocess
from siman_convert.description import Description, describe
from siman_convert.environment import siman_version
from siman_convert.errors import InputError, SimanError
from siman_convert.frozen import freeze
from siman_convert.onnx_export import INPUT, OUTPUT, binary_nodes, build_onnx
from siman_convert.plans import Plan
from siman_convert.runtime import native
from siman_convert.surgery import apply_plan


@dataclass(frozen=True)
class Trial:
    """What a trial export gave: operators of the graph, siman.BinaryConv2d included, and the bytes of the file."""

    operators: int
    binary: int
    bytes: int


def trial_export(model: nn.Module, plan: Plan, preprocess: Preprocess, classes: tuple[str, ...]) -> Trial:
    """Convert and export a copy of `model` as `plan` says, and run one image through the graph in ONNX Runtime.

    Raises InputError that names the module where it can, and the reason, when any of it fails.
    """
    packed = freeze(apply_plan(copy.deepcopy(model).cpu(), plan, init="copy"))
    description = Description(plan.model, plan, preprocess, classes, "best", "", None, siman_version())
    try:
        graph, _ = build_onnx(describe(packed, description))
        data = graph.SerializeToString()
        session = native.session(data)
        image = np.zeros((1, *preprocess.input_size), np.float32)
        logits = session.run([OUTPUT], {INPUT: image})[0]
    except InputError:
        raise
    except SimanError as error:
        raise InputError(f"{error}; this network cannot be exported, choose another") from error
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{plan.model}: ONNX Runtime cannot run its graph ({reason}); choose another network"
        ) from error
    if logits.shape != (1, len(classes)):
        raise InputError(
            f"{plan.model}: its exported graph answers one image with shape {logits.shape}, expected (1, {len(classes)}); "
            "choose another network"
        )
    return Trial(len(graph.graph.node), len(binary_nodes(graph)), len(data))
