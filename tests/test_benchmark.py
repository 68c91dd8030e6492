"""The parts of a benchmark: turns, ratios, baselines, profiles, memory. Nothing here asserts a time that was measured."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from packed_models import HAND_SIZE, export, hand_export, one_thread, packed_model  # noqa: F401  a fixture
from torch import nn

from siman_convert.benchmark import comparison, layers, rounds
from siman_convert.benchmark.baselines import settle_statistics, take_images, write_float, write_int8
from siman_convert.benchmark.comparison import bench
from siman_convert.benchmark.contestants import Contestant, open_contestant
from siman_convert.benchmark.layers import (
    Layer,
    LayerTimes,
    Operator,
    binary_taps,
    layer_rows,
    layer_times,
    read_profile,
)
from siman_convert.benchmark.machine import usable_cores
from siman_convert.benchmark.memory import peak_memory
from siman_convert.benchmark.rounds import MIN_ROUNDS, Ratio, Timing, ratio, take_turns
from siman_convert.description import Description, description_of
from siman_convert.errors import InputError, SimanError
from siman_convert.models import create
from siman_convert.onnx_file import read_onnx
from siman_convert.runtime import native

SIZE, CLASSES = (3, 64, 48), 7
needs_kernels = pytest.mark.skipif(native.find_library() is None, reason="needs the native library")


@pytest.fixture(scope="module")
def described() -> Description:
    return description_of(packed_model("test_resnet", SIZE, CLASSES))


@pytest.fixture(scope="module")
def fp32(described: Description, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-precision baseline; nobody changes it."""
    path = tmp_path_factory.mktemp("fp32") / "fp32.onnx"
    write_float(described, path)
    return path


@pytest.fixture(scope="module")
def int8(fp32: Path) -> Path:
    """The int8 baseline of the same network."""
    path = fp32.with_name("int8.onnx")
    write_int8(fp32, SIZE, path)
    return path


def stock(path: Path) -> Contestant:
    return Contestant(path.stem, path, "onnxruntime")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


# Turns


class Clock:
    """Time that passes only when a program says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.calls: list[str] = []
        monkeypatch.setattr(rounds, "perf_counter_ns", lambda: self.now_ns)

    def program(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """Takes these times in turn, again and again."""

        def run() -> None:
            self.now_ns += round(1e6 * milliseconds[self.calls.count(name) % len(milliseconds)])
            self.calls.append(name)

        return run


def test_programs_take_turns_and_the_first_run_of_a_turn_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 ms a run: one run fills a turn, every other one is the one that finds cold caches."""
    clock, shares = Clock(monkeypatch), list[float]()
    clock.calls += ["a", "b"]  # so that the one run before all rounds is a warm one
    programs = {"a": clock.program("a", 500.0, 40.0), "b": clock.program("b", 900.0, 120.0)}
    found = take_turns(programs, 3.9, shares.append)
    assert clock.calls[2:10] == ["a", "b", "a", "a", "b", "b", "a", "a"]
    assert (found["a"].median_ms, found["b"].median_ms) == (40.0, 120.0)
    assert (found["a"].p95_ms, found["a"].runs) == (40.0, MIN_ROUNDS)
    assert found["a"].rounds_ms == (40.0,) * MIN_ROUNDS  # 7.8 s for two: the fifth round of 1.56 s ends them
    assert ratio(found["b"], found["a"]) == Ratio(3.0, 3.0, 3.0)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_time_is_used_up_and_short_programs_run_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = take_turns({"a": clock.program("a", 1.0), "b": clock.program("b", 4.0)}, 0.45, lambda _share: None)
    count = len(found["a"].rounds_ms)
    assert count == len(found["b"].rounds_ms) == 20  # rounds of 21 and 24 ms; 900 ms in all
    assert (found["a"].runs, found["b"].runs) == (20 * count, 5 * count)


