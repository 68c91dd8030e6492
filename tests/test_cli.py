"""The command line end to end on real images, in this process: what users type, what they get, what bad input gets."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from siman_convert.cli import run as siman
from siman_convert.model_table import STAGES, make_row, read_coverage, read_table
from siman_convert.models import create
from siman_convert.runs import Run

AGAIN = {"phase": "binary", "re_estimated": True}  # the evaluation after BatchNorm was re-estimated at the end
FAST = ["--set", "calibration_images=64", "-b", "64", "--img-size", "32", "--device", "cpu"]


def converted(output: Path, data: Path, *extra: str) -> int:
    return siman(
        ["convert", "test_resnet", "--data", str(data), "--weights", "none", "--output", str(output), *FAST, *extra]
    )


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished conversion: one full-precision epoch, two binary ones."""
    output = tmp_path_factory.mktemp("runs")
    assert converted(output, digits, "--fp-epochs", "1", "--epochs", "2", "--experiment", "one") == 0
    return Run(output / "one")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("siman: ")
    return lines[0]


def test_the_run_folder_is_complete(finished: Run) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "run.json", "recipe.yaml", "plan.json", "environment.json", "metrics.jsonl", "state",
        "full-precision.safetensors", "best.safetensors", "last.safetensors", ".lock",
    }  # fmt: skip
    assert (finished.folder.parent / "last").read_text() == "one\n"
    records = [(record["phase"], record["epoch"]) for record in finished.metrics()]
    assert records == [("full-precision", 1), ("binary", 0), ("binary", 1), ("binary", 2), ("binary", 2)]
    assert [record.get("re_estimated", False) for record in finished.metrics()] == [False] * 4 + [True]
    assert finished.info().model == "test_resnet"
    assert finished.recipe().epochs == 2


def test_training_moves_latents_and_alpha_and_decays_neither(finished: Run) -> None:
    last = safetensors.torch.load_file(finished.weights("last"))
    names = finished.plan().binarized
    assert names
    for name in names:
        assert last[f"{name}.alpha"].shape == (last[f"{name}.weight"].shape[0],)
        magnitudes = last[f"{name}.weight"].abs()
        assert magnitudes.std() < magnitudes.mean()  # the clip drives magnitudes together (0.76 for a Gaussian)


