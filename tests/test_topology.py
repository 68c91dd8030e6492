"""Shortcuts, PReLU and shifts: what is decided and why, that it is what the formulas say, and that it survives every file."""

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_models as pm
import pytest
import timm
import torch
from exported_run import printed
from packed_models import one_thread  # noqa: F401
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F

import siman_convert.networks  # noqa: F401  registers them with timm
from siman_convert.blocks import BinaryUnit, Shift, ShiftedPReLU
from siman_convert.calibrate import fit_scales, fit_thresholds
from siman_convert.cli import run as siman
from siman_convert.costs import plan_costs
from siman_convert.description import describe
from siman_convert.errors import InputError
from siman_convert.frozen import freeze, packed_layers
from siman_convert.layers import SiMaNConv2d
from siman_convert.onnx_export import build_onnx
from siman_convert.packed import load, save_packed
from siman_convert.plans import Plan, make_plan
from siman_convert.recipe import build_recipe
from siman_convert.runs import Run
from siman_convert.schedule import parameter_groups
from siman_convert.subjects import load_run_model
from siman_convert.surgery import apply_plan, binary_layers, put_in_place
from siman_convert.topology import PLAIN, Activation, Shortcut, Topology

ALL = {"shortcuts": True, "prelu": True, "shifts": True}
SHAPE = "its output has its input's shape"
BLOCK = "its block adds a shortcut right behind it"
SIZE = (3, 32, 32)


def decided(model: str | nn.Module, **wishes: bool) -> Topology:
    if isinstance(model, str):
        with torch.device("meta"):
            model = timm.create_model(model)
    return make_plan(model, input_size=None if hasattr(model, "pretrained_cfg") else SIZE, **(wishes or ALL)).topology


def dense_net() -> nn.Module:
    with torch.device("meta"):
        return DenseNet(growth_rate=8, block_config=(3, 2))


# Decisions: of every family some convolutions, the counts of added and not added, and those of PReLUs


@pytest.mark.parametrize(
    ("model", "some", "added", "prelus"),
    [
        (
            "resnet18",  # BasicBlock
            {
                "layer1.0.conv1": ("layer1.0.bn1", SHAPE),
                "layer1.0.conv2": (None, BLOCK),
                "layer2.0.conv1": (None, "64 channels in, 128 out"),
            },
            (5, 11),
            (16, 0),
        ),
        (
            "resnet26",  # Bottleneck
            {
                "layer1.1.conv1": (None, "256 channels in, 64 out"),
                "layer1.1.conv2": ("layer1.1.bn2", SHAPE),
                "layer2.0.conv2": (None, "stride 2"),
                "layer2.1.conv3": (None, BLOCK),
            },
            (6, 18),
            (24, 0),
        ),
        (
            "resnetv2_18",  # norm - act - conv - norm - act - conv
            {
                "stages.0.blocks.0.conv1": ("stages.0.blocks.0.norm2", SHAPE),
                "stages.0.blocks.0.conv2": (None, BLOCK),
                "stages.1.blocks.0.conv1": (None, "64 channels in, 128 out"),
            },
            (5, 11),
            (16, 0),
        ),
        (
            "regnety_002",  # groups, squeeze and excite
            {
                "s1.b1.conv1.conv": (None, "32 channels in, 24 out"),
                "s4.b2.conv2.conv": ("s4.b2.conv2.bn", SHAPE),
                "s4.b2.conv3.conv": (None, BLOCK),
            },
            (18, 21),
            (39, 0),
        ),
        (
            "vgg11_bn",  # no block
            {"features.4": (None, "64 channels in, 128 out"), "features.11": ("features.12", SHAPE)},
            (4, 3),
            (7, 0),
        ),
        (
            "vgg11",
            {"features.8": (None, "relu follows it, no BatchNorm that would bring it to the scale of its input")},
            (0, 7),
            (7, 0),
        ),
        (
            "siman_resnet20",  # the paper's: a shortcut around every convolution, and PReLU
            {"stages.0.0.conv1": (None, BLOCK), "stages.1.0.conv1": (None, BLOCK), "stages.1.0.conv2": (None, BLOCK)},
            (0, 18),
            (0, 18),
        ),
        (
            "mobilenetv2_100",  # the first block of a stage adds nothing: its convolution is the next one's shortcut
            {
                "blocks.1.0.conv_pwl": (None, "96 channels in, 24 out"),
                "blocks.1.1.conv_pwl": (None, BLOCK),
            },
            (0, 34),
            (0, 17),
        ),
    ],
)
def test_decisions(
    model: str, some: dict[str, tuple[str | None, str]], added: tuple[int, int], prelus: tuple[int, int]
) -> None:
    topology = decided(model)
    by_conv = {shortcut.conv: (shortcut.norm, shortcut.reason) for shortcut in topology.shortcuts}
    assert {name: by_conv[name] for name in some} == some
    count = len(topology.norm_of)
    assert (count, len(topology.shortcuts) - count) == added
    assert (len(topology.prelus), len(topology.activations) - len(topology.prelus)) == prelus
    assert topology.shifts
    assert all((shortcut.norm is not None) == (shortcut.reason == SHAPE) for shortcut in topology.shortcuts)


