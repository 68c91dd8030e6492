"""The paper's networks: their sizes by hand, their shortcuts, their plans, and that every command takes them."""

import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packed_models as pm
import pytest
import timm
import torch
from exported_run import graphs_once, printed  # noqa: F401  a fixture
from packed_models import one_thread  # noqa: F401  a fixture
from torch import nn

from siman_convert import evaluate, export, networks
from siman_convert.cli import run as siman
from siman_convert.conversion import Options, convert, resume
from siman_convert.costs import plan_costs
from siman_convert.errors import InputError, Interrupted
from siman_convert.exporting import Exported
from siman_convert.model_table import make_row, read_table
from siman_convert.models import create, load_model
from siman_convert.networks import DoubleShortcutBlock, SingleShortcutBlock, Subsample
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_file import read_onnx
from siman_convert.plans import Plan, make_plan
from siman_convert.recipe import Recipe, load_recipe
from siman_convert.runs import Run
from siman_convert.schedule import make_schedule
from siman_convert.watch import Watcher

NAMES = sorted(networks.__all__)
STEM = "stem: reads the image"
FULL, BINARY = "full precision by the network's design", "binary by the network's design"


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, None, **kwargs)


def plan_of(name: str) -> Plan:
    return make_plan(on_meta(name), name=name)


# Sizes. A 3x3 convolution of c channels onto d has 9*c*d weights, each used once for every output position.


def blocks(widths: tuple[int, ...], depths: tuple[int, ...]) -> list[int]:
    """Weights of the 3x3 convolutions of each stage, whose first reads the stage before."""
    before, found = widths[0], []
    for width, depth in zip(widths, depths, strict=True):
        found.append(9 * before * width + 9 * width * width * (2 * depth - 1))
        before = width
    return found


def of_resnet20() -> tuple[int, int]:
    """Parameters and multiply-accumulates. Of each channel, a BatchNorm has 2 parameters and a PReLU one."""
    stem, stages = 9 * 3 * 16, blocks((16, 32, 64), (3, 3, 3))
    behind = 2 * 16 + 6 * 3 * (16 + 32 + 64)
    macs = (stem + stages[0]) * 32**2 + stages[1] * 16**2 + stages[2] * 8**2 + 64 * 10
    return stem + sum(stages) + behind + 2 * 64 + (64 + 1) * 10, macs


