"""What is exported is the packed model's graph: folded, small, the same everywhere, and run by stock ONNX Runtime alone."""

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packed_models as pm
import pytest
import torch
from onnx import numpy_helper
from packed_models import HAND_CLASSES, HAND_SIZE, Export, Size, one_thread  # noqa: F401  a fixture
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.bits import unpack_weight_bits
from siman_convert.description import describe
from siman_convert.errors import InputError, SimanError
from siman_convert.frozen import PackedConv2d, freeze, halved_names, packed_layers
from siman_convert.onnx_export import INPUT, OPSET, OUTPUT, binary_nodes, build_onnx
from siman_convert.onnx_file import Variant, parse_onnx, seal
from siman_convert.onnx_fold import Refusal
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, function_body
from siman_convert.packed import round_to_half
from siman_convert.plans import make_plan
from siman_convert.runtime.reference import evaluator
from siman_convert.surgery import apply_plan

ROOT = Path(__file__).parent.parent
SIZE: Size = (3, 64, 64)  # a smaller image than resnet18's own; planned at its own
CLASSES = 1000
TOLERANCE = 2e-5  # of logits of magnitude 1 to 5: float32 sums in another order, and folded BatchNorms
CLEAN = """
import sys
import numpy as np, onnxruntime
folder = sys.argv[1]
session = onnxruntime.InferenceSession(open(f"{folder}/model.onnx", "rb").read(), providers=["CPUExecutionProvider"])
images = np.load(f"{folder}/images.npy")
for count in (1, 7, 64):
    np.save(f"{folder}/logits{count}.npy", session.run(None, {"input": images[:count]})[0])
strangers = [name for name in sys.modules if name.split(".")[0] in ("siman_convert", "torch", "onnx", "timm")]
assert not strangers, strangers
assert "siman_convert" not in sys.modules
"""
FRESH = """
import hashlib, packed_models as pm
from siman_convert.packed import round_to_half
export = pm.export(round_to_half(pm.packed_model("hand", pm.HAND_SIZE, pm.HAND_CLASSES)))
print(hashlib.sha256(export.data).hexdigest())
"""


@pytest.fixture(scope="module")
def resnet() -> Export:
    return pm.export(pm.packed_model("resnet18", SIZE, CLASSES))


@pytest.fixture(scope="module")
def half(resnet: Export) -> Export:  # noqa: ARG001  both models at a time are enough
    return pm.export(round_to_half(pm.packed_model("resnet18", SIZE, CLASSES)))


@pytest.fixture(scope="module")
def hand() -> Export:
    return pm.hand_export()


def assert_same_logits(export: Export, x: Tensor, runtime: str = "onnxruntime") -> None:
    """As torch, on every image whose activations all fall on the same side of their mean; that is nearly every image."""
    wider, names = pm.with_binary_inputs(export.model)
    run = (pm.ort_session(wider) if runtime == "onnxruntime" else evaluator(wider)).run
    same = pm.samples_of_equal_signs(export.packed, x, run, names)
    assert same.mean() > 0.7
    got, expected = run([OUTPUT], {INPUT: x.numpy()})[0], pm.run_torch(export.packed, x)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(got[same], expected[same], rtol=0, atol=TOLERANCE)


def test_resnet18_is_25_nodes(resnet: Export) -> None:
    onnx.checker.check_model(resnet.model, full_check=True)
    kinds = Counter(node.op_type for node in resnet.model.graph.node)
    assert kinds == {OP_NAME: 16, "Conv": 4, "Relu": 1, "MaxPool": 1, "ReduceMean": 1, "Reshape": 1, "Gemm": 1}
    assert kinds.total() == 25
    assert resnet.folding.operators == 16
    assert resnet.folding.folded == {"BatchNormalization": 16, "Relu": 16, "Add": 8}
    assert resnet.folding.refused == []


def test_resnet18_is_small(resnet: Export) -> None:
    assert len(resnet.data) <= 4.4e6
    assert len(parse_onnx(resnet.data).data) == len(resnet.data)


def test_the_logits_are_torchs(resnet: Export) -> None:
    assert_same_logits(resnet, pm.images(32, *SIZE))


def test_the_reference_gives_them_too(resnet: Export) -> None:
    assert_same_logits(resnet, pm.images(4, *SIZE, seed=6), "reference")


