"""The layer against vectors computed with the authors' published implementation (tests/golden/README.md says which)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.binarize import clip_percent
from siman_convert.layers import SiMaNConv2d

GOLDEN = Path(__file__).parent / "golden"
LAYER_FILES = sorted(GOLDEN.glob("layer_*.npz"))
PRECISIONS = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-10)}


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to `tolerance` relative to the largest expected magnitude."""
    largest = np.abs(expected).max()
    assert np.abs(actual.detach().numpy() - expected).max() <= tolerance * largest


def golden_layer(data: dict[str, np.ndarray], dtype: torch.dtype) -> SiMaNConv2d:
    out_channels, in_channels, size, _ = data["in_weight"].shape
    layer = SiMaNConv2d(
        in_channels, out_channels, size, int(data["stride"]), int(data["padding"]), bias=False, dtype=dtype
    )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(data["in_weight"]))
        layer.alpha.copy_(torch.from_numpy(data["in_alpha"]).flatten())
    return layer


def test_all_files_are_here() -> None:
    assert len(LAYER_FILES) == 11


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", LAYER_FILES, ids=lambda path: path.stem)
def test_layer(path: Path, precision: str) -> None:
    data = dict(np.load(path))
    dtype, tolerance = PRECISIONS[precision]
    layer = golden_layer(data, dtype)
    x = torch.from_numpy(data["in_x"]).to(dtype).requires_grad_()

    layer.clip_weights_(float(data["percent"]))
    assert_close(layer.weight, data[f"{precision}_w_after_train"], tolerance)
    assert np.array_equal(layer.bits().flatten(1).numpy(), data["B"].astype(bool))
    assert np.array_equal(layer.bits().flatten(1).sum(1).numpy(), data["ones_per_filter"])

    y = layer(x)
    y.backward(torch.from_numpy(data["in_grad_y"]).to(dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.alpha.grad is not None
    assert_close(x.grad, data[f"{precision}_grad_x"], tolerance)
    # A sample of zeros binarizes to 0 in the authors' code and to +1 here: its output, and what that adds to the
    # gradients of weight and alpha, differ on purpose.
    has_zero_sample = "zeroimg" in path.stem
    kept = [i for i in range(3) if not (has_zero_sample and i == 1)]
    assert_close(y[kept], data[f"{precision}_y_train"][kept], tolerance)
    if not has_zero_sample:
        assert_close(layer.weight.grad, data[f"{precision}_grad_w"], tolerance)
        assert_close(layer.alpha.grad, data[f"{precision}_grad_alpha"].flatten(), tolerance)


class TrajectoryNet(nn.Module):
    """The small network of the golden trajectory: a stem, two binary convolutions with BatchNorm and PReLU, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Module()
        self.layer1.conv1 = SiMaNConv2d(16, 16, 3, padding=1, bias=False)
        self.layer1.bn1, self.layer1.nonlinear1 = nn.BatchNorm2d(16), nn.PReLU(16)
        self.layer1.conv2 = SiMaNConv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.layer1.bn2, self.layer1.nonlinear2 = nn.BatchNorm2d(32), nn.PReLU(32)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        block = self.layer1
        x = self.bn1(self.conv1(x))
        x = block.nonlinear1(block.bn1(block.conv1(x)))
        x = block.nonlinear2(block.bn2(block.conv2(x)))
        return self.linear(x.mean(dim=(2, 3)))


@pytest.mark.parametrize(("precision", "bound"), [("f32", 1e-5), ("f64", 1e-9)])
def test_trajectory(precision: str, bound: float) -> None:
    data = dict(np.load(GOLDEN / "trajectory_seed7.npz"))
    dtype = PRECISIONS[precision][0]
    model = TrajectoryNet().to(dtype)
    names = load_golden_state(model, data, "init/")
    binary = [module for module in model.modules() if isinstance(module, SiMaNConv2d)]
    latents = [p for layer in binary for p in layer.parameters()]
    others = [p for p in model.parameters() if all(p is not q for q in latents)]
    groups = [{"params": latents, "weight_decay": 0.0}, {"params": others, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    images = torch.from_numpy(data["in_x"]).to(dtype)
    labels = torch.from_numpy(data["in_labels"])

    losses = []
    for step in range(20):
        batch = slice(step % 5 * 16, step % 5 * 16 + 16)
        for layer in binary:
            layer.clip_weights_(clip_percent(step // 5, 4))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert np.abs(np.array(losses) - data[f"{precision}_losses"]).max() <= bound
    state = model.state_dict()
    for ours, golden in names.items():
        if not golden.endswith("num_batches_tracked"):
            expected = data[f"{precision}_final/{golden}"].reshape(state[ours].shape)
            assert_close(state[ours], expected, 3e-5 if precision == "f32" else 1e-9)


def load_golden_state(model: nn.Module, data: dict[str, np.ndarray], prefix: str) -> dict[str, str]:
    """Copy the golden state into `model`; returns our name -> theirs for every tensor that both have."""
    stored = {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}
    names = {name: name for name in stored if not name.endswith(".B")}
    state = {
        name: torch.from_numpy(stored[theirs]).reshape(model.state_dict()[name].shape) for name, theirs in names.items()
    }
    model.load_state_dict(state)
    return names
