"""Every Conv2d gets the right decision with the right reason: one small module for each rule, then real families."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.errors import InputError
from siman_convert.plans import ConvDecision, Plan, at_size, make_plan, native_input_size

SHORTCUT, STEM, GATE = "1x1 residual shortcut", "stem: reads the image", "input map is 1x1"


def reasons(model: nn.Module, size: tuple[int, int, int] | None = (3, 32, 32), **globs: Any) -> dict[str, str]:
    """Name -> why it is kept, "" for the binarized."""
    plan = make_plan(model, input_size=size, **globs)
    return {d.name: "" if d.binarize else d.reason for d in plan.decisions}


def behind_stem(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers)


# One rule each; the convolution in question is "1".


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(8, 8, 3)], ""),
        ([nn.Conv2d(8, 4, 1, groups=4)], ""),
        ([nn.Conv2d(8, 8, 3, padding="same")], ""),
        ([nn.Conv2d(8, 8, (1, 3), stride=(1, 2), dilation=2, bias=False)], ""),
        ([nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 3)], ""),
        ([nn.Conv2d(8, 8, 5, groups=8)], "depthwise: 25 taps a filter"),
        ([nn.Conv2d(8, 16, 1, groups=8)], "depthwise: 1 tap a filter"),
        ([nn.Conv2d(8, 8, 32)], "32x32 kernel covers its 32x32 input"),
        ([nn.Conv2d(8, 8, 17, dilation=2, padding=3)], "17x17 kernel covers its 32x32 input"),
        ([nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")], "its padding is 'reflect'; only zeros are supported"),
        ([nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))], "its weight is parametrized, which is not supported yet"),
        ([timm.layers.Conv2dSame(8, 8, 3)], ""),
        ([timm.layers.StdConv2d(8, 8, 3)], ""),
        ([timm.layers.ScaledStdConv2dSame(8, 8, 3)], ""),
    ],
)  # fmt: skip
def test_rule(layers: list[nn.Module], reason: str) -> None:
    found = reasons(behind_stem(*layers))
    assert found["0"] == STEM
    assert found["1"] == reason
    if len(layers) == 2:  # three input channels: like an image, wherever it lies
        assert found["2"] == "3 input channels, like an image"


def test_reason_of_a_binarized_convolution() -> None:
    plan = make_plan(behind_stem(nn.Conv2d(8, 8, 3, groups=2)), input_size=(3, 32, 32))
    assert plan.decisions[1] == ConvDecision(
        "1", True, "36 taps a filter", 8, 8, (3, 3), (1, 1), (0, 0), (1, 1), 2, True, (8, 32, 32), (8, 30, 30), 1
    )


def test_gate_on_a_1x1_map() -> None:
    assert reasons(behind_stem(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1)))["2"] == GATE


def test_a_map_of_1x1_in_one_of_two_calls_is_no_gate() -> None:
    conv = nn.Conv2d(8, 8, 1)
    assert reasons(behind_stem(conv, nn.AdaptiveAvgPool2d(1), conv))["1"] == ""


def sized(native: int, *layers: nn.Module) -> nn.Sequential:
    """A network that says which size it was made for."""
    model = behind_stem(*layers)
    model.pretrained_cfg = {"input_size": (3, native, native)}
    return model


@pytest.mark.parametrize(
    ("native", "given", "conv", "pool", "shape", "reason"),
    [
        (64, 16, nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(16), (8, 1, 1), ""),  # 1x1 for these small images alone
        (
            64,
            16,
            nn.Conv2d(8, 8, 3, padding=1),
            nn.AvgPool2d(8),
            (8, 2, 2),
            "",
        ),  # likewise, a kernel as large as the map
        (16, 64, nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(16), (8, 4, 4), ""),  # 1x1 for smaller images than these
        (16, 64, nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(8), (8, 8, 8), ""),
        (16, 20, nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(16), (8, 1, 1), GATE),
        (64, 16, nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), (8, 1, 1), GATE),
        (16, 64, nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), (8, 1, 1), GATE),
        (32, 16, nn.Conv2d(8, 8, 7), nn.AdaptiveAvgPool2d(7), (8, 7, 7), "7x7 kernel covers its 7x7 input"),
    ],
)
def test_a_1x1_map_is_one_at_both_sizes(
    native: int, given: int, conv: nn.Conv2d, pool: nn.Module, shape: tuple[int, int, int], reason: str
) -> None:
    model = sized(native, pool, conv)
    assert reasons(model, (3, given, given))["2"] == reason
    assert make_plan(model, input_size=(3, given, given)).decisions[1].input_shape == shape
    of_native = reasons(model, None)["2"]
    assert (of_native == "") == (reason == "" and native > given)


def test_a_network_that_says_no_size_or_a_wrong_one_is_judged_at_the_given_one() -> None:
    layers = nn.AvgPool2d(16), nn.Conv2d(8, 8, 3, padding=1)
    assert reasons(behind_stem(*layers), (3, 16, 16))["2"] == GATE
    assert reasons(sized(8, *layers), (3, 16, 16))["2"] == GATE  # 8x8 leave AvgPool2d(16) nothing


def test_a_stored_plan_keeps_its_decisions_at_another_size() -> None:
    model = sized(16, nn.AvgPool2d(4), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1))
    stored, fresh = make_plan(model), make_plan(model, input_size=(3, 64, 64))
    assert [d.binarize for d in stored.decisions] == [False, True, False]
    assert [d.binarize for d in fresh.decisions] == [False, True, True]
    seen = at_size(stored, model, (3, 64, 64))
    assert [(d.binarize, d.reason) for d in seen.decisions] == [(d.binarize, d.reason) for d in stored.decisions]
    assert (seen.input_size, [d.output_shape for d in seen.decisions]) == (
        fresh.input_size,
        [d.output_shape for d in fresh.decisions],
    )
    assert at_size(seen, model, (3, 16, 16)) == stored
    assert at_size(stored, model, (3, 16, 16)) is stored


def test_one_input_channel() -> None:
    assert reasons(behind_stem(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 3)))["2"] == "one input channel: 9 taps a filter"


def test_stem_after_a_fixed_transform_and_after_a_linear_layer() -> None:
    assert reasons(nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3)))["1"] == STEM
    assert reasons(nn.Sequential(nn.Linear(32, 32), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))["2"] == ""
    twice = nn.Sequential(nn.Conv2d(12, 8, 3), nn.Conv2d(8, 8, 3))
    assert reasons(twice, (12, 32, 32)) == {"0": STEM, "1": ""}


class Holder(nn.Module):
    """A convolution that is used in the way `use` says."""

    def __init__(self, use: Callable[["Holder", Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.stem(x))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: m.conv(x), ""),
        (lambda _, x: x, "never reached by the forward"),
        (lambda m, x: F.conv2d(x, m.conv.weight), "not called itself: another module computes with its weights"),
        (lambda m, x: m.conv(x) * m.conv.weight.mean(), "its weights are also read from outside"),
        (lambda m, x: x + m.conv(torch.ones_like(x[:, :1]).expand(-1, 8, -1, -1).cumsum(2)).mean(), ""),
        (
            lambda m, x: x + m.conv(torch.ones(1, 8, 9, 9, device=x.device)).mean(),
            "its input does not depend on the image",
        ),
    ],
)
def test_convolution_not_used_as_a_module(use: Callable[[Holder, Tensor], Tensor], reason: str) -> None:
    assert reasons(Holder(use))["conv"] == reason


def test_shared_weights_own_forward_and_hooks() -> None:
    model = behind_stem(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[2].weight = model[1].weight
    assert set(list(reasons(model).values())[1:]) == {"it shares its weights with another module"}
    model = behind_stem(nn.Conv2d(8, 8, 3))
    handle = model[1].register_forward_hook(lambda *_: None)
    assert reasons(model)["1"] == "it carries forward hooks"
    handle.remove()
    model[1].forward = lambda x: x
    assert reasons(model)["1"] == "Conv2d convolves in its own way, which is not supported yet"


def test_subclass_that_convolves_like_conv2d_is_binarized() -> None:
    class Named(nn.Conv2d):
        pass

    assert reasons(behind_stem(Named(8, 8, 3)))["1"] == ""


def test_classifier() -> None:
    model = behind_stem(nn.Conv2d(8, 10, 3))
    model.get_classifier = lambda: model[1]
    assert reasons(model)["1"] == "the classifier"


# Globs


def test_keep_beats_binarize_beats_the_rules() -> None:
    model = behind_stem(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    found = reasons(model, keep=["2"], binarize=["[023]"])
    assert found == {"0": "", "1": "", "2": "you asked to keep 2", "3": ""}
    assert (
        make_plan(model, input_size=(3, 32, 32), binarize=["[03]"]).decisions[3].reason == "you asked to binarize [03]"
    )


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ({"keep": ["layer2"]}, "--keep layer2: no convolution has such a name; did you mean layer2.*?"),
        ({"binarize": ["layer2.0.conv9"]}, "--binarize layer2.0.conv9: no convolution has such a name; did you mean layer2.0"),
    ],
)  # fmt: skip
def test_glob_without_a_match(globs: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make_plan(timm.create_model("resnet18"), **globs)


class Halved(nn.Conv2d):
    """A convolution of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Halved(8, 8, 3), "Halved convolves in its own way, which is not supported yet"),
        (nn.Conv2d(8, 8, 1, groups=8), "a filter has one weight"),
        (nn.Sequential(nn.Conv2d(8, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 3, padding=1)), "a single number"),
    ],
)
def test_binarizing_the_impossible(layer: nn.Module, why: str) -> None:
    model = behind_stem(layer)
    with pytest.raises(InputError, match=f"cannot be binarized: .*{why}"):
        make_plan(model, input_size=(3, 32, 32), binarize=["1*"])