def test_too_little_time_gives_five_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(take_turns({"a": clock.program("a", 7.0)}, 1e-9, lambda _share: None)["a"].rounds_ms) == MIN_ROUNDS


def test_median_and_95th_percentile_are_of_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth run is slow, which no median of a round shows."""
    clock = Clock(monkeypatch)
    found = take_turns({"a": clock.program("a", *[2.0] * 9, 8.0)}, 1.0, lambda _share: None)["a"]
    assert (found.median_ms, found.p95_ms) == (2, 8)
    assert set(found.rounds_ms) == {2}


def test_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    """One round in which everything took ten times as long changes nothing."""
    ours = Timing(0, 0, 5, (1.0, 10.0, 1.0, 1.0, 1.0))
    other = Timing(0, 0, 5, (2.0, 40.0, 3.0, 5.0, 6.0))
    assert ratio(other, ours) == Ratio(median=4.0, low=3.0, high=5.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 2, "faster"), (1, 2, "same"), (0.9, 1.1, "same"), (0.5, 1, "same"), (0.5, 0.99, "slower")],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high).verdict == verdict


# Baselines


def test_the_float_baseline_is_folded_and_fused(fp32: Path) -> None:
    graph = onnx.load(fp32).graph
    assert {node.op_type for node in graph.node}.isdisjoint({"BatchNormalization", "Identity", "Dropout"})
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [0, *SIZE]
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == CLASSES
    found = layer_times(stock(fp32), 1, noise(2, *SIZE), 0.01, None)
    assert {layer.name for layer in found.layers}.isdisjoint({"Relu", "BatchNormalization"})
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    assert sorted(layer.name for layer in found.layers if layer.kind == "convolution") == sorted(convolutions)
    assert "layer2.0.conv1" in convolutions


def test_the_float_baseline_has_ordinary_activations(described: Description, fp32: Path) -> None:
    """No denormals, no infinities: they would take longer. A gamma of 0, as timm starts with, would hide a block."""
    assert described.architecture == "test_resnet"
    model = create("test_resnet", CLASSES).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert any((norm.weight == 0).all() for norm in norms)
    settle_statistics(model, SIZE)
    seen: list[torch.Tensor] = []
    for norm in norms:
        assert not norm.training
        assert norm.running_mean is not None
        assert norm.running_mean.any()  # 0 before it has seen anything
        norm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(torch.from_numpy(noise(4, *SIZE)))
    assert all(0.1 < output.std() < 10 for output in seen)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(fp32).graph.initializer]
    assert all(np.isfinite(weight).all() for weight in weights)
    assert all(np.abs(weight).max() > 1e-3 for weight in weights if weight.ndim == 4)


def test_a_baseline_is_the_same_every_time_and_leaves_torchs_random_numbers_alone(
    described: Description, fp32: Path, tmp_path: Path
) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    write_float(described, tmp_path / "a.onnx")
    assert torch.equal(torch.rand(3), expected)
    assert (tmp_path / "a.onnx").read_bytes() == fp32.read_bytes()


def test_the_int8_baseline_is_int8_throughout(fp32: Path, int8: Path) -> None:
    """As ONNX Runtime runs it: integer convolutions and additions, nothing of the kind left in float."""
    assert int8.stat().st_size < fp32.stat().st_size / 2
    graph = onnx.load(int8).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    stored = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [stored[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    assert {types[name] for name, *_ in weights} == {onnx.TensorProto.INT8}
    scales = {tensor.name: tensor.dims for tensor in graph.initializer}
    assert all(len(scales[scale]) == 1 for _, scale, *_ in weights)  # per channel
    types_run = {layer.name for layer in layer_times(stock(int8), 1, noise(1, *SIZE), 0.01, None).layers}
    assert "QLinearAdd" in types_run
    assert types_run.isdisjoint({"Add", "Relu"})


@pytest.mark.parametrize("name", ["no_such_net", "tf_mixnet_s.nonsense"])
def test_an_architecture_that_cannot_be_built(described: Description, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_float(replace(described, architecture=name), tmp_path / "x.onnx")
    assert name.split(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_cannot_be_exported(
    described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 1e9 else x + 1  # depends on a value: no graph holds that

    monkeypatch.setattr("siman_convert.benchmark.baselines.create", lambda _name, _classes: Stubborn())
    with pytest.raises(InputError, match="^test_resnet cannot be built in full precision to compare with: "):
        write_float(described, tmp_path / "x.onnx")


def test_baselines_take_images_where_the_file_does(described: Description, fp32: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.onnx"
    path.write_bytes(fp32.read_bytes())
    take_images(path, described)
    shape = (2, *comparison.image_shape(described, takes_images=True))
    assert shape == (2, int(64 / 0.95), int(48 / 0.95), 3)
    open_contestant(stock(path), 1, shape)(np.zeros(shape, np.uint8))


# Layers


def event(name: str, ts: int, dur: int, op: str = "", *shape: int) -> dict[str, object]:
    if not op:
        return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "args": {}}
    arguments = {"op_name": op, "output_type_shape": [{"float": list(shape)}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": arguments}


def test_reading_a_profile() -> None:
    """Three runs, the first of them slow; other events are not operators."""
    events = [event("session_initialization", 0, 900)]
    for run, (start, a, b) in enumerate([(1000, 500, 500), (3000, 10, 7), (4000, 14, 9), (5000, 11, 5)]):
        events += [
            event("a", start + 1, a, "Conv", 2, 3),
            {"cat": "Node", "name": "a_fence_before", "ts": start, "dur": 99, "args": {}},
            event("b", start + 600, b, "Relu", 2, 4),
            event("model_run", start, 100 * (run + 1)),
        ]
    operators, run_ms = read_profile(events, 4)
    assert operators == [Operator("a", "Conv", (2, 3), 11.0), Operator("b", "Relu", (2, 4), 7.0)]
    assert run_ms == 0.3


def test_a_profile_of_batches_in_pieces() -> None:
    """Two runs, each of a piece of three images and one of two: sums, and the shape of the whole batch."""
    events = []
    for start, three, two in [(1000, 500, 400), (3000, 30, 20), (5000, 10, 20)]:
        for at, images, time in [(start, 3, three), (start + 500, 2, two)]:
            events += [
                event("a", at, time, "Conv", images, 8),
                event("b", at + 1, 5, "Shape"),
                event("model_run", at, 2 * time),
            ]
    operators, run_ms = read_profile(events, 3)
    assert operators == [Operator("a", "Conv", (5, 8), 40.0), Operator("b", "Shape", (), 10.0)]
    assert run_ms == 0.08


def test_rows_of_a_profile() -> None:
    graph = onnx.parser.parse_graph(
        """g (float[1, 3, 8, 8] x) => (float[1, 4, 8, 8] z) <float[4, 3, 3, 3] w, uint8[4, 3, 2, 1] bits> {
            [first] first_out = Conv (x, w)
            [act] act_out = Relu (first_out)
            [pool] pool_out = MaxPool <kernel_shape = [1, 1]> (act_out)
            [side] side_out = siman.QuantizedConv2d <strides = [1, 1]> (pool_out, w)
            [binary] z = siman.BinaryConv2d <channels = 4> (pool_out, bits)
        }"""
    )
    bits = onnx.numpy_helper.from_array(np.zeros((4, 3, 2, 1), np.uint8), "bits")
    graph.initializer.append(bits)
    operators = [
        Operator("act_out_nchwc", "Conv", (5, 4, 8, 8), 40.0),  # what ONNX Runtime calls Conv and Relu in one
        Operator("pool_out_nchwc", "MaxPool", (5, 4, 8, 8), 10.0),
        Operator("reorder", "ReorderOutput", (5, 4, 8, 8), 5.0),
        Operator("reorder_2", "ReorderOutput", (5, 4, 8, 8), 6.0),
        Operator("binary", "BinaryConv2d", (5, 4, 8, 8), 19.0),
        Operator("side", "QuantizedConv2d", (5, 4, 8, 8), 50.0),
        Operator("_inlfunc_BinaryConv2d_acc_nchwc", "Conv", (5, 4, 8, 8), 20.0),
        Operator("_inlfunc_QuantizedConv2d_acc_nchwc", "Conv", (5, 4, 8, 8), 50.0),
    ]
    assert layer_rows(operators, graph) == (
        Layer("first", "convolution", 1, (5, 4, 8, 8), 40.0, 0.2, 0),
        Layer("binary", "binary", 1, (5, 4, 8, 8), 19.0, 0.095, 5 * 4 * 8 * 8 * 3 * 2 * 4),
        Layer("side", "8-bit", 1, (5, 4, 8, 8), 50.0, 0.25, 0),
        Layer("Conv", "other", 2, None, 70.0, 0.35, 0),
        Layer("ReorderOutput", "other", 2, None, 11.0, 0.055, 0),
        Layer("MaxPool", "other", 1, None, 10.0, 0.05, 0),
    )


def test_share_of_the_ceiling() -> None:
    layer = Layer("a", "binary", 1, (1, 1), 250.0, 0.5, 1_000_000)
    rest = Layer("MaxPool", "other", 1, None, 250.0, 0.5, 0)
    found = LayerTimes(1, 1, (layer, rest), 0.6, 1e10)
    assert layer.macs_per_second == pytest.approx(4e9)
    assert found.ceiling_share(layer) == pytest.approx(0.4)
    assert found.ceiling_share(rest) is None
    assert replace(found, ceiling=None).ceiling_share(layer) is None
    assert found.operators_ms == 0.5
    assert found.named
    assert not replace(found, layers=(rest,)).named


def test_taps_of_grouped_uneven_and_dilated_convolutions() -> None:
    """Counted by hand from HandNet's code: kH * kW * C_in / groups."""
    graph = hand_export().model.graph
    assert binary_taps(graph) == {"grouped": 27, "uneven": 80, "dilated": 66, "point": 9, "point#2": 9}