def test_stock_onnx_runtime_alone_runs_the_file(resnet: Export, tmp_path: Path) -> None:
    """A clean interpreter that knows nothing of siman, any batch, from bytes."""
    x = pm.images(64, *SIZE, seed=7)
    (tmp_path / "model.onnx").write_bytes(resnet.data)
    np.save(tmp_path / "images.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = pm.run_torch(resnet.packed, x)
    for count in (1, 7, 64):
        logits = np.load(tmp_path / f"logits{count}.npy")
        assert logits.shape == (count, CLASSES)
        close = np.abs(logits - expected[:count]).max(axis=1) < TOLERANCE
        assert close.mean() > 0.7  # on the others a sign may have flipped


def test_a_weight_bit_of_any_layer_changes_the_logits(resnet: Export) -> None:
    """So that no BatchNorm hides a branch, and the graph reads the weights that are named after the layer."""
    x = pm.images(4, *SIZE)
    before = pm.run_torch(resnet.packed, x)
    (in_onnx,) = pm.ort_session(resnet.model).run(None, {INPUT: x.numpy()})
    for name, layer in packed_layers(resnet.packed).items():

        def change(filter_: int, layer: PackedConv2d = layer) -> float:
            with pm.flipped(layer, filter_):
                return float(np.abs(pm.run_torch(resnet.packed, x) - before).max())

        assert any(change(filter_) > 10 * TOLERANCE for filter_ in range(16)), name  # one may sit behind a dead ReLU
    altered = onnx.ModelProto()
    altered.CopyFrom(resnet.model)
    weights = {tensor.name: tensor for tensor in altered.graph.initializer}
    for name in list(packed_layers(resnet.packed))[::5]:
        tensor = weights[f"{name}.weight_bits"]
        original, stride = tensor.raw_data, len(tensor.raw_data) // tensor.dims[0]
        flipped = np.frombuffer(original, np.uint8).copy()
        flipped[: 8 * stride : stride] ^= 1  # the same bit of the first eight filters
        tensor.raw_data = flipped.tobytes()
        (got,) = pm.ort_session(altered).run(None, {INPUT: x.numpy()})
        assert np.abs(got - in_onnx).max() > 10 * TOLERANCE, name
        tensor.raw_data = original


@pytest.mark.parametrize("which", ["resnet", "half", "hand"])
def test_what_the_file_says_it_takes_and_gives(which: str, request: pytest.FixtureRequest) -> None:
    export: Export = request.getfixturevalue(which)
    size, classes = (HAND_SIZE, HAND_CLASSES) if which == "hand" else (SIZE, CLASSES)
    model = export.model
    (given,), (result,) = model.graph.input, model.graph.output

    def shape(value: onnx.ValueInfoProto) -> list[int | str]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    batch = shape(given)[0]
    assert isinstance(batch, str)
    assert (given.name, shape(given)) == (INPUT, [batch, *size])
    assert (result.name, shape(result)) == (OUTPUT, [batch, classes])
    assert {given.type.tensor_type.elem_type, result.type.tensor_type.elem_type} == {onnx.TensorProto.FLOAT}
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSET, DOMAIN: VERSION}
    assert [function.SerializeToString() for function in model.functions] == [function_body(OPSET).SerializeToString()]
    onnx.checker.check_model(model, full_check=True)


def test_the_parts_are_named_after_the_model(resnet: Export) -> None:
    """Not after the exporter's steps, which change with its version."""
    nodes = binary_nodes(resnet.model)
    assert {node.name for node in nodes} == set(packed_layers(resnet.packed))
    names = [node.name for node in resnet.model.graph.node]
    assert len(set(names)) == len(names)
    assert {"conv1", "fc", "layer2.0.downsample.0", "MaxPool"} <= set(names)
    results = [name for node in resnet.model.graph.node for name in node.output]
    assert results == [*(f"{name}/out" for name in names[:-1]), OUTPUT]
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in resnet.model.graph.initializer}
    for node in nodes:
        layer = packed_layers(resnet.packed)[node.name]
        np.testing.assert_array_equal(tensors[f"{node.name}.weight_bits"], layer.weight_bits.numpy())
        assert node.input[1] == f"{node.name}.weight_bits"
        assert list(node.input[2:4]) == [f"{node.name}/scale", f"{node.name}/bias"]


