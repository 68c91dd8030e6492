"""The networks of the paper (arXiv 2102.07981) under timm names, so that every command takes them as it takes timm's own.

    siman_resnet20            CIFAR     16/32/64 channels, 3 blocks each          PReLU, a shortcut around every 3x3
    siman_resnet18            CIFAR     64/128/256/512 channels, 2 blocks each    hardtanh, a shortcut around every block
    siman_vgg_small           CIFAR     128-128-M-256-256-M-512-512-M, one Linear PReLU, no shortcut
    siman_resnet18_imagenet   ImageNet  ResNet-18's widths and depths             PReLU, a shortcut around every 3x3
    siman_resnet34_imagenet   ImageNet  ResNet-34's                               the same

They are built in full precision of ordinary convolutions; the plan decides what becomes binary, as for any model. Layers and
their order are those of the authors' published implementation, which settles what the paper leaves open:
    the parameter-free shortcut adds zero channels in equal number before and after the others;
    CIFAR's ResNet-18 has no activation behind its stem, and its 1x1 shortcuts become binary (`binary_by_design`);
    ImageNet's 1x1 shortcuts have stride 2, no average pooling before them, and stay in full precision;
    VGG-small pools between a convolution and its BatchNorm;
    ResNets have a BatchNorm1d before the classifier.
One thing differs: the authors start ImageNet's BatchNorm weights at 1e-8. Here they start at 1, so that the same network also
trains in full precision. No weights are published in this form, so `pretrained=True` is an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from timm.layers import SelectAdaptivePool2d, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["siman_resnet18", "siman_resnet18_imagenet", "siman_resnet20", "siman_resnet34_imagenet", "siman_vgg_small"]

Entry = Callable[..., "Network"]
Shortcut = Callable[[int, int], nn.Module]  # where the shape changes: channels before and after

_WIDTHS = (64, 128, 256, 512)
_SHORTCUTS = "stages.*.shortcut.conv"


class Network(nn.Module):
    """A stem, stages, pooling to (N, features), dropout and `fc`; timm's interface of a classifier.

    `feature_info`: as timm's, channels and reduction of each stage. `binary_by_design`: glob on convolutions -> whether the plan
    binarizes them, whatever its rules say (`plans.make_plan`).
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: nn.Module,
        pool: nn.Module,
        num_features: int,
        num_classes: int,
        drop_rate: float,
        feature_info: Sequence[Mapping[str, Any]],
        binary_by_design: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.binary_by_design = dict(binary_by_design)
        self.stem, self.stages, self.pool, self.drop = stem, stages, pool, nn.Dropout(drop_rate)
        self.feature_info = list(feature_info)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer of random weights; with 0 classes none, and `forward` gives features."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the last stage's (N, C', H', W')."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C', H', W') -> (N, classes), or with `pre_logits` what the last layer reads."""
        x = self.drop(self.pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        return self.forward_head(self.forward_features(x))


class DoubleShortcutBlock(nn.Module):
    """Two 3x3 convolutions, each with a shortcut of its own: PReLU(BN(conv(x)) + x), as in Bi-Real Net."""

    def __init__(self, before: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = _conv3x3(before, width, stride), nn.BatchNorm2d(width), nn.PReLU(width)
        self.conv2, self.bn2, self.act2 = _conv3x3(width, width), nn.BatchNorm2d(width), nn.PReLU(width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, width, H/stride, W/stride)."""
        x = self.act1(self.bn1(self.conv1(x)) + self.shortcut(x))
        out: Tensor = self.act2(self.bn2(self.conv2(x)) + x)
        return out


class SingleShortcutBlock(nn.Module):
    """Two 3x3 convolutions and one shortcut around both; hardtanh behind each."""

    def __init__(self, before: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(before, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width), nn.BatchNorm2d(width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, width, H/stride, W/stride)."""
        y = self.bn2(self.conv2(F.hardtanh(self.bn1(self.conv1(x)))))
        return F.hardtanh(y + self.shortcut(x))


class Subsample(nn.Module):
    """The shortcut without parameters: every second row and column, and zero channels around the others.

    (N, before, H, W) -> (N, after, ceil(H/2), ceil(W/2)); half of the `after - before` zero channels come first.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = (after - before) // 2
        self.last = after - before - self.first

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.first, self.last))


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _strided_1x1(before: int, after: int) -> nn.Module:
    conv = nn.Conv2d(before, after, 1, stride=2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(after)))


def _small_stem(in_chans: int, width: int, **behind: nn.Module) -> nn.Module:
    """CIFAR's: 3x3, full resolution."""
    conv = _conv3x3(in_chans, width)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width), **behind))


def _large_stem(in_chans: int, width: int) -> nn.Module:
    """ImageNet's: 7x7 and a max pool, a quarter of the resolution."""
    conv = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width), act=nn.ReLU(), pool=pool))


def _stages(
    block: type[DoubleShortcutBlock | SingleShortcutBlock],
    widths: Sequence[int],
    depths: Sequence[int],
    shortcut: Shortcut,
) -> nn.Module:
    """Stages of so many blocks; all but the first halve the resolution in their first block."""
    stages, before = [], widths[0]
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        first = block(before, width, 2, shortcut(before, width)) if index else block(before, width, 1, nn.Identity())
        stages.append(nn.Sequential(first, *(block(width, width, 1, nn.Identity()) for _ in range(depth - 1))))
        before = width
    return nn.Sequential(*stages)


def _normed_average(width: int) -> nn.Module:
    """(N, width, H, W) -> (N, width)."""
    return nn.Sequential(OrderedDict(average=SelectAdaptivePool2d(flatten=True), norm=nn.BatchNorm1d(width)))