@needs_kernels
def test_macs_of_a_profile_are_those_of_the_layers(tmp_path: Path) -> None:
    """Against the shapes that torch gives every call: groups, strides, dilation, a layer that is called twice."""
    exported = hand_export()
    path = tmp_path / "hand.onnx"
    path.write_bytes(exported.data)
    expected: dict[str, int] = {}
    taps = {"grouped": 27, "uneven": 80, "dilated": 66, "point": 9}

    def count(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            key = name if name not in expected else f"{name}#2"
            expected[key] = output.numel() * taps[name]

        return hook

    modules = dict(exported.packed.named_modules())
    handles = [modules[name].register_forward_hook(count(name)) for name in taps]
    with torch.no_grad():
        exported.packed(torch.from_numpy(noise(3, *HAND_SIZE)))
    for handle in handles:
        handle.remove()
    contestant = Contestant("binary", path, "native", native.variant())
    found = layer_times(contestant, 1, noise(3, *HAND_SIZE), 0.01, 1e12)
    assert {layer.name: layer.macs for layer in found.layers if layer.kind == "binary"} == expected
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert [layer.name for layer in found.layers if layer.kind == "convolution"] == ["stem"]
    assert (found.threads, found.batch_size) == (1, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["hand.onnx"]


def test_a_short_profile_still_has_its_runs(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def spy(events: list[dict[str, object]], runs: int) -> object:
        seen.extend(events)
        return read_profile(events, runs)

    monkeypatch.setattr(layers, "read_profile", spy)
    layer_times(stock(fp32), 1, noise(1, *SIZE), 0.0, None)
    assert sum(event["name"] == "model_run" for event in seen) == layers.MIN_RUNS


@needs_kernels
def test_the_ceiling_of_a_variant() -> None:
    variant = native.variant()
    assert variant is not None
    assert native.ceiling(variant, 0.01) > 1e9
    with pytest.raises(InputError, match="^sse9: "):
        native.ceiling("sse9", 0.01)


# Memory


def test_memory_is_that_of_a_process_of_its_own(fp32: Path) -> None:
    """Not of this one, which holds 400 MB more than torch; and activations of a larger batch count."""
    held = np.ones(50_000_000)
    small, large = (peak_memory(stock(fp32), 1, noise(count, *SIZE)) for count in (1, 64))
    assert held.nbytes == 400_000_000
    assert small is not None
    assert large is not None
    assert 0 < small < 100e6
    assert small + 64 * 4 * 3 * 64 * 48 < large < 400e6


def test_a_process_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(SimanError, match="^bad: the process that measures its memory failed: .*InputError") as caught:
        peak_memory(stock(tmp_path / "bad.onnx"), 1, noise(1, *SIZE))
    assert "\n" not in str(caught.value)


def test_cores() -> None:
    cores = usable_cores()
    assert 1 <= cores.physical <= cores.logical


# The whole


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    """HandNet's file, whose architecture timm does not know."""
    path = tmp_path / "model.onnx"
    path.write_bytes(hand_export().data)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("binary") / "model.onnx"
    path.write_bytes(export(packed_model("test_resnet", SIZE, CLASSES)).data)
    return path


def test_a_network_that_cannot_be_quantized_is_left_out(
    hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise SimanError("ONNX Runtime's quantize_static failed: no such operator")

    monkeypatch.setattr(comparison, "write_float", lambda _description, path: path.write_bytes(hand.read_bytes()))
    monkeypatch.setattr(comparison, "write_int8", fail)
    monkeypatch.setattr(comparison, "has_openvino", lambda: False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    found = bench(hand, threads=[1], seconds=1e-3)
    assert [result.name for result in found.contests[0].results] == ["binary", "ONNX Runtime fp32"]
    assert [(one.name, one.reason) for one in found.absent] == [
        ("ONNX Runtime int8", "ONNX Runtime's quantize_static failed: no such operator"),
        ("OpenVINO", "not installed; `pip install openvino` adds it to this comparison"),
    ]
    assert not list((tmp_path / "temporary").iterdir())


def test_what_fails_while_running_is_named(hand: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def explode(*_arguments: object) -> Callable[..., None]:
        def run(_images: np.ndarray) -> None:
            raise RuntimeError("Failed to allocate\n123 bytes")

        return run

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(comparison, "_contestants", lambda binary, *_rest: ([binary], []))
    monkeypatch.setattr(comparison, "open_contestant", explode)
    with pytest.raises(SimanError, match="^binary failed at --batch-size 3: Failed to allocate 123 bytes; try fewer$"):
        bench(hand, threads=[1], batch_sizes=[3], seconds=1e-3)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_openvino_stands_beside_it(file: Path) -> None:
    found = bench(file, threads=[1], batch_sizes=[1, 2], seconds=1e-3)
    names = ["binary", "ONNX Runtime fp32", "ONNX Runtime int8", "OpenVINO fp32", "OpenVINO int8"]
    for contest in found.contests:
        assert [result.name for result in contest.results] == names
    assert found.absent == ()
    assert all(one.memory_bytes for one in found.footprints)
    assert json.dumps(found.machine.openvino)


def test_the_file_is_what_runs(hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, and the baselines are of its architecture, size and classes."""
    seen: dict[str, object] = {}

    def spy(binary: Contestant, description: Description, takes_images: bool, _progress: object) -> object:
        seen.update(data=binary.file.read_bytes(), description=description, takes_images=takes_images)
        return [binary], []

    monkeypatch.setattr(comparison, "_contestants", spy)
    bench(hand, threads=[1], seconds=1e-3)
    assert seen == {"data": hand.read_bytes(), "description": read_onnx(hand).description, "takes_images": False}