# Real families: exactly which convolutions are kept, and why.


def kept(name: str) -> dict[str, str]:
    with torch.device("meta"):
        model = timm.create_model(name)
    return {path: reason for path, reason in reasons(model, None).items() if reason}


def shortcuts(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, SHORTCUT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"conv1": STEM, **shortcuts(*(f"layer{i}.0.downsample.0" for i in (2, 3, 4)))}),
        ("resnet50", {"conv1": STEM, **shortcuts(*(f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)))}),
        ("resnet50d", {"conv1.0": STEM, **shortcuts(*(f"layer{i}.0.downsample.1" for i in (1, 2, 3, 4)))}),
        ("regnetx_002", {"stem.conv": STEM, **shortcuts(*(f"s{i}.b1.downsample.conv" for i in (1, 2, 3, 4)))}),
        (
            "dla34",
            {"base_layer.0": STEM, "fc": "the classifier",
             **shortcuts("level2.project.0", "level3.tree1.project.0", "level4.tree1.project.0", "level5.project.0")},
        ),
        (
            "hrnet_w18_small",
            {"conv1": STEM, **shortcuts("layer1.0.downsample.0", *(f"incre_modules.{i}.0.downsample.0" for i in range(4)))},
        ),
        ("repvgg_a0", {"stem.conv_1x1.conv": STEM, "stem.conv_kxk.conv": STEM}),
        ("densenet121", {"features.conv0": STEM}),
        ("vgg11_bn", {"features.0": STEM, "pre_logits.fc1": "7x7 kernel covers its 7x7 input", "pre_logits.fc2": GATE}),
        ("vit_tiny_patch16_224", {"patch_embed.proj": STEM}),
    ],
)  # fmt: skip
def test_family_exactly(name: str, expected: dict[str, str]) -> None:
    assert kept(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnetv2_50x1_bit",
            {STEM: 1, SHORTCUT: 4, "the classifier": 1},
        ),
        (
            "efficientnet_cc_b0_4e",
            {STEM: 1, GATE: 32, "CondConv2d mixes another weight for every image": 16,
             "depthwise: 9 taps a filter": 7, "depthwise: 25 taps a filter": 9},
        ),
        ("legacy_xception", {STEM: 1, SHORTCUT: 4, "depthwise: 9 taps a filter": 34}),
        ("coatnet_nano_rw_224", {STEM: 1, SHORTCUT: 3, "depthwise: 9 taps a filter": 7, GATE: 14}),
        ("ghostnet_100", {STEM: 1, SHORTCUT: 5}),
        ("mobilenetv3_small_100", {STEM: 1, GATE: 19, "depthwise: 9 taps a filter": 3, "depthwise: 25 taps a filter": 8}),
        ("convnext_atto", {STEM: 1, "depthwise: 49 taps a filter": 12}),
    ],
)  # fmt: skip
def test_family_counts(name: str, expected: dict[str, int]) -> None:
    found = Counter(kept(name).values())
    if name == "ghostnet_100":  # depthwise of several sizes
        found = Counter({reason: count for reason, count in found.items() if reason in (STEM, SHORTCUT)})
    assert found == expected