def test_hand_made_net(hand: Export) -> None:
    """No BatchNorm; uneven padding, groups, dilation, a layer called twice; two operators that may not be folded."""
    assert hand.folding.operators == 5
    assert hand.folding.folded == {"LeakyRelu": 1, "Relu": 1}
    reasons = {(refusal.layer, refusal.reason) for refusal in hand.folding.refused}
    assert reasons == {
        ("dilated", "the output before it is used 2 times"),
        ("point", "an activation is folded already"),
    }
    assert all(isinstance(refusal, Refusal) and refusal.node.startswith("Add ") for refusal in hand.folding.refused)
    attributes = {
        node.name: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in binary_nodes(hand.model)
    }
    plain = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 1, "center": 1}
    assert attributes == {
        "grouped": plain | {"channels": 3, "strides": [2, 1], "pads": [1, 2, 1, 2], "group": 2},
        "uneven": plain | {"channels": 10, "pads": [0, 1, 1, 2]},
        "dilated": plain | {"channels": 11, "pads": [2, 1, 2, 1], "dilations": [2, 3]},
        "point": plain | {"channels": 9},
        "point#2": plain | {"channels": 9},
    }
    weights = [tensor.name for tensor in hand.model.graph.initializer if tensor.name.startswith("point.")]
    assert weights == ["point.weight_bits"]  # once in the file, for both calls


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_hand_made_net_runs(hand: Export, runtime: str) -> None:
    assert_same_logits(hand, pm.images(32, *HAND_SIZE), runtime)


