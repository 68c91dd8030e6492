"""verify: what is right passes, what is wrong is found and the layer named; differences that are none are told apart."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from exported_run import BINARY, Life, copied, edit, graphs_once, life, operand, replace_in_function, tamper  # noqa: F401  fixtures
from onnx import helper, numpy_helper
from packed_models import one_thread, ort_session  # noqa: F401  one a fixture

from siman_convert import InputError, backends, export, load, operator_check, verify
from siman_convert.cli import run as siman
from siman_convert.data import eval_transform, open_source, spread_batches
from siman_convert.description import description_of
from siman_convert.layers import exact_mean
from siman_convert.onnx_file import parse_onnx, read_onnx, seal
from siman_convert.onnx_op import ATTRIBUTES, DOMAIN, INPUTS, VERSION, function_body
from siman_convert.onnx_quantized_op import QUANTIZED_OP
from siman_convert.operator_check import OperatorCheck, check_operators
from siman_convert.packed import save_packed
from siman_convert.runtime import native
from siman_convert.runtime.reference import sample_mean
from siman_convert.subjects import packed_run
from siman_convert.verification import FAR, NEAR, Verification, different_tensors, verify_file
from siman_convert.watch import Watcher

IMAGES = 16
NONE_DIFFERENT = dict.fromkeys(("torch", "onnxruntime", "native") if native.variant() else ("torch", "onnxruntime"), 0)


def only(found: dict[str, Verification]) -> Verification:
    (verification,) = found.values()
    return verification


def compared(check: Verification) -> dict[tuple[str, str], int]:
    return {model.backends: model.images for model in check.models}


# What is right


def test_a_run_with_its_files_passes(life: Life) -> None:
    found = verify(life.run, images=IMAGES)
    assert list(found) == [str(life.safetensors), str(life.onnx)]
    for verification in found.values():
        assert verification.failures == []
        assert [check.layer for check in verification.operators] == list(BINARY)
        assert [layer.layer for layer in verification.models[0].layers] == list(BINARY)
        assert all(check.different == NONE_DIFFERENT for check in verification.operators)
        assert compared(verification) == {("reference", "onnxruntime"): 4, ("torch", "onnxruntime"): IMAGES}
        assert all(model.agreeing == model.images for model in verification.models)
        assert verification.pixels is None
    signs = next(iter(found.values())).models[1].layers[0].signs
    assert signs == IMAGES * 16 * 16 * 16  # of 32x32 images behind a stem of stride 2


def test_a_run_without_files_is_verified_as_it_would_be_exported(copied: Life) -> None:
    copied.onnx.unlink()
    copied.safetensors.unlink()
    found = verify(copied.run, images=IMAGES)
    assert list(found) == [str(copied.run.folder)]
    assert only(found).failures == []
    assert not list(copied.run.folder.glob("model.*"))


@pytest.mark.parametrize(
    "options", [{"half": True, "format": "all"}, {"int8": True}, {"with_preprocess": True}], ids=str
)
def test_other_kinds_of_files_beside_their_run_pass(copied: Life, options: dict[str, Any]) -> None:
    copied.safetensors.unlink()
    export(copied.run.folder, images=4, **options)
    found = verify(copied.run, images=IMAGES)
    assert len(found) == (2 if "format" in options else 1)
    for verification in found.values():
        assert verification.failures == []
        assert (verification.pixels is not None) == ("with_preprocess" in options)
        assert compared(verification)["torch", "onnxruntime"] == IMAGES


def test_preprocessing_in_the_graph_that_is_not_evaluations(copied: Life, tmp_path: Path, digits: Path) -> None:
    (path,) = export(copied.run.folder, with_preprocess=True, images=4).files
    file = read_onnx(path)
    preprocess = replace(file.description.preprocess, mean=(0.4, 0.5, 0.5))
    (tmp_path / "x.onnx").write_bytes(seal(file.model, replace(file.description, preprocess=preprocess), file.variant))
    (failure,) = only(verify(tmp_path / "x.onnx", data=str(digits))).failures
    assert failure == "preprocessing: a pixel differs by 25.50 of 255 from evaluation's, more than 6.0"


def test_files_far_from_their_run_are_verified_on_what_is_at_hand(
    life: Life,
    tmp_path: Path,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (life.onnx, life.safetensors):
        shutil.copy(path, tmp_path)
    assert siman(["verify", str(tmp_path / "model.onnx")]) == 0
    out = capsys.readouterr().out
    assert "name some with --data; verifying on scikit-learn's digits instead" in out
    assert "verifying on 4 images of digits" in out  # only the slow reference is there to compare with
    assert "model.onnx: passed" in out
    found = only(verify(tmp_path / "model.safetensors", data=str(digits), images=IMAGES))
    assert compared(found) == {("reference", "onnxruntime"): 4, ("torch", "onnxruntime"): IMAGES}
    assert found.failures == []


def test_more_images_than_there_are(life: Life) -> None:
    assert compared(only(verify(life.onnx, images=10**9)))["torch", "onnxruntime"] == 97


def test_an_untrained_network_passes(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--weights", "none", "--epochs", "0", "--set", "calibration_images=64", "--img-size", "32", "--device", "cpu",
    ]  # fmt: skip
    output = ["--output", str(tmp_path)]
    assert siman(["convert", "test_resnet", "--data", str(digits), *arguments, *output]) == 0
    capsys.readouterr()
    assert siman(["verify", "--images", "97", *output]) == 0
    out = capsys.readouterr().out
    assert f"11 of 11 operators equal in {', '.join(NONE_DIFFERENT)} and reference" in out
    assert "top-1 agrees on" in out


# Changes to an ONNX file that lies in its run's folder


def flip_a_bit(layer: str) -> Callable[[onnx.ModelProto], None]:
    def flip(bits: np.ndarray) -> None:
        bits[0, 0, 0, 0] ^= 1

    return lambda model: edit(model, operand(model, layer, "W"), flip)


def double_scales(layer: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: edit(model, operand(model, layer, "scale"), lambda scale: np.multiply(scale, 2, out=scale))


def change_the_classifiers_bias(model: onnx.ModelProto) -> None:
    edit(model, "fc.bias", lambda bias: np.add(bias, 0.5, out=bias))


def change_the_stem(model: onnx.ModelProto) -> None:
    (first,) = (node for node in model.graph.node if node.op_type == "Conv" and node.input[0] == "input")
    edit(model, first.input[1], lambda weight: np.multiply(weight, -1, out=weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit("conv1.3"), "conv1.3: its bits in the file are not those of the network"),
        (flip_a_bit("layer4.0.conv2"), "layer4.0.conv2: its bits in the file are not those of the network"),
        (double_scales("layer2.0.conv1"), "the cause is between it and layer2.0.conv1, or in that"),
        (double_scales("layer4.0.conv2"), "the cause is in layer4.0.conv2 or behind it"),
        (change_the_classifiers_bias, "the cause is in layer4.0.conv2 or behind it"),
        (change_the_stem, "conv1.3: torch and onnxruntime see its input differently"),
    ],
    ids=["bit of the first", "bit of the last", "scale", "last scale", "bias", "stem"],
)
def test_a_changed_file_beside_its_run_is_found(
    copied: Life,
    change: Callable[[onnx.ModelProto], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tamper(copied.onnx, change)
    assert siman(["verify", str(copied.onnx), "--images", str(IMAGES)]) == 3
    out = capsys.readouterr().out
    assert f"{copied.onnx}: FAILED" in out
    (line,) = (line for line in out.splitlines() if message in line)
    assert line.startswith("  FAILED  ")
    failed = [line for line in out.splitlines() if line.startswith("  FAILED")]
    assert failed[0] == line  # what is nearest to the cause comes first


def test_a_change_far_from_the_cause_is_not_blamed_on_layers_before_it(copied: Life) -> None:
    tamper(copied.onnx, double_scales("layer2.0.conv1"))
    check = only(verify(copied.onnx, images=IMAGES)).models[1]
    unexplained = {layer.layer for layer in check.layers if layer.unexplained}
    assert unexplained == {"layer2.0.conv2"}  # every image is judged at the first layer that sees it differently
    assert all(layer.flips == 0 for layer in check.layers[: BINARY.index("layer2.0.conv2")])


def test_changed_weights_of_the_run_are_found(copied: Life, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied.run.folder / "best.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["layer1.0.conv1.weight"] = weights["layer1.0.conv1.weight"].flip(0).contiguous()
    safetensors.torch.save_file(weights, path)
    assert siman(["verify", str(copied.run.folder), "--images", str(IMAGES)]) == 3
    out = capsys.readouterr().out
    assert "layer1.0.conv1: its bits in the file are not those of the network" in out  # of model.onnx
    assert "layer1.0.conv1.weight_bits: not the run's values" in out  # of model.safetensors
    assert out.count("FAILED\n") == 2


def test_a_changed_packed_file_beside_its_run_is_found(
    copied: Life,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, right = load(copied.safetensors), load(copied.safetensors)
    build = backends.build_onnx
    monkeypatch.setattr(backends, "build_onnx", lambda _: build(right))  # saves an export; the tensors are what counts
    packed.state_dict()["layer1.0.conv2.weight_bits"][0, 0, 0, 0] ^= 1
    save_packed(packed, copied.safetensors)
    load(copied.safetensors)  # its digests are right
    assert siman(["verify", str(copied.safetensors), "--images", "4"]) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert lines[:2] == [
        f"{copied.safetensors}: FAILED",
        "  FAILED  layer1.0.conv2.weight_bits: not the run's values",
    ]


@pytest.mark.parametrize("name", ["fc.bias", "layer3.0.conv3.scale", "conv1.0.weight", "bn1.running_var"])
def test_every_tensor_of_a_packed_file_is_compared(life: Life, name: str) -> None:
    packed, trained = load(life.safetensors), packed_run(life.run)
    assert different_tensors(packed, trained) == []
    value = packed.state_dict()[name].view(-1)[:1]
    value.copy_(torch.nextafter(value, value + 1))  # by one float
    assert different_tensors(packed, trained) == [f"{name}: not the run's values"]


def test_a_file_of_another_network_in_a_runs_folder(copied: Life) -> None:
    plan = (copied.run.folder / "plan.json").read_text()
    (copied.run.folder / "plan.json").write_text(plan.replace('"reason": "', '"reason": "other '))
    for path in (copied.onnx, copied.safetensors):
        found = only(verify(path, images=4))
        assert found.failures == ["the file is not of the run it lies in: it has another plan"]
    assert [model.backends for model in found.models] == [("reference", "onnxruntime"), ("torch", "onnxruntime")]


# Far from the run, ONNX Runtime and the reference are what there is


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("GreaterOrEqual (X, m)", "LessOrEqual (X, m)"),
        ("Add (scaled, bias_o)", "Sub (scaled, bias_o)"),
        ("Add (biased, residual)", "Sub (biased, residual)"),
    ],
    ids=["sign", "bias", "residual"],
)
def test_a_changed_function_far_from_the_run_is_found(
    life: Life,
    old: str,
    new: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tamper(life.onnx, replace_in_function(old, new), tmp_path / "model.onnx")
    assert siman(["verify", str(path), "--data", "digits"]) == 3
    out = capsys.readouterr().out
    first = "layer1.0.conv2" if new.startswith("Sub (biased") else "conv1.3"  # the first with a residual
    failed = [line for line in out.splitlines() if line.startswith("  FAILED")]
    assert failed[0].startswith(f"  FAILED  {first}: onnxruntime differs from the reference in ")


def test_an_operator_that_is_wrong_by_a_rounding_is_found(life: Life, tmp_path: Path) -> None:
    """Whole logits cannot show it: the operators have to be compared with the function that the file really has."""
    scaling = replace_in_function("scaled = Mul (scale_o, acc)", "tenth = Constant <value = float {0.1}> ()\n"
        "ten = Constant <value = float {10.0}> ()\nscale_t = Mul (scale_o, tenth)\nscale_r = Mul (scale_t, ten)\n"
        "scaled = Mul (scale_r, acc)")  # fmt: skip
    path = tamper(life.onnx, scaling, tmp_path / "model.onnx")
    found = only(verify(path, data="digits"))
    assert any(check.different["onnxruntime"] for check in found.operators)
    assert all(check.different["torch"] == 0 for check in found.operators)
    assert all("onnxruntime differs from the reference in" in line for line in found.failures)
    assert found.failures


def test_a_function_that_is_missing_is_one_line(
    life: Life,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tamper(life.onnx, lambda model: model.ClearField("functions"), tmp_path / "model.onnx")
    assert siman(["verify", str(path), "--data", "digits"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("siman: ")
    assert line.endswith("conv1.3: the function siman.BinaryConv2d is missing or there twice; export it again")


# Operators of 8 bits


@pytest.fixture(scope="module")
def int8(life: Life, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = export(life.run.folder, int8=True, images=4, output=tmp_path_factory.mktemp("int8")).files
    return path


def eight_bit(found: Verification) -> list[OperatorCheck]:
    return [check for check in found.operators if check.operator == QUANTIZED_OP]


def test_operators_of_8_bits_are_compared_in_all_that_runs_them(int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch does not."""
    found = only(verify(int8, data="digits"))
    assert found.failures == []
    checks = eight_bit(found)
    assert [check.layer for check in checks] == ["conv1.0", *(f"layer{n}.0.downsample.1" for n in (2, 3, 4))]
    different = {backend: 0 for backend in NONE_DIFFERENT if backend != "torch"}
    assert all((check.different, check.neighbouring) == (different, different) for check in checks)
    assert checks[0].outputs == 2 * 16 * 16 * 16
    assert siman(["verify", str(int8), "--data", "digits"]) == 0
    out = capsys.readouterr().out
    outputs = sum(check.outputs for check in checks)
    assert f"4 of 4 8-bit operators equal in {', '.join(different)} and reference ({outputs:,} outputs)" in out
    assert f"11 of 11 operators equal in {', '.join(NONE_DIFFERENT)} and reference" in out