class Renamed(nn.Module):
    """The blocks of a ResNet with a 1x1 shortcut, every attribute renamed, shortcut first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(8, 16, 1, stride=2, bias=False)  # the shortcut
        self.downsample = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.act, self.q, self.z = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        side = self.q(self.conv2(x))
        main = self.z(self.shortcut(F.relu(self.act(self.downsample(x)))))
        return F.relu(main + side)


def test_names_mean_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Renamed(), Renamed(), Renamed())
    model[3].conv2, model[3].downsample = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
    model[4].conv2, model[4].downsample = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)  # 3x3 shortcuts are binarized
    found = {path for path, reason in reasons(model).items() if reason == SHORTCUT}
    assert found == {"2.conv2", "3.conv2"}


# The model, its size, the JSON form


def test_parametrized_weight_is_not_computed() -> None:
    """Reading a spectrally normalised weight in training mode changes its buffers."""
    model = behind_stem(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, groups=8))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert reasons(model)["1"] == "depthwise: 9 taps a filter"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_model_is_untouched() -> None:
    model = timm.create_model("resnet18").train()
    model.layer1.eval()
    flags = [m.training for m in model.modules()]
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    make_plan(model)
    assert [m.training for m in model.modules()] == flags
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])


def test_native_size() -> None:
    with torch.device("meta"):
        assert native_input_size(timm.create_model("resnet18")) == (3, 224, 224)
        assert native_input_size(timm.create_model("resnet18", in_chans=1)) == (1, 224, 224)
        assert make_plan(timm.create_model("efficientnet_b1")).input_size == (3, 240, 240)
    with pytest.raises(InputError, match="Conv2d does not say its input size"):
        make_plan(nn.Conv2d(3, 8, 3))


def test_plan_goes_through_json() -> None:
    model = behind_stem(nn.Conv2d(8, 8, 3, padding="same"), Holder(lambda _, x: x))
    model[2].stem = nn.Conv2d(8, 8, 1)
    plan = make_plan(model, name="net", input_size=(3, 32, 32))
    assert plan.binarized == ["1", "2.stem"]
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def spoil(path: tuple[str | int, ...], value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("model"), "plan: model: "),
        (spoil(("extra",), 1), "plan: extra: "),
        (spoil(("decisions", 0, "extra"), 1), "plan: decisions.0.extra: "),
        (spoil(("decisions", 1, "binarize"), 1), "plan: decisions.1.binarize: "),
        (spoil(("decisions", 1, "groups"), "1"), "plan: decisions.1.groups: "),
        (spoil(("decisions", 1, "calls"), -1), "plan: decisions.1.calls: "),
        (spoil(("decisions", 1, "kernel_size"), [3]), "plan: decisions.1.kernel_size"),
        (spoil(("decisions", 1, "padding"), "full"), "plan: decisions.1.padding"),
        (spoil(("decisions", 1, "name"), "0"), "plan: '0' has more than one decision"),
        (spoil(("model",), {1}), "plan: not JSON: "),
    ],
)
def test_malformed_plan(change: Callable[[Any], None], message: str) -> None:
    data = make_plan(behind_stem(nn.Conv2d(8, 8, 3)), input_size=(3, 32, 32)).to_dict()
    change(data)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Plan.from_dict(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_plan_that_is_no_object(data: Any) -> None:
    with pytest.raises(InputError, match="plan: document: "):
        Plan.from_dict(data)