def test_a_concatenation_needs_no_shortcut() -> None:
    topology = decided(dense_net())
    reasons = Counter(shortcut.reason for shortcut in topology.shortcuts)
    assert reasons["a concatenation keeps what it read: it needs none"] == 5
    # Its 1x1 convolutions stand before a norm of their own; where as many channels go in as come out, they get one.
    layer = "features.denseblock1.denselayer3"
    assert topology.norm_of == {f"{layer}.conv1": f"{layer}.norm2"}


def test_what_was_not_asked_for_is_not_decided() -> None:
    assert decided("test_resnet", shortcuts=False) == PLAIN
    assert decided("test_resnet", shortcuts=True).activations == ()
    prelu = decided("test_resnet", prelu=True)
    assert (prelu.shortcuts, prelu.shifts, len(prelu.prelus)) == ((), False, 11)
    with pytest.raises(InputError, match="they need prelu"):
        decided("test_resnet", shifts=True)
    with pytest.raises(InputError, match=r"they need prelu \(--prelu\)"):
        build_recipe({"shifts": True}, "here")


class Chain(nn.Module):
    """stem - conv - norm - act, in ways that differ."""

    def __init__(self, forward: Callable[["Chain", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()
        for name, module in modules.items():
            setattr(self, name, module)
        self.forward_of = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_of(self, self.stem(x))


def straight(net: Chain, x: Tensor) -> Tensor:
    return net.act(net.norm(net.conv(x)))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Chain(straight), SHAPE),
        (Chain(straight, conv=nn.Conv2d(8, 8, 3, padding=2, dilation=2)), SHAPE),
        (Chain(straight, conv=nn.Conv2d(8, 8, 3, padding="same", groups=2)), SHAPE),
        (Chain(straight, conv=nn.Conv2d(8, 8, 3)), "its padding changes the size of the map"),
        (Chain(straight, norm=nn.GroupNorm(2, 8)), "the norm behind it is a GroupNorm, not a BatchNorm2d"),
        (Chain(lambda n, x: n.norm(n.conv(n.conv(x)))), "called 2 times"),
        (Chain(lambda n, x: n.norm(n.norm(n.conv(x)))), "the BatchNorm behind it is called 2 times"),
        (Chain(lambda n, x: n.norm(y := n.conv(x)) + torch.sigmoid(y)), "its output is read 2 times"),
        (Chain(lambda n, x: n.norm(y := n.conv(x)) * y.relu()), "its output is read 2 times"),
        (Chain(lambda n, x: n.act(n.norm(n.conv(x)) * 0.5 + x)), BLOCK),
        (Chain(lambda n, x: n.act(n.norm(n.conv(x)) + 1)), SHAPE),
        (Chain(lambda n, x: n.act(y := n.norm(n.conv(x))) + y), SHAPE),  # itself, twice: x is lost all the same
        (Chain(lambda n, x: torch.cat([n.conv(x), x], 1)), "a concatenation keeps what it read: it needs none"),
        (
            Chain(lambda n, x: torch.cat([n.conv(x), x.relu()], 1)),
            "cat follows it, no BatchNorm that would bring it to the scale of its input",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_of_shortcuts(net: Chain, reason: str) -> None:
    plan = make_plan(net, input_size=(3, 16, 16), shortcuts=True, binarize=["conv"])
    assert plan.topology.shortcuts == (Shortcut("conv", "norm" if reason == SHAPE else None, reason),)
    before = net(torch.zeros(2, 3, 16, 16)).shape
    apply_plan(net, plan)
    assert net(torch.zeros(2, 3, 16, 16)).shape == before


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Chain(straight), ("act", True, 8, 0.0, "behind a binary convolution; starts at relu's slope")),
        (
            Chain(straight, act=nn.LeakyReLU(0.25)),
            ("act", True, 8, 0.25, "behind a binary convolution; starts at leaky_relu's slope"),
        ),
        (
            Chain(lambda n, x: n.norm(n.conv(x)).relu()),
            ("", False, 8, 0.0, "relu is a function that Chain calls, no module"),
        ),
        (
            Chain(lambda n, x: n.act(n.norm(n.conv(n.act(x))))),
            ("act", False, 8, 0.0, "called 2 times: each call would need slopes of its own"),
        ),
        (Chain(straight, act=nn.PReLU(8)), ("act", False, 8, 0.0, "a PReLU already")),
        (Chain(straight, act=nn.SiLU()), ("act", False, 8, 0.0, "silu: no PReLU is the same function")),
        (Chain(straight, act=nn.ReLU6()), ("act", False, 8, 0.0, "hardtanh: no PReLU is the same function")),
        (
            Chain(lambda n, x: n.act(n.conv(x).mean((2, 3)))),
            ("act", False, 0, 0.0, "its input is of shape 8, no map"),
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_reasons_of_activations(net: Chain, expected: tuple[Any, ...]) -> None:
    topology = make_plan(net, input_size=(3, 16, 16), prelu=True, binarize=["conv"]).topology
    assert topology.activations == (Activation(*expected),)


# What is carried out


def random_net(name: str) -> nn.Module:
    """In full precision, BatchNorms of both signs and with statistics."""
    torch.manual_seed(0)
    return pm.randomize(timm.create_model(name, num_classes=5), pm.images(8, *SIZE))


@pytest.mark.parametrize("name", ["test_resnet", "regnetx_002", "resnetv2_18"])
@pytest.mark.parametrize("shifts", [False, True])
def test_prelu_alone_keeps_the_full_precision_function(name: str, shifts: bool) -> None:
    model, batch = random_net(name), pm.images(4, *SIZE, seed=1)
    expected = pm.run_torch(model, batch)
    topology = make_plan(model, prelu=True).topology
    put_in_place(model, dataclasses.replace(topology, shifts=shifts), {})
    kind = ShiftedPReLU if shifts else nn.PReLU
    assert sum(isinstance(module, kind) for module in model.modules()) == len(topology.prelus) > 8
    assert (pm.run_torch(model, batch) == expected).all()
    with torch.no_grad():  # so that the equality means something
        next(module for module in model.modules() if isinstance(module, nn.PReLU)).weight.fill_(0.5)
    assert (pm.run_torch(model, batch) != expected).any()


@pytest.mark.parametrize("name", ["test_resnet", "regnetx_002"])
def test_shortcuts_add_what_the_convolution_read(name: str) -> None:
    """Against the network without them, whose norms' results are raised by hooks."""
    model, batch = random_net(name), pm.images(4, *SIZE, seed=1)
    plan = make_plan(model, shortcuts=True)
    plain = apply_plan(copy.deepcopy(model), dataclasses.replace(plan, topology=PLAIN))
    without = pm.run_torch(plain, batch)
    read: dict[str, Tensor] = {}
    for conv, norm in plan.topology.norm_of.items():
        raised = plain.get_submodule(norm)
        raised = getattr(raised, "drop", raised)  # of timm's BatchNormAct2d: what comes before its activation
        plain.get_submodule(conv).register_forward_pre_hook(lambda _, x, conv=conv: read.update({conv: x[0]}))
        raised.register_forward_hook(lambda _, __, y, conv=conv: y + read[conv])
    apply_plan(model, plan)
    assert sum(isinstance(module, BinaryUnit) for module in model.modules()) == len(plan.topology.norm_of) > 2
    expected = pm.run_torch(plain, batch)
    assert (pm.run_torch(model, batch) == expected).all()
    assert abs(without - expected).max() > 0.1
    for net in (model, plain):  # and with the batch's own statistics
        net.train()
    torch.testing.assert_close(model(batch), plain(batch))
    assert list(binary_layers(model)) == list(binary_layers(plain)) == plan.binarized


def test_scratch_weights_do_not_depend_on_the_topology() -> None:
    model = timm.create_model("test_resnet")
    plan = make_plan(model, **ALL)
    plain = apply_plan(copy.deepcopy(model), dataclasses.replace(plan, topology=PLAIN), init="scratch", seed=3)
    pairs = zip(
        binary_layers(plain).items(),
        binary_layers(apply_plan(model, plan, init="scratch", seed=3)).items(),
        strict=True,
    )
    assert all(a == b and torch.equal(x.weight, y.weight) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortcuts": (Shortcut("conv", "gone", ""),)}, "a shortcut around conv and gone, which are no Conv2d"),
        ({"shortcuts": (Shortcut("conv", "act", ""),)}, "a shortcut around conv and act, which are no Conv2d"),
        (
            {"shortcuts": (Shortcut("stem", "norm", ""),)},
            "a shortcut around stem and norm, whose channels are not equal",
        ),
        ({"activations": (Activation("norm", True, 8, 0.0, ""),)}, "a PReLU in place of norm, which is no ReLU here"),
    ],
)
def test_a_topology_of_another_model(changes: dict[str, Any], message: str) -> None:
    net = Chain(straight)
    plan = make_plan(net, input_size=(3, 16, 16), **ALL)
    before = str(net)
    with pytest.raises(InputError, match=message):
        apply_plan(net, dataclasses.replace(plan, topology=dataclasses.replace(plan.topology, **changes)))
    assert str(net) == before


def test_a_plan_as_json_is_strict_about_its_topology() -> None:
    plan = make_plan(Chain(straight), input_size=(3, 16, 16), **ALL)
    data = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(data) == plan
    for path, message in (("topology", "topology: Field required"), ("topology.shifts", "topology.shifts: Field")):
        broken = copy.deepcopy(data)
        *outer, last = path.split(".")
        del (broken[outer[0]] if outer else broken)[last]
        with pytest.raises(InputError, match=message):
            Plan.from_dict(broken)
    data["topology"]["shortcuts"][0]["more"] = 1
    with pytest.raises(InputError, match=r"topology.shortcuts.0.more: Unexpected keyword"):
        Plan.from_dict(data)


# Learned thresholds and shifts


def test_a_static_threshold_and_its_gradients() -> None:
    """Against autograd through the function whose slope the surrogate is: 2a - a|a| has 2 - 2|a|."""
    torch.manual_seed(0)
    conv = SiMaNConv2d(4, 6, 3, padding=1, bias=False, center=False).double()
    unit = BinaryUnit(conv, None, Shift(4, dtype=torch.float64))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        unit.shift.offset.normal_(0, 0.3)  # type: ignore[union-attr]
    offset = unit.shift.offset  # type: ignore[union-attr]
    weight = (2.0 * conv.bits() - 1) * conv.alpha.detach().view(-1, 1, 1, 1)
    shifted = x - offset.view(-1, 1, 1)
    signs = torch.where(shifted >= 0, 1.0, -1.0).double()
    torch.testing.assert_close(unit(x), F.conv2d(signs, weight, padding=1))
    std = (shifted.detach().square().sum((1, 2, 3), keepdim=True) / (4 * 5 * 5 - 1) + 1e-5).sqrt()
    a = (shifted / std).clamp(-1, 1)
    smooth = 2 * a - a * a.abs()
    g = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    expected = torch.autograd.grad((F.conv2d(smooth, weight, padding=1) * g).sum(), (x, offset))
    found = torch.autograd.grad((unit(x) * g).sum(), (x, offset))
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other)


def test_shifted_prelu() -> None:
    act = ShiftedPReLU(2, 0.25)
    with torch.no_grad():
        act.before.offset.copy_(torch.tensor([1.0, -1.0]))
        act.after.copy_(torch.tensor([10.0, 20.0]))
    x = torch.tensor([[-1.0, 2.0], [-2.0, 2.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(act(x).flatten(), torch.tensor([-2 * 0.25 + 10, 11.0, -0.25 + 20, 23.0]))


def test_thresholds_start_at_the_channels_means() -> None:
    torch.manual_seed(0)
    net, batches = Chain(straight), [torch.randn(6, 3, 16, 16), torch.randn(2, 3, 16, 16)]
    binary = apply_plan(copy.deepcopy(net), make_plan(net, input_size=(3, 16, 16), **ALL))
    fit_thresholds(net, binary, batches)
    with torch.no_grad():
        read = net.stem(torch.cat(batches))
    torch.testing.assert_close(binary.conv.shift.offset, read.mean((0, 2, 3)))
    fit_scales(net, binary, batches)
    fitted = binary.conv.conv.alpha.clone()
    with torch.no_grad():
        y, o = net.conv(read), binary.conv.conv.unscaled(read - read.mean((0, 2, 3)).view(-1, 1, 1))
    covariance = ((y - y.mean((0, 2, 3), keepdim=True)) * o).mean((0, 2, 3))
    slope = covariance / o.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(fitted[slope > 0.1 * slope.median()], slope[slope > 0.1 * slope.median()])
    fit_thresholds(net, apply_plan(copy.deepcopy(net), make_plan(net, input_size=(3, 16, 16))), iter([None]))  # unread


def test_thresholds_of_a_convolution_that_is_called_twice() -> None:
    torch.manual_seed(0)
    net, images = Chain(lambda n, x: n.norm(n.conv(n.act(n.conv(x))))), torch.randn(4, 3, 16, 16)
    binary = apply_plan(copy.deepcopy(net), make_plan(net, input_size=(3, 16, 16), **ALL))
    fit_thresholds(net, binary, [images])
    with torch.no_grad():
        first = net.stem(images)
        read = torch.cat([first, net.act(net.conv(first))])
    torch.testing.assert_close(binary.conv.shift.offset, read.mean((0, 2, 3)))


def test_nothing_decays_thresholds() -> None:
    net = Chain(straight)
    apply_plan(net, make_plan(net, input_size=(3, 16, 16), **ALL))
    decaying = {id(p) for group in parameter_groups(net, 0.1) if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in decaying}
    assert {"conv.norm.weight", "act.prelu.weight", "stem.weight"} < names
    assert not {"conv.shift.offset", "conv.conv.weight", "conv.conv.alpha"} & names


# Files


def packed(name: str, **wishes: bool) -> tuple[nn.Module, Plan]:
    """Packed, with slopes, shifts and BatchNorms of all kinds."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    plan = make_plan(model, name=name, **wishes)
    apply_plan(model, plan)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(-0.3, 0.6)
            if isinstance(module, Shift):
                module.offset.normal_(0, 0.3)
            if isinstance(module, ShiftedPReLU):
                module.after.normal_(0, 0.3)
    pm.randomize(model, pm.images(8, *SIZE))
    return describe(freeze(model), pm.description(plan, SIZE, 10, name)), plan


@pytest.mark.parametrize("wishes", [{"shortcuts": True, "prelu": True}, ALL], ids=["prelu", "shifts"])
@pytest.mark.parametrize("name", ["test_resnet", "regnetx_002"])
def test_a_packed_file_gives_the_same_module(name: str, wishes: dict[str, bool], tmp_path: Path) -> None:
    model, plan = packed(name, **wishes)
    written = save_packed(model, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    assert str(back) == str(model)
    batch = pm.images(4, *SIZE, seed=1)
    assert (pm.run_torch(back, batch) == pm.run_torch(model, batch)).all()
    assert list(packed_layers(back)) == plan.binarized
    assert {layer.center for layer in packed_layers(back).values()} == {not plan.topology.shifts}
    assert plan_costs(timm.create_model(name, num_classes=10), plan).bytes_after == written


def test_every_binary_convolution_of_resnet18_is_one_node() -> None:
    model, plan = packed("resnet18", shortcuts=True, prelu=True)
    graph, folding = build_onnx(model)
    assert dict(folding.folded) == {"BatchNormalization": 16, "Add": 8 + 5, "PRelu": 16}
    assert folding.refused == []
    kinds = Counter(node.op_type for node in graph.graph.node)
    rest = {"Conv": 4, "Relu": 1, "MaxPool": 1, "ReduceMean": 1, "Gemm": 1}
    assert kinds.pop("BinaryConv2d") == 16
    assert {kind: count for kind, count in kinds.items() if kind != "Reshape"} == rest
    assert {node.name for node in graph.graph.node if node.domain == "siman"} == set(plan.binarized)
    batch = pm.images(3, *SIZE, seed=4)
    (logits,) = pm.ort_session(graph).run(None, {"input": batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), torch.from_numpy(pm.run_torch(model, batch)))


# The commands

FLAGS = [
    "--fp-epochs", "1", "--epochs", "1", "--device", "cpu", "-b", "64", "--set", "calibration_images=64",
    "--set", "final_calibration_images=64", "--weights", "none", "--img-size", "32",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--shortcuts", "--prelu"], ["--shortcuts", "--prelu", "--shifts"]], ids=len)
def test_convert_export_verify_resume(
    asked: list[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = "convert", "test_resnet", "--data", str(digits), *FLAGS, *asked
    printed(*before, "--experiment", "run")
    run = Run(tmp_path / "runs" / "run")
    plan = run.plan()
    assert len(plan.topology.norm_of) == 3
    assert len(plan.topology.prelus) == 11
    shifts = "--shifts" in asked
    assert plan.topology.shifts == shifts
    exported = printed("export", "--format", "all", "--images", "16")
    assert "11 BatchNormalization, 11 PRelu" in exported
    assert exported.count("kept ") == (11 if shifts else 0)  # the Adds behind the PReLUs
    verified = printed("verify", "--images", "16")
    assert verified.count("11 of 11 operators equal in torch, onnxruntime, native and reference") == 2
    for file in ("model.onnx", "model.safetensors"):
        shown = json.loads(printed("inspect", str(run.folder / file), "--json"))["topology"]
        assert shown == plan.to_dict()["topology"]
    assert list(binary_layers(load_run_model(run, "last"))) == plan.binarized
    weights = run.weights("last").read_bytes()
    printed("convert", "--resume", "run", "--device", "cpu")
    assert run.weights("last").read_bytes() == weights


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle(digits: Path, tmp_path: Path) -> None:
    """Stopped after its conversion, it ends with the bits of one that was not."""
    for name in ("whole", "stopped"):
        flags = ["--output", str(tmp_path), "--experiment", name, *FLAGS, "--shortcuts", "--prelu"]
        command = ["convert", "test_resnet", "--data", str(digits), *flags]
        if name == "whole":
            printed(*command)
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("siman_convert.train.Phase._train_epoch", stopping_in_the_binary_phase())
            assert siman(command) == 130
        stopped = Run(tmp_path / name)
        assert [record["phase"] for record in stopped.metrics()] == ["full-precision", "binary"]
        printed("convert", "--resume", str(stopped.folder), "--device", "cpu")
    whole, gone_on = (Run(tmp_path / name).weights("last").read_bytes() for name in ("whole", "stopped"))
    assert whole == gone_on


def stopping_in_the_binary_phase() -> Callable[[Any], None]:
    from siman_convert.train import Phase

    train_epoch = Phase._train_epoch

    def stop(phase: Phase) -> None:
        if phase.name == "binary":
            phase.stop.requested = True
            phase.stop_if_asked()
        train_epoch(phase)

    return stop


def test_inspect_shows_the_topology_with_reasons() -> None:
    shown = printed("inspect", "test_resnet", "--shortcuts", "--prelu")
    assert f"shortcut       3  {SHAPE}: conv1.3, layer1.0.conv1, layer3.0.conv1\n" in shown
    assert "no shortcut    1  stride 2: layer3.0.conv2\n" in shown
    assert "PReLU         11  behind a binary convolution; starts at relu's slope: conv1.5, act1, " in shown
    assert "act2 and 7 more\n" in shown
    assert "shifts" not in shown
    assert "shifts       all  learned thresholds" in printed("inspect", "test_resnet", "--prelu", "--shifts")
    assert not [
        line for line in printed("inspect", "test_resnet").splitlines() if line.startswith(("sh", "no ", "PReLU"))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "test_resnet", "--weights", "none", "--shifts"], "they need prelu"),
        (["inspect", "test_resnet", "--shifts"], "they need prelu"),
        (["convert", "test_resnet", "--weights", "none", "--set", "shortcuts=3"], "shortcuts: "),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert siman(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