def _resnet20(num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> Network:
    stem = _small_stem(in_chans, 16, act=nn.ReLU())
    stages = _stages(DoubleShortcutBlock, (16, 32, 64), (3, 3, 3), Subsample)
    return _he_normal(
        Network(stem, stages, _normed_average(64), 64, num_classes, drop_rate, _info((16, 32, 64), (1, 2, 4))), "fan_in"
    )


def _resnet18(num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> Network:
    stem = _small_stem(in_chans, 64)
    stages = _stages(SingleShortcutBlock, _WIDTHS, (2, 2, 2, 2), _strided_1x1)
    info = _info(_WIDTHS, (1, 2, 4, 8))
    return Network(stem, stages, _normed_average(512), 512, num_classes, drop_rate, info, {_SHORTCUTS: True})


def _imagenet_resnet(
    depths: Sequence[int], num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0
) -> Network:
    stem, stages = _large_stem(in_chans, 64), _stages(DoubleShortcutBlock, _WIDTHS, depths, _strided_1x1)
    info = _info(_WIDTHS, (4, 8, 16, 32))
    network = Network(stem, stages, _normed_average(512), 512, num_classes, drop_rate, info, {_SHORTCUTS: False})
    return _he_normal(network, "fan_in")


def _vgg_small(
    num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, img_size: int | tuple[int, int] = 32
) -> Network:
    height, width = to_2tuple(img_size)
    layers = ((128, 128, True), (128, 256, False), (256, 256, True), (256, 512, False), (512, 512, True))
    stem, stages = (
        _small_stem(in_chans, 128, act=nn.PReLU(128)),
        nn.Sequential(*(_vgg_stage(*layer) for layer in layers)),
    )
    features = 512 * (height // 8) * (width // 8)
    info = _info([after for _, after, _ in layers], (2, 2, 4, 4, 8))
    return _he_normal(Network(stem, stages, nn.Flatten(), features, num_classes, drop_rate, info), "fan_out")


def _vgg_stage(before: int, after: int, pool: bool) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=_conv3x3(before, after))
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(OrderedDict(**layers, bn=nn.BatchNorm2d(after), act=nn.PReLU(after)))


def _info(widths: Sequence[int], reductions: Sequence[int]) -> list[dict[str, Any]]:
    """timm's `feature_info` of stages with so many channels, at that share of the image's resolution."""
    stages = zip(widths, reductions, strict=True)
    return [{"num_chs": width, "reduction": by, "module": f"stages.{i}"} for i, (width, by) in enumerate(stages)]


def _he_normal(network: Network, mode: Literal["fan_in", "fan_out"]) -> Network:
    """Draw the convolutions as the authors do (those of CIFAR's ResNet-18 stay as torch draws them)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode)
    return network


def _cfg(**differences: Any) -> dict[str, Any]:
    """ImageNet's, but for the differences; no place to get weights from."""
    usual = {"input_size": (3, 224, 224), "num_classes": 1000, "crop_pct": 0.875, "interpolation": "bilinear"}
    paper = {"paper_ids": "arXiv:2102.07981", "paper_name": "SiMaN: Sign-to-Magnitude Network Binarization"}
    return {**usual, "first_conv": "stem.conv", "classifier": "fc", **paper, **differences}


_CIFAR = {
    "input_size": (3, 32, 32), "num_classes": 10, "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {
        "siman_resnet20": _cfg(**_CIFAR),
        "siman_resnet18": _cfg(**_CIFAR),
        "siman_vgg_small": _cfg(**_CIFAR, fixed_input_size=True),
        "siman_resnet18_imagenet": _cfg(),
        "siman_resnet34_imagenet": _cfg(),
    }
)


_register: Callable[[Entry], Entry] = register_model  # with types


def _build(build: Entry, name: str, pretrained: bool, **kwargs: Any) -> Network:
    network: Network = build_model_with_cfg(build, name, pretrained, **kwargs)
    return network


@_register
def siman_resnet20(pretrained: bool = False, **kwargs: Any) -> Network:
    """CIFAR's ResNet-20: 0.27 M parameters, 40.6 M multiply-accumulates."""
    return _build(_resnet20, "siman_resnet20", pretrained, **kwargs)


@_register
def siman_resnet18(pretrained: bool = False, **kwargs: Any) -> Network:
    """CIFAR's ResNet-18: 11.2 M parameters, 555 M multiply-accumulates."""
    return _build(_resnet18, "siman_resnet18", pretrained, **kwargs)


@_register
def siman_vgg_small(pretrained: bool = False, **kwargs: Any) -> Network:
    """CIFAR's small VGG: 4.7 M parameters, 608 M multiply-accumulates."""
    return _build(_vgg_small, "siman_vgg_small", pretrained, **kwargs)


@_register
def siman_resnet18_imagenet(pretrained: bool = False, **kwargs: Any) -> Network:
    """ImageNet's ResNet-18: 11.7 M parameters, 1.81 G multiply-accumulates."""
    return _build(_imagenet_resnet, "siman_resnet18_imagenet", pretrained, depths=(2, 2, 2, 2), **kwargs)


@_register
def siman_resnet34_imagenet(pretrained: bool = False, **kwargs: Any) -> Network:
    """ImageNet's ResNet-34: 21.8 M parameters, 3.66 G multiply-accumulates."""
    return _build(_imagenet_resnet, "siman_resnet34_imagenet", pretrained, depths=(3, 4, 6, 3), **kwargs)