@pytest.mark.parametrize("which", ["best", "last", "full-precision"])
def test_eval_repeats_what_training_reported(finished: Run, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"best": [], "last": ["--last"], "full-precision": ["--full-precision"]}[which]
    command = ["eval", "one", "--output", str(finished.folder.parent), "--json", "--device", "cpu", *flags]
    assert siman(command) == 0
    document = json.loads(capsys.readouterr().out)
    phase = "full-precision" if which == "full-precision" else "binary"
    records = [record for record in finished.metrics() if record["phase"] == phase]
    expected = max(records, key=lambda record: record["top1"]) if which == "best" else records[-1]
    assert (document["top1"], document["top5"], document["images"]) == (expected["top1"], expected["top5"], 97)
    assert document["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert document["schema_version"] == 1


def test_eval_without_a_name_takes_the_newest_run(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert siman(["eval", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "runs/one, best weights, 97 images" in out
    assert f"top-1 {max(r['top1'] for r in finished.metrics() if r['phase'] == 'binary'):.2f} %" in out


def test_runs_lists_it(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["runs", "--output", str(finished.folder.parent), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["name"], row["status"], row["finished"], row["epochs_done"]) == ("one", "done", True, 2)
    assert row["full_precision_top1"] == finished.metrics()[0]["top1"]


def statuses(output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Of every run by name, as people read it."""
    capsys.readouterr()
    assert siman(["runs", "--output", str(output)]) == 0
    _, titles, *lines = capsys.readouterr().out.splitlines()
    place, end = titles.index("status"), titles.index("precision")
    assert not [line for line in lines if line != line.rstrip()]
    return {line.split()[0]: line[place:end].strip() for line in lines}


def test_runs_tells_what_trains_from_what_is_done(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder, tmp_path / "one")
    shutil.copytree(finished.folder, tmp_path / "two")
    (tmp_path / "two" / "run.json").write_text("{}")
    (tmp_path / "two" / ".lock").unlink()
    run = Run(tmp_path / "one")
    with run.locked():
        assert statuses(tmp_path, capsys)["one"] == "running, epoch 2 of 2"
        assert siman(["runs", "--output", str(tmp_path), "--json"]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["runs"]}
        assert (rows["one"]["status"], rows["two"]["status"]) == ("running", "unreadable")
    assert statuses(tmp_path, capsys)["one"] == "done"
    assert not (tmp_path / "two" / ".lock").exists()  # looking makes none


@pytest.mark.parametrize("width", [80, None])
def test_runs_cuts_no_name(
    finished: Run,
    width: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "mobilenetv3_small_050-a-folder-of-photos-20261123-124724"
    shutil.copytree(finished.folder, tmp_path / name)
    for file in ("model.onnx", "model.safetensors"):
        (tmp_path / name / file).write_bytes(b"12345678" * 10000)
    monkeypatch.setattr("siman_convert.cli.lines.terminal_width", lambda: width)
    assert siman(["runs", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line != line.rstrip() or len(line) > (width or 200)]
    assert [line.startswith(name) for line in lines].count(True) == 1
    for file in ("model.onnx", "model.safetensors"):
        assert [line.endswith(f"{file} 0.08 MB") for line in lines].count(True) == 1


def test_inspect_a_run_and_a_model(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["inspect", str(finished.folder), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert siman(["inspect", "test_resnet", "--num-classes", "10", "--img-size", "32", "--json"]) == 0
    of_model = json.loads(capsys.readouterr().out)
    assert of_run == of_model
    assert siman(["inspect", "test_resnet", "--keep", "layer1.*"]) == 0
    assert "you asked to keep layer1.*" in " ".join(capsys.readouterr().out.split())


def test_nothing_runs_twice_on_a_finished_run(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.weights("last").read_bytes()
    assert siman(["convert", "--resume", str(finished.folder), "--device", "cpu"]) == 0
    assert finished.weights("last").read_bytes() == before
    assert "next: siman export" in capsys.readouterr().out


def test_the_re_estimated_weights_are_always_the_last(finished: Run) -> None:
    """BatchNorm alone differs from the state before, in its statistics; whether it got better decides only on `best`."""
    *former, final = [record for record in finished.metrics() if record["phase"] == "binary"]
    assert final | AGAIN == final
    best = max(former, key=lambda record: record["top1"])
    weights = {which: safetensors.torch.load_file(finished.weights(which)) for which in ("best", "last")}
    same = all(torch.equal(value, weights["best"][key]) for key, value in weights["last"].items())
    assert same == (final["top1"] > best["top1"])
    assert any(key.endswith("num_batches_tracked") and value == 5 for key, value in weights["last"].items())  # 320 / 64


def test_without_re_estimation(digits: Path, tmp_path: Path) -> None:
    flags = ["--epochs", "1", "--set", "final_calibration_images=0", "--experiment", "off"]
    assert converted(tmp_path, digits, *flags) == 0
    assert [record["epoch"] for record in Run(tmp_path / "off").metrics()] == [0, 1]
    assert Run(tmp_path / "off").progress().finished(Run(tmp_path / "off").recipe())


def test_a_random_network_teaches_nothing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said beforehand; what is trained is the same as without a teacher."""
    assert converted(tmp_path, digits, "--epochs", "1", "--experiment", "taught") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing to distil from: the model's classifier is random" in out
    assert "teacher's" not in out
    labels = ["--distill-weight", "0", "--label-weight", "1"]
    assert converted(tmp_path, digits, "--epochs", "1", "--experiment", "labels", *labels) == 0
    assert "nothing to distil" not in capsys.readouterr().out
    taught, plain = (Run(tmp_path / name).weights("last").read_bytes() for name in ("taught", "labels"))
    assert taught == plain


def test_the_teachers_cost_is_shown(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert converted(tmp_path, digits, "--dry-run", "--fp-epochs", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"30 binary epochs of 5 steps at about \S+ m?s \(\S+ m?s of it the teacher's\)", out)


def test_another_network_as_teacher(
    finished: Run, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept in the run. The same network with the same weights teaches what the model itself does."""
    weights = finished.weights("full-precision")
    flags = ["--weights", str(weights), "--epochs", "1"]
    assert converted(tmp_path, digits, *flags, "--experiment", "itself") == 0
    assert converted(tmp_path, digits, *flags, "--experiment", "named", "--teacher", f"test_resnet={weights}") == 0
    itself, named = Run(tmp_path / "itself"), Run(tmp_path / "named")
    assert itself.weights("last").read_bytes() == named.weights("last").read_bytes()
    kept = safetensors.torch.load_file(named.folder / "teacher.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in safetensors.torch.load_file(weights).items())
    assert not (itself.folder / "teacher.safetensors").exists()
    other = ["--epochs", "1", "--teacher", f"test_resnet={weights}", "--experiment", "random"]
    capsys.readouterr()
    assert converted(tmp_path, digits, *other) == 0  # the model is random, its teacher is not
    assert "nothing to distil" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnett18", "--teacher resnett18: unknown model 'resnett18'"),
        ("test_resnet=gone.pth", "--teacher test_resnet=gone.pth: no weights file at gone.pth"),
        ("test_resnet=ten.safetensors", "its classifier is not one of 3 classes, as these data need"),
        ("test_resnet=binary.safetensors", "already a binary model of siman"),
        ("vit_tiny_patch16_224=vit.safetensors", "it cannot take images of 3x32x32"),
    ],
)
def test_teachers_that_cannot_teach(
    finished: Run,
    teacher: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        for part in ("train", "val"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (40 * i, 90, 10)).save(tmp_path / "data" / part / name / f"{i}.png")
    shutil.copy(finished.weights("full-precision"), "ten.safetensors")
    shutil.copy(finished.weights("last"), "binary.safetensors")
    safetensors.torch.save_file(create("vit_tiny_patch16_224", 3).state_dict(), "vit.safetensors")
    assert converted(tmp_path / "runs", tmp_path / "data", "--img-size", "32", "--teacher", teacher) == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_single_images_that_batch_norm_cannot_normalise(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--img-size", "32", "-b", "1", "--dry-run"]
    assert converted(tmp_path / "runs", digits, *flags) == 2
    assert "cannot train on one image at a time" in last_line(capsys)
    assert not (tmp_path / "runs").exists()
    assert converted(tmp_path / "runs", digits, *flags, "--epochs", "0") == 0


def test_few_steps_are_met_with_a_smaller_batch(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converted(tmp_path, digits, "--dry-run") == 0
    assert "note an epoch is only 5 steps, which trains little; -b 16 makes it 20" in capsys.readouterr().out
    assert converted(tmp_path, digits, "--dry-run", "-b", "16") == 0
    assert "an epoch is only" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody can write into")
@pytest.mark.parametrize("command", [["convert", "test_resnet", "--weights", "none"], ["export"]])
def test_where_nothing_can_be_written_is_said_beforehand(
    command: list[str], finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = [str(finished.folder)] if command == ["export"] else []
    assert siman([*command, *subject, "--output", "/proc/siman"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("siman: --output /proc/siman: nothing can be written into /proc (")
    assert "verifying" not in captured.out


def test_dry_run_writes_nothing(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert converted(tmp_path / "runs", digits, "--dry-run") == 0
    out = capsys.readouterr().out
    assert [line[:3] for line in out.splitlines() if line[1:3] == "/5"] == [f"{n}/5" for n in range(1, 6)]
    assert "320 training and 97 validation images" in out
    assert "convolutions become binary" in out
    assert "in all" in out
    assert list(tmp_path.iterdir()) == []


def test_post_training_mode(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert converted(tmp_path, digits, "--recipe", "post-training", "--experiment", "post", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    run = Run(tmp_path / "post")
    assert [(record["phase"], record["epoch"]) for record in run.metrics()] == [("binary", 0)]
    assert result["best_top1"] == run.metrics()[0]["top1"]
    assert result["full_precision_top1"] is None  # random weights: there is nothing to measure


def test_weights_from_a_file_give_a_measured_start(finished: Run, digits: Path, tmp_path: Path) -> None:
    """The full-precision weights of a run, given as a file, are evaluated before conversion: the same top-1."""
    weights = str(finished.weights("full-precision"))
    assert converted(tmp_path, digits, "--weights", weights, "--epochs", "0", "--experiment", "w") == 0
    records = Run(tmp_path / "w").metrics()
    assert [(record["phase"], record["epoch"]) for record in records] == [("full-precision", 0), ("binary", 0)]
    assert records[0]["top1"] == finished.metrics()[0]["top1"]


def test_a_torch_checkpoint_with_another_head(finished: Run, digits: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(finished.weights("full-precision"))
    heads = [name for name in state if name.startswith("fc.")]
    assert heads
    for name in heads:
        state[name] = state[name][:3].clone()
    file = tmp_path / "three.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    assert converted(tmp_path, digits, "--weights", str(file), "--epochs", "0", "--experiment", "h") == 0
    assert [record["phase"] for record in Run(tmp_path / "h").metrics()] == ["binary"]  # a new head measures nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--opt", "adamw", "--lr", "0.001", "--warmup-epochs", "1", "--clip-grad", "1"],
        ["--model-ema", "--model-ema-decay", "0.9", "--mixup", "0.2", "--cutmix", "0.5", "--smoothing", "0.1"],
        ["--amp", "--channels-last", "--grad-accum-steps", "3", "--binarizer", "analytic", "--fp-epochs", "1"],
        [
            "--init",
            "scratch",
            "--binarizer",
            "sign",
            "--fp-epochs",
            "1",
            "--distill-temperature",
            "2",
            "--label-weight",
            "0.5",
        ],
        ["--set", "crop_padding=4", "--set", "sched_on_updates=false", "--init", "copy", "--reprob", "0.5", "-j", "1"],
    ],
    ids=["adamw", "ema-mixup", "amp", "sign", "cifar"],
)
def test_training_options(flags: list[str], digits: Path, tmp_path: Path) -> None:
    assert converted(tmp_path, digits, "--epochs", "2", "--experiment", "x", *flags) == 0
    run = Run(tmp_path / "x")
    assert len([record for record in run.metrics() if record["phase"] == "binary"]) == 4
    weights = safetensors.torch.load_file(run.weights("last"))
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_recipes_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["recipes", "ls"]) == 0
    assert "finetune" in capsys.readouterr().out
    target = tmp_path / "mine.yaml"
    assert siman(["recipes", "cp", "finetune", str(target)]) == 0
    assert siman(["recipes", "show", str(target)]) == 0
    assert "epochs: 30" in capsys.readouterr().out
    assert siman(["recipes", "show", "finetune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["lr"] == 0.003
    assert siman(["recipes", "cp", "finetune", str(target)]) == 2
    assert "exists already" in last_line(capsys)


def test_models_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["models", "resnet1*", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    swept = rows["resnet18"].pop("swept")
    known = {
        "name": "resnet18",
        "family": "resnet/resnet",
        "convolutions": 20,
        "binarized": 16,
        "parameters": 11_689_512,
    }
    assert rows["resnet18"] == {**known, "timm_hub": True}
    assert swept["stages"] == dict.fromkeys(STAGES, "passed")
    assert swept["kept"] == {"1x1 residual shortcut": 3, "stem: reads the image": 1}
    assert rows["resnet101"]["swept"]["family"] == "resnet/resnet"  # stood for by a smaller one
    assert siman(["models", "resnett18"]) == 2
    assert "did you mean resnet18" in last_line(capsys)


def test_models_command_shows_what_the_sweep_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman(["models", "resnet18*"]) == 0
    header, plain, deep, note = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1] == "from plan to ONNX"
    assert plain.split() == ["resnet18", "20", "16", "92.4", "%", "passed"]
    assert deep.split() == ["resnet18d", "22", "18", "-", "passed", "as", "resnet10t"]
    assert note == "as resnet10t: that one of its family was tried, this one not"
    assert siman(["models", "vit_tiny_patch16_224"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["vit_tiny_patch16_224", "1", "-", "-", "-"]


def test_a_failure_of_the_sweep_is_shown_with_its_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"name": "resnet34", "family": "resnet/resnet", "stages": {"plan": "passed", "onnx": "no Conv"}}
    coverage = {"resnet18": read_coverage()["resnet18"], "resnet34": {**wrong, "outcome": "failed"}}
    monkeypatch.setattr("siman_convert.model_table.read_coverage", lambda: coverage)
    lines = {}
    for name in ("resnet18", "resnet34", "resnet50"):
        assert siman(["models", name]) == 0
        lines[name] = capsys.readouterr().out.splitlines()[1]
    assert lines["resnet18"].endswith("passed")
    assert lines["resnet34"].endswith("failed at onnx: no Conv")
    assert lines["resnet50"].endswith("failed as resnet34 at onnx: no Conv")


@pytest.mark.parametrize(
    "name", ["resnet18", "test_vit", "regnetx_002", "mobilenetv3_small_050", "dla34", "nf_resnet26"]
)
def test_the_shipped_table_is_what_the_plan_says(name: str) -> None:
    assert make_row(name) in read_table()


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert siman([]) == 0
    out = capsys.readouterr().out
    assert out.count("  siman ") == 3  # examples
    assert len(out.splitlines()) <= 36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "name a model to convert"),
        (["convert", "resnett18"], "unknown model 'resnett18': timm has no such architecture; did you mean"),
        (["convert", "test_resnet", "--data", "./nowhere"], "no such path: ./nowhere"),
        (["convert", "resnet18", "--data", "nowhere"], "no such path: nowhere"),
        (["convert", "test_vit", "--weights", "none"], "none of its 1 convolutions can be binarized"),
        (["convert", "test_resnet", "--recipe", "finetun"], "did you mean finetune?"),
        (["convert", "test_resnet", "--set", "epoch=3"], "unknown field 'epoch'; did you mean epochs"),
        (["convert", "test_resnet", "--lr", "-1"], "lr: Input should be greater than 0"),
        (["convert", "test_resnet", "--weights", "gone.pth"], "no weights file at gone.pth"),
        (["convert", "test_resnet", "--weights", "none", "--keep", "layer9.*"], "layer9.*"),
        (["convert", "test_resnet", "--weights", "none", "--device", "cuda:99"], "--device cuda:99: not usable here"),
        (["convert", "resnet18.nope_in1k"], "unknown weights 'nope_in1k' of resnet18; timm has"),
        (["convert", "test_resnet", "--weights", "none", "--experiment", "a/b"], "--experiment 'a/b'"),
        (["convert", "test_resnet", "--weights", "none", "--aa", "nonsense"], "nonsense"),
        (["convert", "test_resnet", "--set", "scale=[2.0,0.1]"], "scale goes from 2.0 down to 0.1"),
        (
            ["convert", "test_resnet", "--warmup-epochs", "9", "--epochs", "3"],
            "warmup_epochs 9 leave nothing of 3 epochs",
        ),
        (["convert", "test_resnet", "--distill-weight", "0"], "both 0: nothing to learn from"),
        (["convert", "test_resnet", "--distill-temperature", "0"], "distill_temperature: Input should be greater"),
        (["convert", "test_resnet", "--init", "zeros"], "'remap', 'copy' or 'scratch'"),
        (["convert", "test_resnet", "--binarizer", "signs"], "'half', 'analytic' or 'sign'"),
        (["convert", "--resume", "gone"], "no run at gone"),
        (["convert", "--epochz", "3"], "No such option"),
        (["eval", "gone"], "no run at gone"),
        (["eval", __file__], "neither a run nor an exported file"),
        (["inspect", "gone"], "unknown model 'gone'"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert siman(arguments) == 2
    assert message in last_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a file of weights", "not a weights file"), (b"", "not a weights file")],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bad_weights_files(
    content: bytes, message: str, suffix: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    assert converted(tmp_path / "runs", digits, "--weights", str(file)) == 2
    assert message in last_line(capsys)


def test_weights_of_another_network(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, file)
    assert converted(tmp_path / "runs", digits, "--weights", str(file)) == 2
    assert "does not fit the model" in last_line(capsys)


def test_pickled_code_is_not_run(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

    file = tmp_path / "w.pth"
    torch.save({"state_dict": Attack()}, file)
    assert converted(tmp_path / "runs", digits, "--weights", str(file)) == 2
    assert "not a weights file that can be read safely" in last_line(capsys)
    assert not (tmp_path / "owned").exists()


def test_pretrained_weights_offline_name_the_ways_out(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert siman(["convert", "resnet18", "--data", str(digits), "--output", str(tmp_path / "runs")]) == 2
    line = last_line(capsys)
    assert "--weights FILE" in line
    assert "--weights none" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epochs", "9"], "epochs is 2, not 9"),
        (["--recipe", "paper-cifar10"], "was started otherwise"),
        (["--set", "lr=0.7"], "lr is 0.003, not 0.7"),
        (["--data", "digits"], "data is"),
        (["--weights", "other.pth"], "weights is none, not other.pth"),
        (["--experiment", "two"], "experiment is one, not two"),
        (["--teacher", "resnet50"], "teacher is None, not resnet50"),
        (["--distill-temperature", "2"], "distill_temperature is 4.0, not 2.0"),
        (["--label-weight", "1"], "label_weight is 0.0, not 1.0"),
    ],
)
def test_resuming_with_another_recipe_is_refused(
    finished: Run, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert siman(["convert", "--resume", str(finished.folder), *extra]) == 2
    assert message in last_line(capsys)
    assert siman(["convert", "resnet18", "--resume", str(finished.folder)]) == 2
    assert "model is test_resnet, not resnet18" in last_line(capsys)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converted(tmp_path, digits, "--epochs", "2", "--lr", "1e30", "--experiment", "nan") == 1
    line = last_line(capsys)
    assert "is not finite at step" in line or "validation loss is" in line
    run = Run(tmp_path / "nan")
    weights = safetensors.torch.load_file(run.weights("last"))
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())
    assert statuses(tmp_path, capsys) == {"nan": "stopped at epoch 0 of 2"}
    assert siman(["runs", "--output", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["status"], row["finished"]) == ("stopped", False)


def test_out_of_memory_names_a_batch_size(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr("siman_convert.train.Phase._step", fail)
    assert converted(tmp_path, digits, "--epochs", "1") == 1
    assert "try --batch-size 32 --grad-accum-steps 2" in last_line(capsys)


def test_resume_dry_run_changes_nothing(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    assert siman(["convert", "--resume", str(finished.folder), "--dry-run", "--device", "cpu"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_a_run_is_trained_by_one_process_at_a_time(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with finished.locked():
        assert siman(["convert", "--resume", str(finished.folder), "--device", "cpu"]) == 2
    assert "is being trained by another process" in last_line(capsys)


def test_output_that_is_a_file(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert converted(tmp_path / "file" / "runs", digits) == 2
    assert "is a file; expected a folder" in last_line(capsys)


def test_weights_that_are_not_finite_or_binary_already(
    finished: Run, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converted(tmp_path / "runs", digits, "--weights", str(finished.weights("best"))) == 2
    assert "already a binary model" in last_line(capsys)
    state = safetensors.torch.load_file(finished.weights("full-precision"))
    state["conv1.weight" if "conv1.weight" in state else "fc.weight"].fill_(float("nan"))
    file = tmp_path / "nan.safetensors"
    safetensors.torch.save_file(state, file)
    assert converted(tmp_path / "runs", digits, "--weights", str(file)) == 2
    assert "not finite" in last_line(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_state_is_one_line(
    finished: Run, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder, tmp_path / "one")
    state = Run(tmp_path / "one").state()
    assert state is not None
    file = state / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert siman(["convert", "--resume", str(tmp_path / "one"), "--device", "cpu"]) == 2
    assert str(state) in last_line(capsys)


def test_a_full_disk_is_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("siman_convert.train.save_weights", full)
    assert converted(tmp_path, digits, "--epochs", "1") == 1
    assert "no space left on device" in last_line(capsys)