def change_the_second_function(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        text = onnx.printer.to_text(model.functions[1])
        assert text.count(old) == 1, text
        changed, defaults = onnx.parser.parse_function(text.replace(old, new)), model.functions[1].attribute_proto
        required = [name for name in changed.attribute if name not in {default.name for default in defaults}]
        del changed.attribute[:], changed.attribute_proto[:]  # the text has no default values
        changed.attribute.extend(required)
        changed.attribute_proto.extend(defaults)
        model.functions[1].CopyFrom(changed)

    return change


@pytest.mark.parametrize(
    ("old", "new"),
    [("Round (steps)", "Floor (steps)"), ("Min (d_from_lo, hi)", "Identity (d_from_lo)"), ("Add (scaled,", "Sub (scaled,")],
)  # fmt: skip
def test_a_changed_8_bit_function_is_found(int8: Path, old: str, new: str, tmp_path: Path) -> None:
    path = tamper(int8, change_the_second_function(old, new), tmp_path / "model.onnx")
    if "Min" in old:  # what lies beyond the range of the calibration images
        halve_the_steps = lambda model: set_x_scale(model, 0.5)  # noqa: E731
        tamper(path, halve_the_steps)
    found = only(verify(path, data="digits"))
    assert found.failures[0].startswith("conv1.0: onnxruntime differs from the reference in ")
    assert all(not any(check.different.values()) for check in found.operators if check.operator != QUANTIZED_OP)
    assert any(check.different["onnxruntime"] for check in eight_bit(found))


def set_x_scale(model: onnx.ModelProto, factor: float) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "x_scale":
                attribute.f *= factor


# Differences that are none


def verify_against(life: Life, change: Callable[[dict[str, torch.Tensor]], None], images: int = 97) -> Verification:
    """The exported file against a torch model that differs from it."""
    packed = packed_run(life.run)
    change(packed.state_dict())
    return verify_file(read_onnx(life.onnx), packed, open_source(life.run.info().data), images, Watcher())


def stem_times(factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["conv1.0.weight"][::2] *= factor  # half the channels: the same factor for all would change no sign

    return change


def flip_the_nearest(life: Life) -> Callable[[dict[str, torch.Tensor]], None]:
    """Moves a channel of the first binary layer's input just so that the activation nearest to its threshold crosses it."""
    packed, read = packed_run(life.run), []
    packed.get_submodule(BINARY[0]).register_forward_pre_hook(lambda _layer, inputs: read.append(inputs[0]))
    transform = eval_transform(description_of(packed).preprocess)
    (batch,) = spread_batches(open_source(life.run.info().data).val, transform, batch_size=97, images=97)
    with torch.no_grad():
        packed(batch.images)
    above = read[0] - exact_mean(read[0])
    distance = above.abs() / read[0].flatten(1).std(dim=1).view(-1, 1, 1, 1)
    image, channel, row, column = np.unravel_index(int(distance.argmin()), distance.shape)

    def change(state: dict[str, torch.Tensor]) -> None:
        state["conv1.1.bias"][channel] -= 1.5 * above[image, channel, row, column]

    return change


def test_flips_near_the_threshold_are_counted_and_accepted(life: Life) -> None:
    check = verify_against(life, flip_the_nearest(life))
    assert check.failures == []
    first = check.models[1].layers[0]
    assert first.flips > 0
    assert 0 < first.farthest <= NEAR
    assert check.models[1].without_flip < 97


def test_flips_far_from_the_threshold_are_not(life: Life) -> None:
    check = verify_against(life, stem_times(1.01))
    assert check.models[1].layers[0].farthest > NEAR
    assert check.failures[0].startswith("conv1.3: torch and onnxruntime see its input differently")
    assert check.failures[0].endswith("the cause is before it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_pass(life: Life, value: float) -> None:
    """NaN compares false with every bound."""

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["fc.bias"][3] = value

    check = verify_against(life, spoil, images=8)
    assert check.models[1].largest_difference == pytest.approx(FAR)
    assert [line.partition(":")[0] for line in check.failures] == ["logits"]


def test_activations_that_are_not_finite_never_pass(life: Life) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["layer1.0.conv1.scale"][0] = float("nan")

    check = verify_against(life, spoil, images=8)
    assert check.failures[0].startswith("layer1.0.conv2: torch and onnxruntime see its input differently")
    assert check.models[1].layers[3].unexplained == 8


def test_a_mean_that_rounds_differently_is_counted_and_accepted() -> None:
    x = straddling_sample()
    core, tapped = one_operator(len(x))
    images = torch.stack([torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x])
    (check,) = check_operators(core, tapped, images)
    assert check.neighbouring["torch"] > 0
    assert check.different == NONE_DIFFERENT
    assert list(check.failures()) == []


def test_a_mean_that_is_farther_off_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = straddling_sample()
    core, tapped = one_operator(len(x))

    def farther(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.nextafter(np.nextafter(sample_mean(values.numpy()), np.float32(9)), np.float32(9)))

    monkeypatch.setattr("siman_convert.frozen.exact_mean", farther)
    (check,) = check_operators(core, tapped, x[None])
    assert check.neighbouring["torch"] == 0
    assert check.different["torch"] > 0
    assert [line.partition(" differs")[0] for line in check.failures()] == ["one: torch"]


def test_an_operator_that_is_wrong_in_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    core, tapped = one_operator(4)
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert next(check_operators(core, tapped, images)).different == NONE_DIFFERENT
    right = operator_check.integer_conv

    def wrong(*arguments: object) -> torch.Tensor:
        acc = right(*arguments)  # type: ignore[arg-type]
        acc[1, 2, 3, 4] += 2
        return acc

    monkeypatch.setattr(operator_check, "integer_conv", wrong)
    (check,) = check_operators(core, tapped, images)
    assert check.different == {**NONE_DIFFERENT, "torch": 1}
    assert list(check.failures()) == ["one: torch differs from the reference in 1 of 512 outputs"]


def test_failures_of_an_operator_name_layer_backend_and_count() -> None:
    check = OperatorCheck("layer9", 2000, {"torch": 0, "onnxruntime": 1500}, {"torch": 7, "onnxruntime": 0})
    assert list(check.failures()) == ["layer9: onnxruntime differs from the reference in 1,500 of 2,000 outputs"]


def straddling_sample() -> torch.Tensor:
    """(4, 8, 8) float32 whose mean rounds to neighbouring floats in torch and in the reference, and that holds the lower one.

    Two large values that cancel make the order of the float64 sum matter. ONNX Runtime's mean is one of the two.
    """
    session = mean_in_onnxruntime()
    generator = np.random.default_rng(0)
    for _ in range(2000):
        values = (np.float32(1) + np.arange(256, dtype=np.float32) % 17 * np.float32(2**-23)).astype(np.float32)
        large = generator.uniform(1e10, 2e11)
        values[generator.choice(254, 2, replace=False)] = large, -large
        values[254:] = 2  # and the mean of all is among the values
        x = torch.from_numpy(values.reshape(1, 4, 8, 8))
        torchs, ours = float(exact_mean(x)), float(sample_mean(x.numpy()).item())
        low, high = min(torchs, ours), max(torchs, ours)
        beside = np.nextafter(np.float32(low), np.float32(9)) == np.float32(high)
        if (
            beside
            and (values == np.float32(low)).any()
            and session.run(None, {"x": x.numpy()})[0].item() in (low, high)
        ):
            return x[0]
    raise AssertionError("seed 0: no such sample in 2000")


def mean_in_onnxruntime() -> onnxruntime.InferenceSession:
    make = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=onnx.TensorProto.DOUBLE),
        helper.make_node("ReduceMean", ["wide"], ["mean"]),
        helper.make_node("Cast", ["mean"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", [make("x", onnx.TensorProto.FLOAT, None)], [make("y", onnx.TensorProto.FLOAT, None)]
    )
    return ort_session(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )


def one_operator(channels: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A graph of one 1x1 operator with a residual, plain and with the residual put out."""
    generator = np.random.default_rng(1)
    bits = generator.integers(0, 1 << channels, (channels, 1, 1, 1)).astype(np.uint8)
    vectors = {name: generator.normal(size=channels).astype(np.float32) for name in ("scale", "bias", "slope")}
    constants = [numpy_helper.from_array(value, name) for name, value in ({"W": bits} | vectors).items()]
    values = dict(zip(ATTRIBUTES, (channels, [1, 1], [0, 0, 0, 0], [1, 1], 1, 1), strict=True))
    names = ["input" if name == "X" else name for name in INPUTS]
    nodes = [
        helper.make_node("Sigmoid", ["input"], ["residual"]),
        helper.make_node("BinaryConv2d", names, ["logits"], "one", domain=DOMAIN, **values),
    ]
    shape = ["batch", channels, 8, 8]
    make, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph(nodes, "g", [make("input", kind, shape)], [make("logits", kind, shape)], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function_body(20)], ir_version=10)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.append(make("residual", kind, None))
    return model, tapped


# What the description says must be what the graph does


def test_a_graph_of_other_shapes_than_its_description(life: Life, tmp_path: Path) -> None:
    file = read_onnx(life.onnx)
    file.model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
    path = tmp_path / "model.onnx"
    path.write_bytes(seal(file.model, file.description, file.variant))
    parse_onnx(path.read_bytes())
    with pytest.raises(
        InputError, match=r"its graph has shapes \[\(0, 3, 64, 32\)\], its metadata say \(0, 3, 32, 32\)"
    ):
        verify(path)
