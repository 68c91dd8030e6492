"""Networks as training could leave them, packed and described, and ways to run what is exported from them.

timm zero-initialises the last BatchNorm of a residual block: such a block adds nothing, and any two versions of it agree.
So every BatchNorm here gets gammas of both signs and statistics of its own inputs, and `flipped` is there to prove that the bits
matter.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.data import Preprocess
from siman_convert.description import Description, describe, description_of
from siman_convert.frozen import PackedConv2d, freeze
from siman_convert.layers import SiMaNConv2d
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_file import Variant, seal
from siman_convert.onnx_fold import Folding
from siman_convert.onnx_op import DOMAIN
from siman_convert.plans import Plan, make_plan
from siman_convert.surgery import apply_plan

Size = tuple[int, int, int]
HAND_SIZE, HAND_CLASSES = (3, 16, 13), 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class HandNet(nn.Module):
    """No BatchNorm; groups, dilation, stride, uneven padding, 1x1, biases, odd channel counts, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 10, 3, stride=(2, 1), padding=(1, 2), groups=2)
        self.uneven = nn.Conv2d(10, 11, (2, 4), padding="same", bias=False)  # pads (top, left, bottom, right) 0 1 1 2
        self.dilated = nn.Conv2d(11, 9, (3, 2), dilation=(2, 3), padding=(2, 1))
        self.point = nn.Conv2d(9, 9, 1)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.leaky_relu(self.grouped(x), 0.1)
        x = self.dilated(self.uneven(x))
        x = self.point(F.relu(self.point(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For the modules that import it: small networks on a busy machine run several times as fast on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count: int, *size: int, seed: int = 5) -> Tensor:
    """Normalised images: noise on a slope of their own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *size, generator=generator)
    return noise + torch.randn(count, size[0], 1, 1, generator=generator)


@torch.no_grad()
def randomize(model: nn.Module, batch: Tensor) -> nn.Module:
    """BatchNorms with gammas in +-[0.3, 1.5], random betas and the statistics of `batch`; alphas of both signs; eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.3, 1.5).mul_(torch.randint(0, 2, norm.weight.shape) * 2 - 1)
        norm.bias.normal_(0, 0.5)
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches, of which there is one
    for module in model.modules():
        if isinstance(module, SiMaNConv2d):
            module.alpha.mul_(torch.randint(0, 2, module.alpha.shape) * 2 - 1)
            if module.bias is not None:
                module.bias.normal_(0, 0.5)
    model.train()(batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def siman_model(name: str, size: Size, classes: int, selection: str = "half", seed: int = 0) -> tuple[nn.Module, Plan]:
    """A SiMaN model of timm's, or HandNet, with its plan; timm's are planned at their own size, whatever `size` is."""
    torch.manual_seed(seed)
    model = HandNet() if name == "hand" else timm.create_model(name, num_classes=classes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")  # HandNet's own convolution
        plan = make_plan(model, name=name, input_size=size if name == "hand" else None)
    apply_plan(model, plan, selection=selection)  # type: ignore[arg-type]
    return randomize(model, images(8, *size, seed=seed)), plan


def description(plan: Plan, size: Size, classes: int, name: str = "test_resnet") -> Description:
    return Description(
        architecture=name,
        plan=plan,
        preprocess=Preprocess(size, "bicubic", MEAN, STD, 0.95, "center"),
        classes=tuple(f"class {number} \u00fc" for number in range(classes)),
        weights="best",
        recipe_digest="ab12",
        accuracy=None,
        siman_version="0.1.0",
    )


def packed_model(name: str, size: Size, classes: int) -> nn.Module:
    model, plan = siman_model(name, size, classes)
    return describe(freeze(model), description(plan, size, classes, name))


class Export(NamedTuple):
    packed: nn.Module
    model: onnx.ModelProto
    folding: Folding
    data: bytes  # of the sealed file


def export(packed: nn.Module) -> Export:
    model, folding = build_onnx(packed)
    return Export(packed, model, folding, seal(model, description_of(packed), Variant()))


@functools.cache
def hand_export() -> Export:
    """Of HandNet, once for all test modules; nobody changes it."""
    return export(packed_model("hand", HAND_SIZE, HAND_CLASSES))


@contextlib.contextmanager
def flipped(layer: PackedConv2d, filter_: int = 0) -> Iterator[None]:
    """One weight of one filter is turned around: that of channel 0 in the middle, which every output reads."""
    row, column = layer.kernel_size[0] // 2, layer.kernel_size[1] // 2
    layer.weight_bits[filter_, row, column, 0] ^= 1
    try:
        yield
    finally:
        layer.weight_bits[filter_, row, column, 0] ^= 1


def run_torch(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


def ort_session(model: onnx.ModelProto | bytes) -> ort.InferenceSession:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def binary_inputs_torch(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    """What every binary convolution reads, call by call."""
    seen: list[np.ndarray] = []

    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].numpy().copy())

    hooks = [module.register_forward_pre_hook(hook) for module in model.modules() if isinstance(module, PackedConv2d)]
    run_torch(model, x)
    for handle in hooks:
        handle.remove()
    return seen


def with_binary_inputs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with one more output for every binary convolution: what it reads."""
    wider = copy.deepcopy(model)
    names = [node.input[0] for node in wider.graph.node if node.domain == DOMAIN]
    for name in dict.fromkeys(names):
        wider.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4))
    return wider, names


def samples_of_equal_signs(
    packed: nn.Module, x: Tensor, run: Callable[[list[str], dict[str, np.ndarray]], list[np.ndarray]], names: list[str]
) -> np.ndarray:
    """(N,) bool: the images on which both runtimes binarize every activation of every layer alike.

    Elsewhere a last bit decides which side of the mean a value falls, and what follows may be anything.
    """
    same = np.ones(len(x), bool)
    theirs = run(names, {"input": x.numpy()})
    ours = binary_inputs_torch(packed, x)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        same &= (signs(a) == signs(b)).all(axis=(1, 2, 3))
    return same


def signs(x: np.ndarray) -> np.ndarray:
    return x >= x.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
