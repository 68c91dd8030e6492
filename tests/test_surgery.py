"""Surgery swaps what the plan says and nothing else, and refuses a plan of another model before touching anything."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from siman_convert.errors import InputError
from siman_convert.layers import SiMaNConv2d
from siman_convert.plans import ConvDecision, Plan, make_plan
from siman_convert.surgery import apply_plan, binary_layers


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.Conv2d(6, 4, 1))


def test_swaps_exactly_the_plan() -> None:
    model = timm.create_model("resnet18")
    before = dict(model.named_modules())
    plan = make_plan(model)
    assert apply_plan(model, plan, init="copy") is model
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert list(binary_layers(model)) == plan.binarized
    assert [name for name in after if after[name] is not before[name]] == plan.binarized
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("init", ["remap", "copy", "scratch"])
@pytest.mark.parametrize("selection", ["half", "analytic", "sign"])
def test_layer_options(init: str, selection: str) -> None:
    model = net()
    weight = model[2].weight.detach().clone()
    apply_plan(model, make_plan(model, input_size=(3, 16, 16)), init=init, selection=selection)
    assert isinstance(model[2], SiMaNConv2d)
    assert model[2].selection == selection
    assert torch.equal(model[2].weight, weight) == (init == "copy" or (init, selection) == ("remap", "sign"))


def scratch(seed: int, keep: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    torch.rand(seed)  # what else was drawn before does not matter
    return apply_plan(model, make_plan(model, keep=keep), init="scratch", seed=seed)


def test_scratch_depends_on_the_seed_and_the_layers_name() -> None:
    first, again, other = scratch(1).state_dict(), scratch(1).state_dict(), scratch(2).state_dict()
    layers = binary_layers(scratch(1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    fresh = {f"{name}.{part}" for name in layers for part in ("weight", "alpha")}
    assert {key for key in first if not torch.equal(first[key], other[key])} == fresh
    kept = scratch(1, keep=(next(iter(layers)),))
    assert list(binary_layers(kept)) == list(layers)[1:]
    assert all(torch.equal(layer.weight, layers[name].weight) for name, layer in binary_layers(kept).items())
    draws = {round(layer.weight[0, 0, 0, 0].item() * layer.weight[0].numel() ** 0.5, 5) for layer in layers.values()}
    assert len(draws) == len(layers) > 1  # the same generator for all would start alike


def test_dtype_training_and_requires_grad_stay() -> None:
    model = net().double().train()
    model[2].eval()
    model[2].requires_grad_(False)
    apply_plan(model, make_plan(model, input_size=(3, 16, 16)))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [m.training for m in model] == [True, True, False, True]
    assert [all(p.requires_grad for p in m.parameters()) for m in (model[0], model[2], model[3])] == [True, False, True]


def test_module_under_two_names_stays_one_module() -> None:
    model = net()
    model.append(nn.Conv2d(4, 4, 1))
    model.append(model[4])
    apply_plan(model, make_plan(model, input_size=(3, 16, 16)))
    assert model[4] is model[5]
    assert isinstance(model[5], SiMaNConv2d)


def test_model_that_is_one_convolution() -> None:
    conv = nn.Conv2d(8, 8, 3)
    plan = make_plan(conv, input_size=(8, 8, 8), binarize=["*"])
    assert isinstance(apply_plan(conv, plan), SiMaNConv2d)


def altered(plan: Plan, **changes: object) -> Plan:
    def change(decision: ConvDecision) -> ConvDecision:
        return dataclasses.replace(decision, **changes) if decision.name == "3" else decision  # type: ignore[arg-type]

    return dataclasses.replace(plan, decisions=tuple(map(change, plan.decisions)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "9.conv"}, "the plan binarizes 9.conv, which the model does not have"),
        ({"name": "1"}, "the plan binarizes 1, which is a ReLU in the model"),
        ({"out_channels": 5}, "3: the plan has out_channels 5, the model 4"),
        ({"kernel_size": (3, 3)}, r"3: the plan has kernel_size \(3, 3\), the model \(1, 1\)"),
        ({"bias": False}, "3: plan and model do not agree on whether it has a bias"),
    ],
)
def test_plan_of_another_model(changes: dict[str, object], message: str) -> None:
    model = net()
    plan = altered(make_plan(model, input_size=(3, 16, 16)), **changes)
    with pytest.raises(InputError, match=message):
        apply_plan(model, plan)
    assert binary_layers(model) == {}


def test_second_surgery_is_refused() -> None:
    model = net()
    plan = make_plan(model, input_size=(3, 16, 16))
    apply_plan(model, plan)
    with pytest.raises(InputError, match="the plan binarizes 2, which is binary already"):
        apply_plan(model, plan)
    assert make_plan(model, input_size=(3, 16, 16)).binarized == []


def test_kept_convolutions_may_change() -> None:
    """The head is replaced for other classes after planning; that is no mismatch."""
    model = timm.create_model("dla34")
    plan = make_plan(model)
    model.reset_classifier(7)
    apply_plan(model, plan, init="copy")
    assert isinstance(model.get_classifier(), nn.Conv2d)
    assert list(binary_layers(model)) == plan.binarized