def test_half(half: Export, resnet: Export) -> None:
    """The remaining full-precision weights are float16 in the file and float32 wherever something is computed."""
    assert len(half.data) <= 3.0e6
    assert half.folding == resnet.folding
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in half.model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16
    }
    weights = half.packed.state_dict()
    assert stored.keys() == halved_names(half.packed)
    assert len(stored) == 5  # stem, three shortcuts, classifier
    for name, array in stored.items():
        np.testing.assert_array_equal(array.astype(np.float32), weights[name].numpy())
    left = [t.name for t in half.model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert left == ["no_residual"]
    kinds = Counter(node.op_type for node in half.model.graph.node)
    assert (kinds[OP_NAME], kinds["Cast"], kinds["BatchNormalization"], kinds["Add"]) == (16, 5, 4, 0)
    assert_same_logits(half, pm.images(16, *SIZE))


def test_half_rounds(half: Export, resnet: Export) -> None:
    """The rounded model is another model, and it is the rounded one that was exported."""
    x = pm.images(8, *SIZE)
    assert np.abs(pm.run_torch(half.packed, x) - pm.run_torch(resnet.packed, x)).max() > 10 * TOLERANCE


def test_exporting_leaves_the_model_as_it_was(hand: Export) -> None:
    again = pm.packed_model("hand", HAND_SIZE, HAND_CLASSES)
    for (name, got), expected in zip(hand.packed.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    x = pm.images(2, *HAND_SIZE)
    np.testing.assert_array_equal(pm.run_torch(hand.packed, x), pm.run_torch(again, x))


def strings_of(message: Any) -> Iterator[tuple[str, str | bytes]]:
    """(field, value) of every text in a protobuf message, whatever level it is on."""
    for field, value in message.ListFields():
        for part in value if field.is_repeated else [value]:
            if field.message_type is not None:
                yield from strings_of(part)
            elif isinstance(part, str | bytes):
                yield field.name, part


@pytest.mark.parametrize("which", ["resnet", "half", "hand"])
def test_nothing_of_this_machine_is_in_the_file(which: str, request: pytest.FixtureRequest) -> None:
    export: Export = request.getfixturevalue(which)
    texts = list(strings_of(export.model))
    fields = {field for field, _ in texts}
    assert {"name", "op_type", "input", "raw_data"} <= fields  # the walk does reach nodes and tensors
    assert "doc_string" not in fields
    assert not any(_has_metadata(message) for message in messages_of(export.model))
    assert (export.model.producer_name, export.model.producer_version) == ("siman", "")
    places = {ROOT, Path.cwd(), Path.home(), Path(sys.prefix), Path(sysconfig.get_path("purelib"))}
    forbidden = [str(place) for place in places if len(str(place)) > 1]
    forbidden += [".py", "site-packages", "torch", "onnxscript", os.uname().nodename]
    for field, text in texts:
        if field != "raw_data":
            found = text if isinstance(text, str) else text.decode()
            assert not [word for word in forbidden if word in found], (field, found)
    for place in (ROOT, sys.prefix, "site-packages"):
        assert str(place).encode() not in export.data


def messages_of(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from messages_of(part)


def _has_metadata(message: Any) -> bool:
    return any(field.name in ("metadata_props", "doc_string") for field, _ in message.ListFields())


@pytest.mark.slow
def test_same_bytes_in_fresh_processes(tmp_path: Path) -> None:
    """Whatever the hash seed and the folder."""

    def start(seed: int) -> subprocess.Popen[str]:
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", "-c", FRESH]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)

    running = [start(1), start(2)]
    (first, errors), (second, more_errors) = [process.communicate() for process in running]
    assert (errors, more_errors) == ("", "")
    assert len(first) == 64 + 1  # nothing else was printed
    assert first == second


def packed_from(model: nn.Module, size: Size, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    plan = make_plan(model, input_size=size, **options)
    return describe(freeze(pm.randomize(apply_plan(model, plan), pm.images(4, *size))), pm.description(plan, size, 4))


class Named(nn.Module):
    """Modules named as the second node of another module, or of a type, would be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 8, 3)
        self.Relu_2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_2(F.relu(self.conv(F.relu(self.conv(x))))))
        return self.fc(self.Relu_2(x).mean((2, 3)))


def test_names_stay_apart() -> None:
    packed = packed_from(Named(), (3, 9, 9))
    packed_layers(packed)["Relu_2"].name = "its name in another model"
    export = pm.export(packed)
    onnx.checker.check_model(export.model, full_check=True)
    names = [node.name for node in export.model.graph.node]
    assert len(set(names)) == len(names) == 9
    assert [node.name for node in binary_nodes(export.model)] == ["Relu_2"]
    assert_same_logits(export, pm.images(8, 3, 9, 9))


def test_a_model_that_is_one_layer() -> None:
    packed = packed_from(nn.Conv2d(3, 5, (2, 3), padding="same"), (3, 6, 7), binarize=["*"])
    assert isinstance(packed, PackedConv2d)
    model, folding = build_onnx(packed)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == [OP_NAME]
    assert folding.operators == 1
    x = pm.images(3, 3, 6, 7)
    np.testing.assert_array_equal(pm.ort_session(model).run(None, {INPUT: x.numpy()})[0], pm.run_torch(packed, x))
    parse_onnx(
        seal(model, pm.description(make_plan(nn.Conv2d(3, 4, 3), input_size=(3, 6, 7)), (3, 6, 7), 4), Variant())
    )


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            x = -x
        return self.conv(x).mean((2, 3))


def test_a_model_that_torch_cannot_export(capfd: pytest.CaptureFixture[str]) -> None:
    """One line that gives the reason, not the exporter's pages."""
    packed = packed_from(Branching(), (3, 9, 9))
    capfd.readouterr()
    with pytest.raises(SimanError, match=r"^test_resnet: torch's ONNX exporter failed: .*data-dependent") as caught:
        build_onnx(packed)
    assert not isinstance(caught.value, InputError)  # the user can do nothing about it
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_only_packed_models_are_exported() -> None:
    with pytest.raises(InputError, match="Conv2d is not a packed model of siman; siman_convert.load gives one"):
        build_onnx(nn.Conv2d(3, 4, 3))


def test_weights_in_the_file_unpack_to_the_layers_signs(hand: Export) -> None:
    """The convention of `bits`, once end to end: a 1 is +1."""
    layer = packed_layers(hand.packed)["uneven"]
    (tensor,) = [tensor for tensor in hand.model.graph.initializer if tensor.name == "uneven.weight_bits"]
    bits = unpack_weight_bits(numpy_helper.to_array(tensor), 10)
    x = torch.ones(1, 10, 4, 6)
    x[:, :, 0, 0] = -1  # below the mean
    signs = np.where(bits, 1.0, -1.0)
    with torch.no_grad():
        y = layer(x)
    # The tap at (1, 3) of the output at (0, 2) reads x at (1, 4); that at (0, 0) reads x at (0, 1): all +1.
    expected = layer.scale.numpy() * signs.sum((1, 2, 3))
    np.testing.assert_allclose(y[0, :, 0, 2].numpy(), expected, rtol=1e-6)


class Blockwise(nn.Module):
    """Attention inside blocks of the map, as NesT's and Twins': five dimensions, of which torch translates four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.fused_attn = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.stem(x)).relu()
        q = x.reshape(-1, 2, 4, 2, 8).transpose(-2, -1)  # batch, heads, blocks, positions, channels
        if self.fused_attn:
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        else:
            y = (q * q.shape[-1] ** -0.5 @ q.transpose(-2, -1)).softmax(dim=-1) @ q
        return self.head(y.reshape(x.shape[0], 8, -1).mean(-1))


def test_fused_attention_is_written_out_for_the_export_alone() -> None:
    torch.manual_seed(0)
    model, size = Blockwise(), (3, 16, 16)
    plan = make_plan(model, name="blockwise", input_size=size)
    assert plan.binarized == ["conv"]
    packed = describe(freeze(apply_plan(model, plan)), pm.description(plan, size, 5))
    x = pm.images(3, *size)
    expected = pm.run_torch(packed, x)
    graph = pm.export(packed).model
    assert packed.fused_attn
    found = pm.ort_session(graph).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
