"""The packed file: the same model back bit for bit, the same bytes everywhere, and one line for whatever else is in a file."""

import copy
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from siman_convert import packed
from siman_convert.costs import plan_costs
from siman_convert.data import Preprocess
from siman_convert.description import Accuracy, Description, canonical_json, describe, description_of
from siman_convert.errors import InputError, SimanError
from siman_convert.frozen import empty_packed, freeze, packed_layers
from siman_convert.layers import SiMaNConv2d
from siman_convert.metadata import from_metadata, to_metadata
from siman_convert.packed import load, read_description, round_to_half, save_packed
from siman_convert.plans import Plan, make_plan
from siman_convert.surgery import apply_plan

GOLDEN_FILE = "b99a7f911d288695f8e996d800e0c1d3001aaf17c47869fe9359fdfa8085000b"
GOLDEN_TENSORS = "3f5680c226f22270ab9a31979ee90fa09c1c57aa733e12b2e5879b65090f2c45"
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
Values = dict[str, Any]
Arrays = dict[str, np.ndarray]


def siman_model(name: str, classes: int, seed: int = 0) -> nn.Module:
    """A SiMaN model in eval mode as training could leave it: no BatchNorm is trivial, gammas of both signs."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes)
    apply_plan(model, make_plan(model, name=name), init="copy")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            sign = torch.randint(0, 2, module.weight.shape) * 2 - 1
            module.weight.data = sign * torch.empty_like(module.weight).uniform_(0.3, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(17)
        if isinstance(module, SiMaNConv2d):
            nn.init.normal_(module.alpha, std=0.1)
    return model.eval()


def frozen_model(siman: nn.Module, name: str, classes: int) -> nn.Module:
    plan = make_plan(timm.create_model(name, num_classes=classes), name=name)
    return describe(freeze(copy.deepcopy(siman)), about(name, classes, plan))


def about(name: str, classes: int, plan: Plan) -> Description:
    return Description(
        architecture=name,
        plan=plan,
        preprocess=Preprocess((3, 64, 64), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.95, "center"),
        classes=tuple(f"Klasse {number} \u00fc\n" for number in range(classes)),
        weights="best",
        recipe_digest="ab12",
        accuracy=Accuracy(61.25, 88.5, 400, "digits"),
        siman_version="0.1.0",
    )


@pytest.fixture(scope="module")
def siman() -> nn.Module:
    return siman_model("test_resnet", 10)


@pytest.fixture
def model(siman: nn.Module) -> nn.Module:
    return frozen_model(siman, "test_resnet", 10)


@pytest.fixture(scope="module")
def written(siman: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(frozen_model(siman, "test_resnet", 10), path)
    return path


@pytest.fixture(scope="module")
def metadata(written: Path) -> Values:
    return to_metadata(read_description(written))


def logits(model: nn.Module, images: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(5)))


def parts(path: Path) -> tuple[Values, Arrays]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    arrays = {name: array.copy() for name, array in safetensors.numpy.load(data).items()}
    return json.loads(header["__metadata__"]["siman"]), arrays


def digest_as_documented(arrays: Arrays) -> str:
    """As another program would do it, after the docstring of `packed`."""
    text = b""
    for name, array in sorted(arrays.items()):
        fields = (
            name.encode(),
            CODES[array.dtype.name].encode(),
            str(list(array.shape))[1:-1].replace(" ", "").encode(),
        )
        for field in (*fields, array.tobytes()):
            text += len(field).to_bytes(8, "little") + field
    return hashlib.sha256(text).hexdigest()


def seal(values: Values, arrays: Arrays) -> str:
    metadata = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    return canonical_json({**values, "sha256": {"metadata": metadata, "tensors": digest_as_documented(arrays)}})


def forge(source: Path, target: Path, edit: Callable[[Values, Arrays], object]) -> Path:
    """A copy of a file with its metadata and tensors edited and both digests computed anew."""
    values, arrays = parts(source)
    del values["sha256"]
    edit(values, arrays)
    target.write_bytes(safetensors.numpy.save(arrays, {"siman": seal(values, arrays)}))
    return target


def refusal(path: Path, reader: Callable[[Path], object] = load) -> str:
    """The one line, without the path it has to begin with, that `reader` refuses a file with."""
    with pytest.raises(InputError) as caught:
        reader(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    return text.removeprefix(f"{path}: ")


# What a file holds


def test_the_model_comes_back_bit_for_bit(siman: nn.Module, model: nn.Module, written: Path) -> None:
    generator = torch.get_rng_state()
    loaded = load(str(written))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(logits(loaded), logits(siman))
    assert logits(loaded).std() > 1e-3
    assert type(loaded) is type(siman)
    assert not any(module.training for module in loaded.modules())
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64, torch.uint8}
    assert description_of(loaded) == description_of(model) == read_description(written)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_layer_matters_to_that_comparison(written: Path) -> None:
    loaded = load(written)
    before = logits(loaded, images=1)

    def flipped(filter_bits: torch.Tensor) -> bool:
        """Whether one weight's bit, at the first channel of the central tap, changes the logits; it is put back."""
        height, width, _ = filter_bits.shape
        filter_bits[height // 2, width // 2, 0] ^= 1
        changed = not torch.equal(logits(loaded, images=1), before)
        filter_bits[height // 2, width // 2, 0] ^= 1
        return changed

    for name, layer in packed_layers(loaded).items():
        assert any(map(flipped, layer.weight_bits)), name  # not every filter's channel survives the ReLU
    assert torch.equal(logits(loaded, images=1), before)


@pytest.mark.parametrize(("name", "classes"), [("test_resnet", 10), ("resnet18", 1000)])
def test_bytes_are_those_the_plan_promised(name: str, classes: int, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=classes)
    plan = make_plan(model, name=name)
    promised = plan_costs(model, plan).bytes_after
    model = describe(empty_packed(model, plan), about(name, classes, plan))
    assert save_packed(model, tmp_path / "m") == promised
    _, arrays = parts(tmp_path / "m")
    assert sum(array.nbytes for array in arrays.values()) == promised
    assert list(arrays.keys() ^ model.state_dict().keys()) == []


def test_half_stores_weights_in_two_bytes_and_loses_nothing_more(
    model: nn.Module, written: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert round_to_half(model) is model
    path = tmp_path / "half.safetensors"
    halved = [name for name, tensor in before.items() if tensor.is_floating_point() and tensor.dim() > 1]
    saved = 2 * sum(before[name].numel() for name in halved)
    assert save_packed(model, path) == sum(t.numel() * t.element_size() for t in before.values()) - saved
    assert saved > 50_000
    loaded = load(path)
    assert description_of(loaded).half
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(load(written)))
    after = loaded.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32, torch.int64, torch.uint8}
    for name in before:
        expected = before[name].half().float() if name in halved else before[name]
        assert torch.equal(after[name], expected), name
    assert {array.dtype.name for name, array in parts(path)[1].items() if name in halved} == {"float16"}


def test_rounding_beyond_float16_changes_nothing(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.weight[0, 0] = -70000
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="fc.weight: a magnitude of 70000 is beyond float16's 65504"):
        round_to_half(model)
    assert not description_of(model).half
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Shares(nn.Module):
    """One packed layer under two names, one tensor in two modules, a buffer that no file holds."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.b = nn.Conv2d(10, 10, 3, padding=1, bias=True)
        self.a = self.b
        self.first, self.second = nn.Conv2d(3, 10, 1), nn.Conv2d(3, 10, 1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(10, classes)
        self.register_buffer("filter", torch.full((1,), 3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(self.b(self.first(x) - self.second(x)))
        return self.head(y.mean(dim=(2, 3)) * self.filter)


def shares() -> nn.Module:
    """Nothing random, and the same on every machine."""
    net = Shares(3)
    plan = make_plan(net, name="shares", input_size=(3, 4, 4))
    assert plan.binarized == ["b"]
    empty_packed(net, plan)
    for number, tensor in enumerate(net.state_dict().values()):
        values = (torch.arange(tensor.numel()) * 37 + 11 * number) % 256
        tensor.copy_((values / 128 - 1 if tensor.is_floating_point() else values).view_as(tensor))
    net.b.weight_bits[..., 1] &= 3  # channels 8 and 9
    preprocess = Preprocess((3, 4, 4), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.25, 1), 1, "squash", pad_to_size=True)
    description = Description("shares", plan, preprocess, ("a", "b", "c"), "last", "00", None, "0.0.0")
    return describe(net, description)


@pytest.fixture
def shares_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`shares` as if it were timm's."""
    monkeypatch.setattr(packed, "require_known", lambda _: None)
    monkeypatch.setattr(packed, "create", lambda _, classes: Shares(classes))


@pytest.mark.usefixtures("shares_known")
def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    model, path = shares(), tmp_path / "m"
    stored = save_packed(model, path)
    names = [
        "b.bias",
        "b.scale",
        "b.weight_bits",
        "first.bias",
        "first.weight",
        "head.bias",
        "head.weight",
        "second.bias",
    ]
    assert sorted(parts(path)[1]) == names
    assert stored == 10 * 9 * 2 + 4 * (10 + 10 + 30 + 10 + 10 + 30 + 3)
    loaded = load(path)
    assert loaded.a is loaded.b
    assert loaded.second.weight is loaded.first.weight
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded(x).std() > 1e-3


# The bytes


def test_golden_bytes(tmp_path: Path) -> None:
    save_packed(shares(), tmp_path / "m")
    assert hashlib.sha256((tmp_path / "m").read_bytes()).hexdigest() == GOLDEN_FILE
    values, arrays = parts(tmp_path / "m")
    assert values["sha256"]["tensors"] == digest_as_documented(arrays) == GOLDEN_TENSORS


@pytest.mark.slow
def test_a_fresh_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_packed as t; "
    code += "t.save_packed(t.shares(), pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "m")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "77"}, timeout=120)
    assert hashlib.sha256((tmp_path / "m").read_bytes()).hexdigest() == GOLDEN_FILE


def test_what_was_loaded_is_written_as_the_same_bytes(written: Path, tmp_path: Path) -> None:
    save_packed(load(written), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == written.read_bytes()
    assert forge(written, tmp_path / "forged", lambda *_: None).read_bytes() == written.read_bytes()


# Refusals when saving


def spoil(key: str, value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.state_dict()[key].view(-1)[-1] = value

    return change


def in_double(model: nn.Module) -> None:
    model.bn1.running_var = model.bn1.running_var.double()


def in_half_but_for_one(model: nn.Module) -> None:
    round_to_half(model)
    spoil("conv1.0.weight", 1 + 2**-12)(model)


def with_class(name: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        old = description_of(model)
        describe(model, dataclasses.replace(old, classes=(*old.classes[1:], name)))

    return change


def with_accuracy(top1: float) -> Callable[[nn.Module], None]:
    return lambda model: (
        describe(model, dataclasses.replace(description_of(model), accuracy=Accuracy(top1, 1, 1, "d"))) and None
    )


UNWRITABLE = {
    "NaN": (spoil("fc.weight", float("nan")), "fc.weight: holds values that are not finite"),
    "infinite": (spoil("bn1.running_var", float("inf")), "bn1.running_var: holds values that are not finite"),
    "float64": (in_double, "bn1.running_var: a packed model holds float32, int64 and uint8, not torch.float64"),
    "not float16": (in_half_but_for_one, "conv1.*weight: its values are not float16 numbers"),
    "class is a number": (with_class(3), "metadata: classes.9: "),
    "class is not UTF-8": (with_class("\udce9"), "UTF-8|utf-8"),
    "accuracy is NaN": (with_accuracy(float("nan")), "metadata: "),
    "not packed": (lambda model: delattr(model, "siman_description"), "is not a packed model of siman"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_saved_leaves_the_file_there(case: str, model: nn.Module, tmp_path: Path) -> None:
    change, message = UNWRITABLE[case]
    path = tmp_path / "m.safetensors"
    path.write_text("before")
    change(model)
    with pytest.raises(InputError, match=message) as caught:
        save_packed(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_text() == "before"


def test_a_disk_that_fills_up_leaves_the_file_there(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("before")
    whole, reached = Path.write_bytes, []

    def half(self: Path, data: bytes) -> int:
        reached.append(whole(self, data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(SimanError, match="no space left"):
        save_packed(model, path)
    assert reached[0] > 50_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
    assert path.read_text() == "before"


def test_no_folder_to_save_to(model: nn.Module, tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "m", tmp_path):
        with pytest.raises(InputError, match="cannot be written there"):
            save_packed(model, path)


# Refusals when loading: damage


def test_truncated_anywhere(written: Path, tmp_path: Path) -> None:
    data, path = written.read_bytes(), tmp_path / "m"
    header = 8 + int.from_bytes(data[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1}
    for cut in sorted(cuts | set(range(0, len(data), len(data) // 60))):
        path.write_bytes(data[:cut])
        assert "export it again" in refusal(path), cut
    path.write_bytes(data + b"\0")
    assert "export it again" in refusal(path)


def test_any_flipped_bit_is_found(written: Path, tmp_path: Path) -> None:
    data, path = bytearray(written.read_bytes()), tmp_path / "m"
    header = 8 + int.from_bytes(data[:8], "little")
    draw = np.random.default_rng(1)
    bits = [*range(64), *range(8 * header - 64, 8 * header + 64), *range(8 * len(data) - 16, 8 * len(data))]
    bits += [*draw.integers(64, 8 * header, 300), *draw.integers(8 * header, 8 * len(data), 100)]
    for bit in map(int, bits):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert refusal(path), bit
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    load(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_overwritten_stretch_is_found(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = written.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    start = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(whole) - 1)))
    stretch = data.draw(st.binary(min_size=1, max_size=40))
    cut = data.draw(st.sampled_from([0, len(stretch)]))
    damaged = whole[:start] + stretch + whole[start + cut :]
    path = tmp_path_factory.getbasetemp() / "overwritten.safetensors"
    path.write_bytes(damaged)
    if damaged != whole:
        assert refusal(path)


def test_what_is_no_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    assert "there is no such file" in refusal(path)
    assert "not a file" in refusal(tmp_path)
    path.write_bytes(b"")
    assert "not a safetensors file, or cut off (0 bytes)" in refusal(path)
    path.write_text("#!/bin/sh\nexit 1\n")
    assert "not a safetensors file" in refusal(path)
    path.write_bytes(b"[]".rjust(2).join([(2).to_bytes(8, "little"), b""]))
    assert "not a safetensors file" in refusal(path)
    assert "has no metadata 'siman'" in refusal(path, read_description)
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}))
    assert "has no metadata 'siman'; expected the file that `siman export` wrote" in refusal(path)
    monkeypatch.setattr(packed, "MAX_BYTES", 50)
    assert "larger than any packed model" in refusal(path)
    assert "cannot be read" in refusal(tmp_path / ("n" * 5000))


def test_a_huge_file_of_zeros_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    tracemalloc.start()
    assert "not a safetensors file" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")


class Trap:
    sprung = False

    @staticmethod
    def spring() -> None:
        Trap.sprung = True

    def __reduce__(self) -> Any:
        return Trap.spring, ()


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_nothing_is_unpickled(protocol: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    if protocol == "torch":
        torch.save({"weight": torch.zeros(2), "trap": Trap()}, path)
    else:
        path.write_bytes(pickle.dumps(Trap()))
    assert not Trap.sprung
    assert "not a safetensors file" in refusal(path)
    assert not Trap.sprung


# Refusals when loading: altered with care, the digests computed anew


def put(**fields: Any) -> Callable[[Values, Arrays], None]:
    return lambda values, _: values.update(fields)


def tensor(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values, Arrays], None]:
    def edit(_: Values, arrays: Arrays) -> None:
        arrays[key] = change(arrays[key])

    return edit


def first_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return change


def plan_of(name: str) -> Values:
    with torch.device("meta"):
        return make_plan(timm.create_model(name), name=name).to_dict()


def keep_first(values: Values, _: Arrays) -> None:
    next(decision for decision in values["plan"]["decisions"] if decision["binarize"])["binarize"] = False


def rename_first(values: Values, _: Arrays) -> None:
    next(decision for decision in values["plan"]["decisions"] if decision["binarize"])["name"] = "x\n\x1b[31mred"


BITS, SCALE = "layer2.0.conv2.weight_bits", "layer2.0.conv2.scale"
ALTERED: dict[str, tuple[Callable[[Values, Arrays], object], str]] = {
    "missing": (lambda _, a: a.pop(SCALE), rf"{SCALE} is missing, expected F32 of shape \(\d+,\); the file is damaged"),
    "extra": (lambda _, a: a.update(x=np.zeros(2, np.float32)), "x is not a tensor of this model, 1 such in all"),
    "shape": (
        tensor("fc.weight", lambda a: a.T.copy()),
        r"fc.weight: expected F32 of shape \(10, 96\), found F32 of shape \(96, 10\)",
    ),
    "flat": (tensor("fc.weight", lambda a: a.reshape(-1)), r"fc.weight: expected F32 of shape \(10, "),
    "empty": (tensor("fc.bias", lambda a: a[:0]), r"fc.bias: expected F32 of shape \(10,\), found F32 of shape \(0,\)"),
    "unknown dtype": (tensor("fc.bias", lambda a: a.astype(np.float64)), "fc.bias: dtype F64; a packed model has F32"),
    "float16 without half": (
        tensor("fc.weight", lambda a: a.astype(np.float16)),
        r"fc.weight: expected F32 of shape \(10, \d+\), found F16",
    ),
    "half without float16": (put(half=True), r"weight: expected F16 of shape .*, found F32"),
    "half scale": (tensor(SCALE, lambda a: a.astype(np.float16)), f"{SCALE}: expected F32 .* found F16"),
    "bits as integers": (tensor(BITS, lambda a: a.astype(np.int64)), f"{BITS}: expected U8 .* found I64"),
    "NaN scale": (tensor(SCALE, first_value(np.nan)), f"{SCALE}: holds values that are not finite"),
    "infinite weight": (tensor("fc.weight", first_value(-np.inf)), "fc.weight: holds values that are not finite"),
    "one class more": (
        lambda v, _: v.update(classes=[*v["classes"], "x"], arguments={"num_classes": 11}),
        r"fc.weight: expected F32 of shape \(11, \d+\), found F32 of shape \(10, ",
    ),
    "num_classes": (put(arguments={"num_classes": 11}), 'arguments: expected {"num_classes":10}, found {"num_classes":11}'),
    "unknown architecture": (put(architecture="resnet1818"), "unknown model 'resnet1818'"),
    "hub": (put(architecture="hf-hub:timm/resnet18.a1_in1k"), "unknown model 'hf-hub:timm/resnet18.a1_in1k'"),
    "local-dir": (put(architecture="local-dir:/tmp/x"), "unknown model 'local-dir:/tmp/x'"),
    "unknown tag": (put(architecture="test_resnet.nope"), "unknown weights 'nope' of test_resnet"),
    "another architecture": (put(architecture="test_convnext"), "the plan binarizes .*, which the model does not have"),
    "plan of another model": (
        lambda v, _: v.update(plan=plan_of("resnet18")), "the plan (has|binarizes) .*another model's",
    ),
    "plan with less": (keep_first, "weight is missing, expected F32"),
    "plan with a terminal's codes": (rename_first, r"the plan binarizes x  \[31mred, which the model does not have"),
    "unknown field": (put(colour="red"), 'metadata: colour: expected nothing, found "red"'),
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERED)
def test_altered_with_care(case: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def create(name: str, classes: int) -> nn.Module:
        devices.append(torch.get_default_device().type)
        return timm.create_model(name, num_classes=classes)

    monkeypatch.setattr(packed, "create", create)
    edit, message = ALTERED[case]
    text = refusal(forge(written, tmp_path / "m", edit))
    assert re.search(message, text), text
    assert set(devices) <= {"meta"}  # nothing of the size that a file asks for was allocated
    assert load(written) is not None
    assert devices[-2:] == ["meta", "cpu"]


@pytest.mark.usefixtures("shares_known")
def test_padding_bits(tmp_path: Path) -> None:
    model, path = shares(), tmp_path / "m"
    save_packed(model, path)
    load(path)
    edit = tensor("b.weight_bits", first_value(255))
    load(forge(path, tmp_path / "forged", edit))  # channels 0 to 7
    edit = tensor("b.weight_bits", lambda array: array | np.array([0, 4], np.uint8))
    assert "b.weight_bits: packed weights: padding bits" in refusal(forge(path, tmp_path / "forged", edit))
    model.b.weight_bits[3, 2, 1, 1] |= 128
    with pytest.raises(InputError, match="b.weight_bits: packed weights: padding bits"):
        save_packed(model, path)


def resealed(source: Path, target: Path, change: Callable[[str], dict[str, str]]) -> Path:
    values, arrays = parts(source)
    target.write_bytes(safetensors.numpy.save(arrays, change(canonical_json(values))))
    return target


TEXTS: dict[str, tuple[Callable[[str], dict[str, str]], str]] = {
    "two keys": (lambda text: {"siman": text, "author": "x"}, "expected the one text 'siman', found "),
    "another key": (lambda text: {"Siman": text}, "has no metadata 'siman'"),
    "no digests": (lambda text: {"siman": canonical_json({**json.loads(text), "sha256": None})}, "SHA-256"),
    "metadata digest": (lambda text: {"siman": text.replace('"half":false', '"half":true')}, "metadata do not have the SHA"),
    "tensors digest": (lambda text: {"siman": text.replace('"tensors":"', '"tensors":"0')}, "tensors do not have the SHA"),
    "spaces": (lambda text: {"siman": text.replace(",", ", ", 1)}, "not canonical JSON"),
    "a name twice": (lambda text: {"siman": text.replace("{", '{"accuracy":null,', 1)}, "not canonical JSON"),
    "not JSON": (lambda text: {"siman": text[:-1]}, "metadata: not JSON"),
    "NaN": (lambda text: {"siman": text.replace('"top1":61.25', '"top1":NaN')}, "cannot be written as JSON"),
    "surrogate": (lambda text: {"siman": text.replace("ab12", "\\ud800")}, "cannot be written as JSON in UTF-8"),
    "deep": (lambda _: {"siman": "[" * 100_000}, "metadata: not JSON"),
    "an older format": (
        lambda text: {"siman": text.replace('"format":2', '"format":1')},
        "the file is of format 1, this siman reads 2 only: read it with the siman that wrote it",
    ),
    "a list": (lambda _: {"siman": "[]"}, "metadata: format: expected 2, found None"),
    "newer": (
        lambda text: {"siman": text.replace('"format":2', '"format":3')},
        "the file is of format 3, this siman reads up to 2: upgrade siman",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_metadata_text(case: str, written: Path, tmp_path: Path) -> None:
    change, message = TEXTS[case]
    assert message in refusal(resealed(written, tmp_path / "m", change))
    if case != "tensors digest":
        assert message in refusal(tmp_path / "m", read_description)


def test_unaltered_text_is_read(written: Path, tmp_path: Path) -> None:
    load(resealed(written, tmp_path / "m", lambda text: {"siman": text}))


# The metadata by themselves, as the ONNX file uses them


def test_metadata_are_json_and_come_back(metadata: Values, written: Path) -> None:
    assert json.loads(json.dumps(metadata)) == metadata
    assert from_metadata(json.loads(json.dumps(metadata)), "here") == read_description(written)
    names = "accuracy architecture arguments classes format half plan preprocess recipe_digest siman_version weights"
    assert sorted(metadata) == names.split()
    assert (metadata["format"], metadata["arguments"]) == (2, {"num_classes": 10})


def test_whole_numbers_are_written_as_floating_point_ones(written: Path) -> None:
    description = read_description(written)
    preprocess = Preprocess((3, 8, 8), "box", (0, 0, 0), (1, 1, 1), 1, "center")
    whole = dataclasses.replace(description, preprocess=preprocess, accuracy=Accuracy(50, 100, 3, "d"))
    values = to_metadata(whole)
    assert canonical_json(values["accuracy"]) == '{"data":"d","images":3,"top1":50.0,"top5":100.0}'
    assert from_metadata(values, "here") == whole
    assert to_metadata(from_metadata(values, "here")) == values


@pytest.mark.parametrize(
    "field", ["accuracy", "arguments", "classes", "half", "plan", "preprocess", "recipe_digest", "weights"]
)
def test_a_missing_field_is_named(field: str, metadata: Values) -> None:
    del (values := dict(metadata))[field]
    with pytest.raises(InputError, match=f"^here: metadata: {field}: "):
        from_metadata(values, "here")


WRONG: list[tuple[str, Any]] = [
    ("format", "2"), ("format", True), ("format", 0), ("siman_version", 1), ("architecture", None), ("weights", 3),
    ("arguments", {"num_classes": "10"}), ("arguments", {"num_classes": 10, "x": 1}), ("arguments", []),
    ("classes", []), ("classes", "abcdefghij"), ("classes", list(range(10))), ("plan", None), ("plan", {}),
    ("preprocess", {}), ("preprocess", []), ("recipe_digest", ["ab"]), ("accuracy", 61.0), ("accuracy", {"top1": 1.0}),
    ("accuracy", {"top1": 1.0, "top5": 2.0, "images": 3.5, "data": "d"}), ("half", 0), ("half", None),
    ("accuracy", {"top1": 1.0, "top5": 2.0, "images": 3, "data": "d", "x": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_mistyped_field_is_named(field: str, value: Any, metadata: Values) -> None:
    with pytest.raises(InputError, match=f"^here: metadata: {field}"):
        from_metadata({**metadata, field: value}, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_pct", "0.95"), ("input_size", ["3", 64, 64]), ("mean", [0, 0, 10**400]), ("crop_mode", "x"), ("x", 1)],
)
def test_preprocessing_is_strict(field: str, value: Any, metadata: Values) -> None:
    values = {**metadata, "preprocess": {**metadata["preprocess"], field: value}}
    with pytest.raises(InputError, match="^here: "):
        from_metadata(values, "here")


def test_a_layer_decided_twice(metadata: Values) -> None:
    decisions = metadata["plan"]["decisions"]
    values = {**metadata, "plan": {**metadata["plan"], "decisions": [*decisions, decisions[0]]}}
    with pytest.raises(InputError, match="^here: plan: 'conv1.* has more than one decision"):
        from_metadata(values, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_other_json_is_refused_or_comes_back(metadata: Values, data: st.DataObject) -> None:
    values = copy.deepcopy(metadata)
    place: Any = values
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        description = from_metadata(values, "here")
        text = canonical_json(to_metadata(description))
    except InputError as error:
        text = str(error)
    assert (text.isprintable() and text.startswith("here: ")) or text == canonical_json(values)
