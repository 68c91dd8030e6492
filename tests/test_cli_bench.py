"""siman bench as a user types it: what it prints, what its JSON holds, and what bad input gets. No time is asserted."""

# ruff: noqa: F811  parameters are named as the fixtures that are imported

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from exported_run import BINARY, Life, graphs_once, life, printed  # noqa: F401  fixtures
from packed_models import export, one_thread, packed_model  # noqa: F401  a fixture

from siman_convert.benchmark import comparison
from siman_convert.benchmark.baselines import write_float
from siman_convert.benchmark.comparison import Contest, Result
from siman_convert.benchmark.rounds import Ratio, Timing
from siman_convert.cli import run as siman
from siman_convert.cli.bench_text import milliseconds, times, verdict_lines
from siman_convert.description import description_of
from siman_convert.onnx_file import Variant, seal
from siman_convert.onnx_preprocess import add_preprocess
from siman_convert.packed import save_packed
from siman_convert.runtime import native

SIZE, CLASSES = (3, 64, 48), 7
FAST = ["--seconds", "0.001"]
NAMES = ["binary", "ONNX Runtime fp32", "ONNX Runtime int8"]


@pytest.fixture(scope="module", autouse=True)
def baseline_once() -> Iterator[None]:
    """The full-precision network of a description is exported once, and OpenVINO is not there."""
    written: dict[str, bytes] = {}

    def write(description: Any, path: Path) -> None:
        key = f"{description.architecture} {description.preprocess.input_size} {len(description.classes)}"
        if key not in written:
            write_float(description, path)
            written[key] = path.read_bytes()
        path.write_bytes(written[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "write_float", write)
        patch.setattr(comparison, "has_openvino", lambda: False)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network as model.onnx, model.safetensors, and images.onnx, which takes decoded images; foreign.onnx has no baseline."""
    folder = tmp_path_factory.mktemp("files")
    exported = export(packed_model("test_resnet", SIZE, CLASSES))
    described = description_of(exported.packed)
    (folder / "model.onnx").write_bytes(exported.data)
    wider = add_preprocess(exported.model, described.preprocess)
    (folder / "images.onnx").write_bytes(seal(wider, described, Variant(takes_images=True)))
    foreign = replace(described, architecture="resnet_of_mine")
    (folder / "foreign.onnx").write_bytes(seal(exported.model, foreign, Variant()))
    save_packed(exported.packed, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a command does, it leaves nothing behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What --json prints, all of stdout; nothing stands on stderr."""
    capsys.readouterr()
    assert siman(["bench", *arguments, *FAST, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out, parse_constant=pytest.fail)  # NaN is not JSON
    return found


def test_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(files / "model.onnx"), "--threads", "1", "-b", "1,3,1")
    assert list(found) == [
        "schema_version", "subject", "architecture", "classes", "image_shape", "takes_images", "backend", "variant",
        "note", "machine", "contests", "footprints", "absent", "layers",
    ]  # fmt: skip
    variant = native.variant()
    assert (found["schema_version"], found["subject"]) == (1, str(files / "model.onnx"))
    assert (found["architecture"], found["classes"]) == ("test_resnet", CLASSES)
    assert (found["image_shape"], found["takes_images"]) == (list(SIZE), False)
    assert (found["backend"], found["variant"]) == ("native" if variant else "onnxruntime", variant)
    assert found["machine"]["onnxruntime"] == onnxruntime.__version__
    assert [(contest["threads"], contest["batch_size"]) for contest in found["contests"]] == [(1, 1), (1, 3)]
    for contest in found["contests"]:
        assert [result["name"] for result in contest["results"]] == NAMES
        for result in contest["results"]:
            check_result(result, contest["batch_size"])
        assert len({result["rounds"] for result in contest["results"]}) == 1
    assert found["contests"][0]["results"][0]["ratio"] is None
    check_footprints(found["footprints"], files)
    assert [one["name"] for one in found["absent"]] == ["OpenVINO"]
    check_layers(found["layers"], files / "model.onnx")
    assert not (files / "bench.json").exists()  # it is no run's folder


def check_result(result: dict[str, Any], batch_size: int) -> None:
    assert 0 < result["median_ms"] <= result["p95_ms"]
    assert result["images_per_second"] == pytest.approx(1e3 * batch_size / result["median_ms"])
    assert result["runs"] >= result["rounds"] >= 5
    assert (result["ratio"] is None) == (result["name"] == "binary") == (result["binary_is"] is None)
    if result["ratio"]:
        assert 0 < result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
        assert result["binary_is"] == Ratio(**result["ratio"]).verdict


def check_footprints(footprints: list[dict[str, Any]], files: Path) -> None:
    assert [one["name"] for one in footprints] == NAMES
    assert footprints[0]["file_bytes"] == (files / "model.onnx").stat().st_size
    assert footprints[0]["file_bytes"] < footprints[2]["file_bytes"] < footprints[1]["file_bytes"]
    assert all(one["open_ms"] > 0 and one["memory_bytes"] > 0 for one in footprints)


def check_layers(layers: dict[str, Any], file: Path) -> None:
    """MACs are those that `siman inspect` counts."""
    assert (layers["threads"], layers["batch_size"]) == (1, 1)
    assert sum(row["share"] for row in layers["rows"]) == pytest.approx(1)
    assert sum(row["microseconds"] for row in layers["rows"]) == pytest.approx(1e3 * layers["operators_ms"])
    others = [row["microseconds"] for row in layers["rows"] if row["kind"] == "other"]
    assert all(a >= b for a, b in pairwise(others))
    if native.variant() is None:
        return
    binary = [row for row in layers["rows"] if row["kind"] == "binary"]
    assert {row["name"]: row["macs"] for row in binary} == inspected_macs(file)
    for row in binary:
        assert row["macs_per_second"] == pytest.approx(row["macs"] / row["microseconds"] * 1e6)
        assert row["ceiling_share"] == pytest.approx(row["macs_per_second"] / layers["ceiling_macs_per_second"])


def inspected_macs(subject: Path) -> dict[str, int]:
    """1-bit MACs of every binary convolution, as `siman inspect` gives them."""
    rows = json.loads(printed("inspect", str(subject), "--json"))["layers"]
    return {row["name"]: row["binary_macs"] for row in rows if row["binary_macs"]}


def test_text(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert siman(["bench", str(files / "model.onnx"), "--threads", "1", *FAST]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert f"ONNX Runtime {onnxruntime.__version__}" in lines[0]
    assert str(native.variant()) in lines[0]
    assert lines[1] == f"{files}/model.onnx: test_resnet, {CLASSES} classes, float32 images of 3x64x48"
    for name in NAMES:
        assert re.search(rf"^  {name} +[\d.]+ ms", captured.out, re.MULTILINE)
        assert re.search(rf"^{name} +[\d.]+ MB +[\d.]+ ms +[\d.]+ MB$", captured.out, re.MULTILINE)
    assert (
        len(re.findall(r"^Binary is .*ONNX Runtime (?:fp32|int8).*\(1 thread, batch 1\)\.$", captured.out, re.M)) == 2
    )
    assert "OpenVINO: not installed; `pip install openvino` adds it to this comparison" in lines
    if native.variant():
        assert all(re.search(rf"^{name} .*%", captured.out, re.MULTILINE) for name in BINARY)
    tables = [line for line in lines if re.match(r" |conv|layer|ONNX|all op", line)]
    assert max(map(len, tables)) <= 80


@pytest.mark.slow
def test_the_newest_run_and_its_last_weights(
    life: Life, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(life.folder)
    seen: list[str] = []

    def spy(subject: Any, *arguments: Any) -> Any:
        seen.append(subject.description.weights)
        return original(subject, *arguments)

    original = comparison._write_binary
    monkeypatch.setattr(comparison, "_write_binary", spy)
    monkeypatch.setattr(comparison, "_contestants", lambda binary, *_rest: ([binary], []))
    for flags in ([], ["--last"]):
        found = document(capsys, *flags, "--threads", "1")
        assert found["subject"] == f"runs/{life.run.name}"
        if native.variant():
            macs = {row["name"]: row["macs"] for row in found["layers"]["rows"] if row["macs"]}
            assert macs == inspected_macs(life.run.folder)
    assert seen == ["best", "last"]


@pytest.mark.slow
def test_a_packed_file_is_benched_as_the_graph_it_exports(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(files / "model.safetensors"), "--threads", "1")
    assert found["footprints"][0]["file_bytes"] == (files / "model.onnx").stat().st_size


def test_a_file_that_takes_images(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So do the others: all of them resize."""
    assert siman(["bench", str(files / "images.onnx"), "--threads", "1", "--batch-size", "2", *FAST]) == 0
    out = capsys.readouterr().out
    assert f"{CLASSES} classes, uint8 images of 67x50x3\npreprocessing is part of every network here" in out
    assert all(f"\n  {name} " in out for name in NAMES)


@pytest.mark.slow
def test_without_our_kernels(files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, that is no news; where they are missing, it is said once."""
    found = document(capsys, str(files / "model.onnx"), "--threads", "1", "--backend", "onnxruntime")
    assert (found["backend"], found["variant"]) == ("onnxruntime", None)
    assert {row["kind"] for row in found["layers"]["rows"]} == {"convolution", "other"}
    assert found["layers"]["ceiling_macs_per_second"] is None
    names = {row["name"] for row in found["layers"]["rows"] if row["kind"] == "convolution"}
    assert names.isdisjoint(BINARY)
    assert "conv1.0" in names
    monkeypatch.setattr(native, "variants", dict)
    monkeypatch.setattr(native, "find_library", lambda: None)
    capsys.readouterr()
    assert siman(["bench", str(files / "model.onnx"), "--threads", "1", *FAST]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"siman: {native.MISSING}\n"
    assert "their own times need our kernels" in captured.out
    assert siman(["bench", str(files / "model.onnx"), "--backend", "native"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0: expected 1 to "),
        (["--threads", "4096"], "--threads 4096: expected 1 to "),
        (["--threads", "1,two"], "--threads '1,two': expected whole numbers separated by commas, as --threads 1,2"),
        (["--threads", ""], "--threads '': expected whole numbers"),
        (["-b", "0"], "--batch-size 0: expected images at a time, 1 or more"),
        (["-b", "1,-2"], "--batch-size '1,-2': expected whole numbers"),
        (["--seconds", "0"], "--seconds 0: expected more than 0"),
        (["--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["--seconds", "inf"], "--seconds inf: expected more than 0"),
        (["--backend", "torch"], "--backend torch: expected native or onnxruntime"),
        (["--backend", "tvm"], "--backend 'tvm': expected "),
        (["--last"], "model.onnx holds one network; --last is for runs"),
        (["--batch-size", "999999999"], "--batch-size 999999999: memory does not hold so many images; try fewer"),
    ],
)
def test_refused(arguments: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["bench", str(files / "model.onnx"), *arguments], message, capsys)


def test_files_that_cannot_be_benched(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["bench", str(tmp_path / "no.onnx")], "no such file", capsys)
    refused(["bench", "--output", str(tmp_path)], "no run", capsys)
    refused(["bench", str(files / "foreign.onnx")], "unknown model 'resnet_of_mine'", capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert siman(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("siman: ")
    assert message in line


# Sentences


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        (Ratio(4.789, 4.6, 5.0), "Binary is 4.79x faster than them (2 threads, batch 16)."),
        (Ratio(0.5, 0.4, 0.98), "Binary is NOT faster than them: 0.50x, slower in most rounds (2 threads, batch 16)."),
        (
            Ratio(1.02, 0.97, 1.1),
            "Binary is NOT measurably faster than them, nor slower: 1.02x, half of the rounds 0.97x to 1.10x "
            "(2 threads, batch 16).",
        ),
    ],
)
def test_verdicts(ratio: Ratio, sentence: str) -> None:
    timing = Timing(1.0, 1.0, 1, (1.0,))
    results = (Result("binary", timing, 1.0, None), Result("them", timing, 1.0, ratio))
    assert list(verdict_lines(Contest(2, 16, results))) == [sentence]


def test_numbers_as_people_read_them() -> None:
    assert [milliseconds(value) for value in (0.1234, 8.416, 42.26, 1234.5)] == [
        "0.123 ms", "8.42 ms", "42.3 ms", "1,234 ms",
    ]  # fmt: skip
    assert [times(value) for value in (0.924, 4.789, 9.994, 12.34)] == ["0.92x", "4.79x", "9.99x", "12.3x"]