def of_resnet18() -> tuple[int, int]:
    widths = (64, 128, 256, 512)
    stem, stages, sides = 9 * 3 * 64, blocks(widths, (2, 2, 2, 2)), [64 * 128, 128 * 256, 256 * 512]
    norms = 2 * (64 + 4 * sum(widths) + 128 + 256 + 512)
    macs = [weights * 1024 // 4**stage for stage, weights in enumerate(stages)]
    macs += [weights * 256 // 4**stage for stage, weights in enumerate(sides)]
    return stem + sum(stages) + sum(sides) + norms + 2 * 512 + (512 + 1) * 10, stem * 1024 + sum(macs) + 512 * 10


def of_vgg_small() -> tuple[int, int]:
    convs = [9 * c * d for c, d in [(3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]]
    macs = sum(weights * positions for weights, positions in zip(convs, [1024, 1024, 256, 256, 64, 64], strict=True))
    return sum(convs) + 3 * 2 * (128 + 256 + 512) + (8192 + 1) * 10, macs + 8192 * 10


def of_imagenet(depths: tuple[int, ...]) -> tuple[int, int]:
    widths = (64, 128, 256, 512)
    stem, stages, sides = 49 * 3 * 64, blocks(widths, depths), [64 * 128, 128 * 256, 256 * 512]
    behind = 2 * 64 + sum(3 * width * 2 * depth for width, depth in zip(widths, depths, strict=True))
    macs = [weights * 56 * 56 // 4**stage for stage, weights in enumerate(stages)]
    macs += [weights * 28 * 28 // 4**stage for stage, weights in enumerate(sides)]
    parameters = stem + sum(stages) + sum(sides) + behind + 2 * (128 + 256 + 512) + 2 * 512 + (512 + 1) * 1000
    return parameters, stem * 112 * 112 + sum(macs) + 512 * 1000


@pytest.mark.parametrize(
    ("name", "by_hand", "parameters", "macs"),
    [
        ("siman_resnet20", of_resnet20(), 270_522, 40_551_040),
        ("siman_resnet18", of_resnet18(), 11_174_986, 555_422_720),
        ("siman_vgg_small", of_vgg_small(), 4_661_898, 607_600_640),
        ("siman_resnet18_imagenet", of_imagenet((2, 2, 2, 2)), 11_694_376, 1_814_073_344),
        ("siman_resnet34_imagenet", of_imagenet((3, 4, 6, 3)), 21_806_248, 3_663_761_408),
    ],
)
def test_sizes(name: str, by_hand: tuple[int, int], parameters: int, macs: int) -> None:
    model = on_meta(name)
    costs = plan_costs(model, plan_of(name))
    found = sum(p.numel() for p in model.parameters()), costs.binary_macs + costs.float_macs
    assert found == by_hand == (parameters, macs)


# Plans


@pytest.mark.parametrize(
    ("name", "binary", "others"),
    [
        ("siman_resnet20", 18, {"stem.conv": STEM}),
        ("siman_vgg_small", 5, {"stem.conv": STEM}),
        ("siman_resnet18", 19, {"stem.conv": STEM, **{f"stages.{i}.0.shortcut.conv": BINARY for i in (1, 2, 3)}}),
        ("siman_resnet18_imagenet", 16, {"stem.conv": STEM, **{f"stages.{i}.0.shortcut.conv": FULL for i in (1, 2, 3)}}),
        ("siman_resnet34_imagenet", 32, {"stem.conv": STEM, **{f"stages.{i}.0.shortcut.conv": FULL for i in (1, 2, 3)}}),
    ],
)  # fmt: skip
def test_plans(name: str, binary: int, others: dict[str, str]) -> None:
    plan = plan_of(name)
    taps = {d.name: d.reason for d in plan.decisions if d.reason.endswith("taps a filter")}
    assert {d.name: d.reason for d in plan.decisions} == {**taps, **others}
    assert plan.binarized == [d.name for d in plan.decisions if d.name in taps or others[d.name] == BINARY]
    assert len(plan.binarized) == binary
    assert all(d.kernel_size == (3, 3) for d in plan.decisions if d.name in taps)
    assert make_row(name) in read_table()


def test_the_users_wish_goes_before_the_design() -> None:
    shortcuts = "stages.*.shortcut.conv"
    assert len(make_plan(on_meta("siman_resnet18"), keep=[shortcuts]).binarized) == 16
    assert len(make_plan(on_meta("siman_resnet18_imagenet"), binarize=[shortcuts]).binarized) == 19


def test_what_cannot_be_binary_is_kept_whatever_the_design_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3))
    model.binary_by_design = {"1": True, "2": False}
    reasons = [(d.binarize, d.reason) for d in make_plan(model, input_size=(3, 32, 32)).decisions]
    assert reasons == [(False, STEM), (False, "depthwise: 1 tap a filter"), (False, FULL)]


# What the layers compute


def test_the_shortcut_without_parameters() -> None:
    x = torch.arange(2 * 2 * 5 * 4, dtype=torch.float32).view(2, 2, 5, 4) + 1
    y = Subsample(2, 5)(x)
    assert y.shape == (2, 5, 3, 2)
    assert torch.equal(y[:, [0, 3, 4]], torch.zeros(2, 3, 3, 2))
    for row in range(3):
        for column in range(2):
            assert torch.equal(y[:, 1:3, row, column], x[:, :, 2 * row, 2 * column])


def silence(block: nn.Module) -> None:
    """Its BatchNorms answer 0, so that only shortcuts are left."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)


def test_every_convolution_of_a_double_block_has_its_shortcut() -> None:
    block = DoubleShortcutBlock(4, 8, 2, Subsample(4, 8)).eval()
    nn.init.constant_(block.act1.weight, 0.5)
    nn.init.constant_(block.act2.weight, 0.25)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(block.bn2.weight)
    between = block.bn1(block.conv1(x)) + Subsample(4, 8)(x)
    between = torch.where(between >= 0, between, 0.5 * between)
    torch.testing.assert_close(block(x), torch.where(between >= 0, between, 0.25 * between))
    silence(block)
    shortcut = Subsample(4, 8)(x)
    torch.testing.assert_close(block(x), torch.where(shortcut >= 0, shortcut, 0.125 * shortcut))


def test_a_single_block_has_one_shortcut_and_hardtanh() -> None:
    block = SingleShortcutBlock(4, 4, 1, nn.Identity()).eval()
    x = 2 * torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    inner = block.bn1(block.conv1(x)).clamp(-1, 1)
    torch.testing.assert_close(block(x), (block.bn2(block.conv2(inner)) + x).clamp(-1, 1))
    silence(block)
    torch.testing.assert_close(block(x), x.clamp(-1, 1))


def test_the_order_of_layers() -> None:
    """Where networks differ: what lies behind the stem, and where VGG-small pools."""
    assert [name for name, _ in create("siman_resnet18", 10).stem.named_children()] == ["conv", "bn"]
    assert [name for name, _ in create("siman_resnet20", 10).stem.named_children()] == ["conv", "bn", "act"]
    imagenet = on_meta("siman_resnet18_imagenet").stem.named_children()
    assert [name for name, _ in imagenet] == ["conv", "bn", "act", "pool"]
    orders = [[name for name, _ in stage.named_children()] for stage in on_meta("siman_vgg_small").stages]
    pooled, plain = ["conv", "pool", "bn", "act"], ["conv", "bn", "act"]
    assert orders == [pooled, plain, pooled, plain, pooled]


# timm's interface


@pytest.mark.parametrize("name", NAMES)
def test_timms_interface(name: str) -> None:
    classes, size = (1000, 224) if name.endswith("imagenet") else (10, 32)
    model = on_meta(name)
    config = timm.data.resolve_data_config(model=model)
    assert (config["input_size"], model.num_classes) == ((3, size, size), classes)
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    grey = create(name, 7, in_chans=1, drop_rate=0.2).eval()
    x = torch.zeros(2, 1, 32, 32)
    features = grey.forward_features(x)
    assert grey(x).shape == (2, 7)
    assert grey.forward_head(features, pre_logits=True).shape == (2, grey.num_features)
    grey.reset_classifier(0)
    assert grey(x).shape == (2, grey.num_features)
    grey.double().reset_classifier(5)
    assert grey(x.double()).shape == (2, 5)


def test_vgg_small_for_images_of_another_size() -> None:
    assert create("siman_vgg_small", 10, img_size=(16, 24)).eval()(torch.zeros(1, 3, 16, 24)).shape == (1, 10)


def test_there_are_no_pretrained_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for siman_resnet20"):
        timm.create_model("siman_resnet20", pretrained=True)
    with pytest.raises(InputError, match="siman_resnet20: timm has no pretrained weights for it"):
        load_model("siman_resnet20", 10)
    assert siman(["convert", "siman_resnet20", "--weights", "pretrained", "--dry-run"]) == 2
    assert "no pretrained weights for it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["siman_resnet20", "siman_vgg_small", "siman_resnet18_imagenet"])
def test_how_convolutions_start(name: str) -> None:
    torch.manual_seed(0)
    conv = create(name, 10).stages[1].get_submodule("conv" if "vgg" in name else "0.conv1")
    fan = 9 * (conv.out_channels if "vgg" in name else conv.in_channels)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.03)


# The commands


def test_models_and_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split()[0] for line in printed("models", "siman_*").splitlines()[1:-1]] == NAMES
    assert BINARY in printed("inspect", "siman_resnet18", "--json")
    assert siman(["inspect", "siman_resnet21"]) == 2
    assert "did you mean siman_resnet20" in capsys.readouterr().err


class Notes(Watcher):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class InterruptedAt(Watcher):
    """Ctrl-C in the second binary epoch."""

    def step(self, done: int, loss: float, top1: float, lr: float) -> None:  # noqa: ARG002
        if done == 1 and self.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    def start_epoch(self, phase: str, epoch: int, epochs: int, steps: int, done: int) -> None:  # noqa: ARG002
        self.epoch = epoch


def small_recipe() -> Recipe:
    return load_recipe("paper-cifar10", {"epochs": 2, "warmup_epochs": 0, "batch_size": 128})


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """From random weights: nobody says so, but there are no others."""
    options, watcher = Options(tmp_path_factory.mktemp("runs"), "run", "cpu"), Notes()
    result = convert("siman_resnet20", str(digits), recipe=small_recipe(), options=options, watcher=watcher)
    assert result is not None
    assert watcher.notes == [
        "siman_resnet20 has no pretrained weights; it starts from random ones",
        "an epoch is only 3 steps, which trains little; -b 16 makes it 20",
    ]
    return Run(result.run)


@pytest.fixture(scope="module")
def exported(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(finished.folder, format="all", output=tmp_path_factory.mktemp("files"), images=16)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(finished: Run, digits: Path, tmp_path: Path) -> None:
    options = Options(tmp_path, "run", "cpu")
    with pytest.raises(Interrupted):
        convert("siman_resnet20", str(digits), recipe=small_recipe(), options=options, watcher=InterruptedAt())
    run = Run(tmp_path / "run")
    assert run.weights("last").read_bytes() != finished.weights("last").read_bytes()
    resume(run, options=options)
    assert run.weights("last").read_bytes() == finished.weights("last").read_bytes()


def test_export_folds_everything_behind_a_binary_convolution(exported: Exported) -> None:
    assert dict(exported.folding.folded) == {"BatchNormalization": 18, "Add": 18, "PRelu": 18}
    assert exported.folding.refused == []
    rest = {"Conv": 1, "Relu": 1, "ReduceMean": 1, "BatchNormalization": 1, "Gemm": 1}
    assert operators(read_onnx(exported.files[-1]).model) == {"BinaryConv2d": 18, "Slice": 4, "Pad": 2, **rest}
    assert "18 of 18 operators equal" in printed("verify", str(exported.files[-1]), "--images", "16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folded", "left"),
    [
        (
            "siman_resnet18",
            {"BatchNormalization": 19, "Add": 8},
            {"BinaryConv2d": 19, "Clip": 16, "Conv": 1, "ReduceMean": 1, "BatchNormalization": 1, "Gemm": 1},
        ),
        (  # a BatchNorm behind a pool stays, and the PReLU behind it
            "siman_vgg_small",
            {"BatchNormalization": 2, "PRelu": 2},
            {"BinaryConv2d": 5, "MaxPool": 3, "BatchNormalization": 3, "PRelu": 4, "Conv": 1, "Reshape": 1, "Gemm": 1},
        ),
        (
            "siman_resnet18_imagenet",
            {"BatchNormalization": 16, "Add": 16, "PRelu": 16},
            {"BinaryConv2d": 16, "Conv": 4, "Relu": 1, "MaxPool": 1, "ReduceMean": 1, "BatchNormalization": 1, "Gemm": 1},
        ),
    ],
)  # fmt: skip
def test_graphs_of_the_others(name: str, folded: dict[str, int], left: dict[str, int]) -> None:
    """Random BatchNorms of either sign, so that nothing agrees by being zero."""
    size = (3, 32, 32)
    packed = pm.packed_model(name, size, 10)
    model, folding = build_onnx(packed)
    assert (dict(folding.folded), operators(model)) == (folded, left)
    assert folding.refused == []
    batch = pm.images(4, *size, seed=9)
    (logits,) = pm.ort_session(model).run(None, {"input": batch.numpy()})
    assert np.ptp(logits, axis=0).min() > 0.01
    np.testing.assert_allclose(logits, pm.run_torch(packed, batch), rtol=0, atol=1e-4)


def test_exported_files_evaluate_as_the_run_did(exported: Exported, finished: Run, digits: Path) -> None:
    best = max(record["top1"] for record in finished.metrics())
    assert [evaluate(file, data=str(digits), device="cpu").top1 for file in exported.files] == [best, best]


@pytest.mark.parametrize("name", ["paper-cifar10", "paper-imagenet"])
def test_the_paper_recipes_have_nothing_that_is_ours(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.init, recipe.binarizer, recipe.clip_percent, recipe.sched_on_updates) == (
        "copy",
        "half",
        15.0,
        False,
    )
    assert (recipe.calibration_images, recipe.final_calibration_images, recipe.fp_epochs) == (0, 0, 0)
    assert (recipe.label_weight, recipe.distill_weight, recipe.smoothing, recipe.mixup, recipe.cutmix) == (
        1,
        0,
        0,
        0,
        0,
    )
    assert (recipe.aa, recipe.color_jitter, recipe.reprob, recipe.model_ema, recipe.clip_grad) == (
        None,
        0,
        0,
        False,
        None,
    )


def test_the_authors_learning_rates() -> None:
    """Their warm-up sets lr*(epoch+1)/5 for five epochs; their cosine over epochs - 4 steps once an epoch from the fifth on."""
    recipe = load_recipe("paper-cifar10")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, recipe.epochs, 196)
    for epoch in range(400):
        schedule.step(epoch)
        theirs = 0.1 * (epoch + 1) / 5 if epoch < 5 else 0.05 * (1 + math.cos(math.pi * (epoch - 4) / 396))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs, abs=1e-12)
