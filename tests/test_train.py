"""Parts of the training loop that the end-to-end runs cannot show one by one."""

import math

import pytest
import torch
from torch import nn

from siman_convert.calibrate import estimate_batch_norm, fit_scales
from siman_convert.data import BadRecord, Batch
from siman_convert.errors import InputError
from siman_convert.layers import SiMaNConv2d
from siman_convert.metrics import evaluate_model
from siman_convert.recipe import Recipe, load_recipe
from siman_convert.schedule import make_optimizer, make_schedule, parameter_groups
from siman_convert.train import _trainable_batches
from siman_convert.watch import Meter

CPU = torch.device("cpu")


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), SiMaNConv2d(8, 8, 3, bias=True), nn.BatchNorm2d(8),
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def test_weight_decay_spares_every_parameter_of_binary_layers() -> None:
    model = small_net()
    model(torch.randn(2, 3, 8, 8))
    decayed, spared = parameter_groups(model, 5e-4)
    assert {id(p) for p in spared["params"]} == {id(p) for p in model[2].parameters()}
    assert len(spared["params"]) == 3  # weight, alpha, bias
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    assert len(decayed["params"]) + 3 == len(list(model.parameters()))


def test_latents_decay_where_that_is_asked_for_and_nothing_else_of_their_layer() -> None:
    model = small_net()
    model(torch.randn(2, 3, 8, 8))
    _, spared, latents = parameter_groups(model, 5e-4, 1e-2)
    assert [id(p) for p in latents["params"]] == [id(model[2].weight)]
    assert {id(p) for p in spared["params"]} == {id(model[2].alpha), id(model[2].bias)}
    assert latents["weight_decay"] == 1e-2
    optimizer = make_optimizer(model, load_recipe("with-l2"), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0, 1e-2]


def test_frozen_parameters_have_no_optimizer() -> None:
    model = small_net()
    model(torch.randn(2, 3, 8, 8))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, 1e-4)
    assert all(p is not model[0].weight for group in groups for p in group["params"])


