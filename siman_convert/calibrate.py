"""Alpha, bias and BatchNorm statistics re-estimated on training images, after conversion and (BatchNorm) after training.

A binary layer's output has another scale than the convolution it replaced, and every statistic behind it is stale. In training,
running averages lag behind weights whose bits still flip.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from siman_convert.blocks import BinaryUnit, Shift
from siman_convert.layers import SiMaNConv2d
from siman_convert.surgery import binary_layers

SMALLEST_ALPHA = 0.1  # of the median of a layer's fitted alphas


@dataclass
class _Moments:
    """Running sums over samples and positions of the float output y and the unscaled binary output o, per channel."""

    count: float
    y: Tensor
    o: Tensor
    yo: Tensor
    oo: Tensor

    @classmethod
    def zero(cls, channels: int, device: torch.device) -> "_Moments":
        y, o, yo, oo = torch.zeros(4, channels, dtype=torch.float64, device=device)
        return cls(0.0, y, o, yo, oo)

    def add(self, y: Tensor, o: Tensor) -> None:
        """Both (N, C, H, W)."""
        y, o = y.to(self.y.dtype), o.to(self.y.dtype)
        self.count += y.numel() / y.shape[1]
        for total, values in ((self.y, y), (self.o, o), (self.yo, y * o), (self.oo, o * o)):
            total += values.sum(dim=(0, 2, 3))


def fit_thresholds(full_precision: nn.Module, binary: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set each learned threshold to the mean of its channel in the full-precision network; without any, read no batch.

    0 would be no threshold: behind a ReLU nothing is below it.
    """
    averages, handles = dict[str, _Average](), []
    for name, shift in _shifts(binary).items():
        averages[name] = _Average(torch.zeros_like(shift.offset, dtype=torch.float64, requires_grad=False))
        handles.append(full_precision.get_submodule(name).register_forward_hook(averages[name].add))
    with _evaluating(full_precision), torch.no_grad():
        for batch in batches if averages else ():
            full_precision(batch)
        for name, shift in _shifts(binary).items():
            if averages[name].count:
                shift.offset.copy_(averages[name].total / averages[name].count)
    for handle in handles:
        handle.remove()


@dataclass
class _Average:
    """Running sum over samples, of every call, of the means of a convolution's input channels, (C_in,)."""

    total: Tensor
    count: int = 0

    def add(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        """A forward hook; the input is (N, C_in, H, W)."""
        self.total += inputs[0].mean(dim=(2, 3), dtype=self.total.dtype).sum(dim=0)
        self.count += len(inputs[0])


def _shifts(binary: nn.Module) -> dict[str, Shift]:
    """The learned thresholds, by the plan's names of their convolutions."""
    units = {name: module for name, module in binary.named_modules() if isinstance(module, BinaryUnit)}
    return {name: unit.shift for name, unit in units.items() if unit.shift is not None}


def fit_scales(full_precision: nn.Module, binary: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set each binary layer's alpha (and bias) to the least-squares fit of the full-precision layer's output.

    `full_precision` may be what an earlier stage of training made, binary in part. Both layers see its activations: alpha =
    cov(y, o) / var(o), bias = mean(y) - alpha * mean(o), per channel. A channel whose outputs do not correlate positively
    keeps the scale it had.

    Where a channel's bits hardly predict its output, alpha = cov/var comes near 0 (1e-5 beside a median of 0.02 in a
    ResNet-20). The BatchNorm behind divides by std(alpha*o + bias) = alpha * std(o), so gradients arrive multiplied by
    1/alpha until its epsilon dominates, where it no longer cancels their effect on alpha: |dL/dalpha| of 120 was measured where
    1e-3 is usual, which float16 cannot hold and Adam follows. No alpha is left below a tenth of the layer's median, so that
    amplification stays within 10 of the usual. Where var(o) is alike, the squared error of such a channel grows by no more than a
    hundredth of what the median channel's scale explains: (0.1 * median)^2 * var(o).
    """
    layers, shifts, staged = binary_layers(binary), _shifts(binary), binary_layers(full_precision)
    moments: dict[str, _Moments] = {}
    hooks = []
    for name, layer in layers.items():
        moments[name] = _Moments.zero(layer.out_channels, layer.weight.device)
        shift = (
            nn.Identity() if name in staged else shifts.get(name, nn.Identity())
        )  # what a stage's layer reads is shifted
        before = staged[name] if name in staged else full_precision.get_submodule(name)
        hooks.append(before.register_forward_hook(_recorder(layer, shift, moments[name])))
    with _evaluating(full_precision), _evaluating(binary), torch.no_grad():
        for images in batches:
            full_precision(images)
    for handle in hooks:
        handle.remove()
    for name, layer in layers.items():
        _set_scale(layer, moments[name])


def _recorder(
    layer: SiMaNConv2d, shift: nn.Module, moments: _Moments
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moments.add(output, layer.unscaled(shift(inputs[0])))

    return record


@torch.no_grad()
def _set_scale(layer: SiMaNConv2d, sums: _Moments) -> None:
    if sums.count == 0:
        return
    mean_y, mean_o = sums.y / sums.count, sums.o / sums.count
    covariance = sums.yo / sums.count - mean_y * mean_o
    variance = sums.oo / sums.count - mean_o * mean_o
    usable = (covariance > 0) & (variance > 0)
    fitted = covariance / variance.clamp_min(1e-12)
    alpha = torch.where(usable, fitted, layer.alpha.to(variance.dtype))
    if usable.any():
        alpha = alpha.clamp_min(SMALLEST_ALPHA * fitted[usable].median())
    layer.alpha.copy_(alpha)
    if layer.bias is not None:
        layer.bias.copy_(mean_y - alpha * mean_o)


def estimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every BatchNorm by the mean over `batches`; nothing else in the model changes."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with _evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        for images in batches:
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own training flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
