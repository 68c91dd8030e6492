"""Stages of the binary training: layers that are binary in part, recipes that list stages, and runs that go through them."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from test_resume import Killed, command, killed_at, outcome, resume, start
from torch import nn
from torch.nn import functional as F

from siman_convert import binarize
from siman_convert.calibrate import fit_scales
from siman_convert.cli import run as run_command
from siman_convert.errors import InputError
from siman_convert.frozen import freeze
from siman_convert.layers import Binarized, SiMaNConv2d
from siman_convert.plans import make_plan
from siman_convert.recipe import build_recipe, load_recipe
from siman_convert.runs import Run
from siman_convert.schedule import Span, parameter_groups
from siman_convert.surgery import apply_plan, binary_layers

ACTIVATIONS_FIRST = (
    "stages=[{binarize: activations, epochs: 1, lr: 0.01, feature_weight: 0.1}, {binarize: all, epochs: 2}]"
)


def conv_and_images() -> tuple[nn.Conv2d, torch.Tensor]:
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2).double()
    return conv, torch.randn(5, 6, 7, 7, dtype=torch.float64)


def surrogate(x: torch.Tensor) -> torch.Tensor:
    """Signs of standardised activations whose gradient is max(0, 2 - 2|a|), spelled out for autograd."""
    mean, var = x.mean(dim=(1, 2, 3), keepdim=True), x.var(dim=(1, 2, 3), keepdim=True)
    a = (x - mean) / torch.sqrt(var + binarize.EPS)
    soft = torch.where(a.abs() < 1, 2 * a - a * a.abs(), a.sign())  # its slope is 2 - 2|a| within 1
    return soft + (torch.where(a >= 0, 1.0, -1.0) - soft).detach()


@pytest.mark.parametrize("training", [True, False])
def test_binary_activations_alone_convolve_signs_with_the_weights_as_they_are(training: bool) -> None:
    conv, x = conv_and_images()
    layer = SiMaNConv2d.from_float(conv, binarizes="activations").train(training)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), conv(surrogate(theirs))
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.weight.grad, conv.weight.grad)
    per_channel = (weights * F.conv2d(surrogate(x), conv.weight, None, 2, 1, 1, 2)).sum(dim=(0, 2, 3))
    torch.testing.assert_close(layer.alpha.grad, per_channel)


@pytest.mark.parametrize("training", [True, False])
def test_binary_weights_alone_convolve_the_activations_as_they_are(training: bool) -> None:
    conv, x = conv_and_images()
    layer = SiMaNConv2d.from_float(conv, binarizes="weights").train(training)
    signs = layer.bits().double() * 2 - 1
    expected = F.conv2d(x, signs * layer.alpha.view(-1, 1, 1, 1), conv.bias, 2, 1, 1, 2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.bits(), SiMaNConv2d.from_float(conv).bits())


@pytest.mark.parametrize("init", ["remap", "copy"])
def test_the_next_stage_starts_from_weights_with_alpha(init: str) -> None:
    conv, x = conv_and_images()
    layer = SiMaNConv2d.from_float(conv, binarizes="activations")
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
        conv.weight.mul_(layer.alpha.view(-1, 1, 1, 1))
    layer.binarize_all_(init)  # type: ignore[arg-type]
    expected = SiMaNConv2d.from_float(conv, init)  # type: ignore[arg-type]
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    assert torch.equal(layer.eval()(x), expected.eval()(x))


def test_binary_weights_keep_latents_and_alpha_when_activations_follow() -> None:
    conv, _ = conv_and_images()
    layer = SiMaNConv2d.from_float(conv, binarizes="weights")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.binarize_all_()
    assert layer.binarizes == "all"
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("binarizes", ["activations", "weights"])
def test_what_is_binary_in_part_cannot_be_packed(binarizes: Binarized) -> None:
    conv, _ = conv_and_images()
    model = nn.Sequential(SiMaNConv2d.from_float(conv.float(), binarizes=binarizes))
    with pytest.raises(InputError, match=f"0 binarizes {binarizes} alone"):
        freeze(model)


def test_an_unknown_kind_of_layer() -> None:
    with pytest.raises(InputError, match="unknown kind of layer 'signs'; known: activations, weights, all"):
        SiMaNConv2d(4, 4, 3, binarizes="signs")  # type: ignore[arg-type]


def test_weights_without_bits_are_neither_clipped_nor_spared_from_weight_decay() -> None:
    conv, _ = conv_and_images()
    layer = SiMaNConv2d.from_float(conv, binarizes="activations")
    before = layer.weight.clone()
    layer.clip_weights_(15.0)
    assert torch.equal(layer.weight, before)
    decayed, spared = parameter_groups(nn.Sequential(layer), 1e-5)
    assert [id(p) for p in decayed["params"]] == [id(layer.weight)]
    assert {id(p) for p in spared["params"]} == {id(layer.alpha), id(layer.bias)}


def test_stages_inherit_what_they_do_not_state() -> None:
    stages = [
        {"binarize": "activations", "epochs": 3, "lr": 0.5},
        {"binarize": "all"},
        {"binarize": "all", "opt": "adamw"},
    ]
    recipe = build_recipe({"epochs": 5, "lr": 0.1, "stages": stages}, "here")
    spans = [Span.binary(recipe, index) for index in range(3)]
    assert [(s.name, s.epochs, s.lr, s.recipe.opt) for s in spans] == [
        ("activations", 3, 0.5, "sgd"),
        ("binary", 5, 0.1, "sgd"),
        ("binary", 5, 0.1, "adamw"),
    ]
    assert [(s.before, s.total, s.clipped_before, s.clipped) for s in spans] == [
        (0, 13, 0, 10),
        (3, 13, 0, 10),
        (8, 13, 5, 10),
    ]


def test_stages_of_no_epochs_are_left_out_but_for_the_last() -> None:
    recipe = load_recipe("two-step", {"epochs": 0})
    assert [stage.binarize for stage in recipe.resolved_stages] == ["all"]
    assert recipe.binary_epochs == 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"binarize": "activations"}], "stages binarize activations; expected"),
        ([{"binarize": "all"}, {"binarize": "weights"}], "stages binarize all, weights; expected"),
        ([{"binarize": "weights"}, {"binarize": "activations"}, {"binarize": "all"}], "weights, activations, all; expected"),
        ([{"binarize": "bits"}], r"stages\.0\.binarize: .*'activations', 'weights' or 'all', got 'bits'"),
        ([{"binarize": "all", "batch_size": 3}], r"stages\.0\.batch_size: .*not permitted"),
        ([{"binarize": "activations", "warmup_epochs": 2}, {"binarize": "all"}], "stage 1 of stages: warmup_epochs 2 leave"),
        ([{"binarize": "all", "label_weight": 0}], "stage 1 of stages: label_weight and distill_weight are both 0"),
    ],
)  # fmt: skip
def test_bad_stages_are_one_line(stages: list[dict[str, object]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_recipe({"epochs": 2, "stages": stages}, "here")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def staged(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("staged")
    start(command(output, digits, "--set", ACTIVATIONS_FIRST))
    return Run(output / "run")


def test_a_run_goes_through_its_stages(staged: Run, capsys: pytest.CaptureFixture[str]) -> None:
    phases = [(record["phase"], record["epoch"]) for record in staged.metrics()]
    assert phases == [
        ("full-precision", 1), ("activations", 0), ("activations", 1),
        ("binary", 1), ("binary", 2), ("binary", 3), ("binary", 3),
    ]  # fmt: skip
    assert staged.progress().finished(staged.recipe())
    rates = [record["lr"] for record in staged.metrics() if "lr" in record]
    assert rates[1] < 0.01  # of its own, fallen along the cosine
    assert run_command(["runs", "--output", str(staged.folder.parent)]) == 0
    assert "  done  " in capsys.readouterr().out


def test_a_stage_of_binary_activations_and_no_epoch_of_binary_weights(digits: Path, tmp_path: Path) -> None:
    """Nothing to spread the clip over; the conversion of the weights is post-training."""
    stages = "stages=[{binarize: activations, epochs: 1}, {binarize: all, epochs: 0}]"
    start(command(tmp_path, digits, "--fp-epochs", "0", "--set", stages))
    run = Run(tmp_path / "run")
    phases = [(record["phase"], record["epoch"]) for record in run.metrics()]
    assert phases == [("activations", 0), ("activations", 1), ("binary", 1), ("binary", 1)]
    assert run.progress().finished(run.recipe())


@pytest.mark.slow
@pytest.mark.parametrize("step", [13, 23])  # of 10 an epoch: within the activations' epoch, and within the binary ones
def test_a_run_killed_within_a_stage_resumes_to_the_same_bits(
    step: int,
    digits: Path,
    tmp_path: Path,
    staged: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "siman_convert.train.Phase._step", step)
        start(command(tmp_path, digits, "--set", ACTIVATIONS_FIRST, "--save-every", "0"))
    run = Run(tmp_path / "run")
    if step == 13:
        assert run.progress().phase == "activations"
        assert run_command(["eval", str(run.folder)]) == 2
        assert "has no best weights: resume it with" in capsys.readouterr().err
    resume(run)
    assert outcome(run) == outcome(staged)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["siman_convert.conversion._next_stage", "siman_convert.train.Phase.conclude"])
def test_a_run_killed_between_stages_resumes_to_the_same_bits(
    place: str, digits: Path, tmp_path: Path, staged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, place, 4 if place.endswith("conclude") else 1)
        start(command(tmp_path, digits, "--set", ACTIVATIONS_FIRST))
    run = Run(tmp_path / "run")
    assert (run.progress().phase, run.progress().epoch) == ("activations", 1)
    resume(run)
    assert outcome(run) == outcome(staged)


def test_alpha_of_the_next_stage_is_fitted_to_the_layers_of_the_stage_before() -> None:
    """Within the units of a topology as well: what is fitted is the convolution's output, not its BatchNorm's."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    plan = make_plan(model, shortcuts=True, prelu=True, shifts=True)
    before = apply_plan(model, plan, binarizes="activations")
    after = copy.deepcopy(before)
    for layer in binary_layers(after).values():
        layer.binarize_all_()
    images = torch.randn(4, 3, 64, 64)
    fit_scales(before, after, [images])
    name, layer = next((name, layer) for name, layer in binary_layers(after).items() if "conv2" in name)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    binary_layers(before)[name].register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    before(images)
    ((x, y),) = seen
    o, y = (t.detach().double().transpose(0, 1).flatten(1) for t in (layer.unscaled(x), y))
    o, y = o - o.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    expected = (o * y).sum(dim=1) / (o * o).sum(dim=1)
    fitted = expected > 0.2 * expected[expected > 0].median()
    assert fitted.sum() > 2
    torch.testing.assert_close(layer.alpha.detach().double()[fitted], expected[fitted], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_staged_run_with_shortcuts_and_shifts_is_exported(digits: Path, tmp_path: Path) -> None:
    stages = "stages=[{binarize: weights}, {binarize: all}]"
    flags = ["--set", stages, "--epochs", "1", "--shortcuts", "--prelu", "--shifts", "--set", "img_size=32"]
    start(command(tmp_path, digits, *flags))
    run = Run(tmp_path / "run")
    assert [record["phase"] for record in run.metrics()].count("weights") == 2
    assert run_command(["export", str(run.folder), "--format", "onnx"]) == 0