@pytest.mark.parametrize(("opt", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(opt: str, kind: type) -> None:
    optimizer = make_optimizer(SiMaNConv2d(4, 4, 3), Recipe(opt=opt, momentum=0.8), lr=0.3)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.3
    if opt == "sgd":
        assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"], optimizer.defaults["dampening"]) == (
            0.8,
            False,
            0,
        )


def rates(recipe: Recipe, epochs: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, epochs, steps)
    found = []
    for update in range(epochs * steps):
        if recipe.sched_on_updates:
            schedule.step_update(update)
        else:
            schedule.step(update // steps)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_cosine_falls_at_every_update() -> None:
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]
    assert rates(Recipe(lr=0.1, warmup_epochs=0), 4, 3) == pytest.approx(expected)


def test_the_cosine_by_epoch_after_a_warm_up() -> None:
    recipe = Recipe(lr=0.1, warmup_epochs=2, warmup_lr=0.02, sched_on_updates=False)
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    expected = [rate for rate in [0.02, 0.06, *cosine] for _ in range(2)]
    assert rates(recipe, 6, 2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("images", "batch", "world", "batches"),
    [
        (10, 5, 1, 2),
        (11, 5, 1, 2),
        (12, 5, 1, 3),
        (1, 5, 1, 1),
        (3, 1, 1, 3),
        (22, 5, 2, 2),
        (21, 5, 2, 2),
        (23, 5, 2, 3),
    ],
)
def test_a_last_batch_of_one_image_is_left_out(images: int, batch: int, world: int, batches: int) -> None:
    assert _trainable_batches(images, batch, world) == batches


def test_the_meter_names_the_step_that_is_not_finite() -> None:
    sums = {"loss": 0.0, "correct": 0.0, "images": 0.0, "steps": 0.0, "seconds": 0.0}
    meter = Meter(sums)
    logits, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    meter.add(torch.tensor(1.0), logits, targets, new_step=True)
    meter.add(torch.tensor(0.5), logits, targets, new_step=False)  # a second micro-batch of the same step
    assert meter.flush() is None
    assert (meter.loss, meter.top1, sums["images"], sums["steps"]) == (1.5, 50.0, 4.0, 1.0)
    for loss in (1.0, 2.0, math.nan, 1.0):
        meter.add(torch.tensor(loss), logits, targets, new_step=True)
    assert meter.flush() == 3  # steps are counted from 0


class Fixed(nn.Module):
    """Gives the logits it was handed as images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_metrics_against_hand_counts() -> None:
    logits = torch.eye(7)[[0, 1, 2, 3]] * 5 - torch.arange(7) * 0.01
    targets = torch.tensor([0, 1, 6, 5])  # right, right, 7th of 7, 6th of 7
    batches = [Batch(logits[:3], targets[:3], ()), Batch(logits[3:], targets[3:], (BadRecord("x.png", "broken"),))]
    metrics = evaluate_model(Fixed(), batches, CPU)
    assert (metrics.top1, metrics.images, metrics.bad) == (50.0, 4, (BadRecord("x.png", "broken"),))
    assert metrics.top5 == 50.0
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits.double(), targets).item())


def test_top5_of_fewer_than_five_classes_takes_all() -> None:
    metrics = evaluate_model(Fixed(), [Batch(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), ())], CPU)
    assert (metrics.top1, metrics.top5) == (0.0, 100.0)


def test_evaluation_keeps_the_training_flag_and_needs_images() -> None:
    model = Fixed().train()
    evaluate_model(model, [Batch(torch.zeros(1, 2), torch.tensor([0]), ())], CPU)
    assert model.training
    with pytest.raises(InputError, match="not one validation image could be read"):
        evaluate_model(model, [], CPU)


def test_fit_scales_is_least_squares() -> None:
    torch.manual_seed(3)
    float_net = nn.Sequential(nn.Conv2d(6, 5, 3, bias=True))
    binary = nn.Sequential(SiMaNConv2d.from_float(float_net[0]))
    images = torch.randn(8, 6, 9, 9)
    fit_scales(float_net, binary, [images[:5], images[5:]])
    y = float_net(images).transpose(0, 1).flatten(1)
    o = binary[0].eval().unscaled(images).transpose(0, 1).flatten(1)
    for k in range(5):
        design = torch.stack([o[k], torch.ones_like(o[k])], dim=1).double()
        slope, offset = torch.linalg.lstsq(design, y[k].detach().double()[:, None]).solution[:, 0].tolist()
        assert binary[0].alpha[k].item() == pytest.approx(slope, rel=1e-4)
        assert binary[0].bias[k].item() == pytest.approx(offset, abs=1e-5)


def test_fit_scales_leaves_no_scale_near_zero() -> None:
    """Two channels whose bits say next to nothing of the output: of the fits a tenth of the median is the least."""
    torch.manual_seed(3)
    float_net = nn.Sequential(nn.Conv2d(6, 8, 3, bias=True))
    binary = nn.Sequential(SiMaNConv2d.from_float(float_net[0]))
    with torch.no_grad():
        binary[0].weight[:2] = torch.randn(2, 6, 3, 3)
    images = torch.randn(16, 6, 9, 9)
    y = float_net(images).transpose(0, 1).flatten(1).detach().double()
    o = binary[0].eval().unscaled(images).transpose(0, 1).flatten(1).double()
    centred_o = o - o.mean(dim=1, keepdim=True)
    fits = (centred_o * y).mean(dim=1) / centred_o.square().mean(dim=1)
    floor = 0.1 * fits[fits > 0].median()
    assert ((fits > 0) & (fits < floor)).any()
    before = binary[0].alpha.detach().double()
    fit_scales(float_net, binary, [images])
    expected = torch.where(fits > 0, fits, before).clamp_min(floor)
    assert torch.allclose(binary[0].alpha.double(), expected, rtol=1e-4)
    assert torch.allclose(binary[0].bias.double(), y.mean(dim=1) - expected * o.mean(dim=1), atol=1e-5)


def test_fit_scales_leaves_a_dead_channel_alone() -> None:
    float_net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False))
    nn.init.zeros_(float_net[0].weight)
    binary = nn.Sequential(SiMaNConv2d.from_float(float_net[0], init="copy"))
    nn.init.constant_(binary[0].alpha, 0.7)
    fit_scales(float_net, binary, [torch.randn(2, 3, 4, 4)])
    assert binary[0].alpha.tolist() == pytest.approx([0.7, 0.7])


def test_batch_norm_statistics_are_the_plain_mean_over_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    nn.init.constant_(model[1].running_mean, 9.0)
    batches = [torch.randn(6, 3, 5, 5) for _ in range(3)]
    estimate_batch_norm(model, batches)
    means = torch.stack([model[0](x).mean(dim=(0, 2, 3)) for x in batches])
    variances = torch.stack([model[0](x).var(dim=(0, 2, 3)) for x in batches])
    assert torch.allclose(model[1].running_mean, means.mean(dim=0), atol=1e-6)
    assert torch.allclose(model[1].running_var, variances.mean(dim=0), atol=1e-5)
    assert not model[1].training
    assert model[1].momentum == 0.1
