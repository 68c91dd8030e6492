"""The run folder: commits, publishing after a kill, finding runs, and malformed files."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from siman_convert.errors import InputError, SimanError
from siman_convert.files import disk_errors, replacing, write_json, write_text
from siman_convert.plans import ConvDecision, Plan
from siman_convert.recipe import Recipe
from siman_convert.runs import EVALUATED, Progress, Run, RunInfo, all_runs, find_run
from siman_convert.topology import PLAIN

INFO = RunInfo(
    model="resnet18",
    classes=("cat", "dog"),
    data="digits",
    data_name="digits",
    preprocess={},
    weights="none",
    new_head=True,
    recipe_digest="0",
    created="2026-01-01",
    siman_version="0",
)
DECISION = ConvDecision(
    name="conv1", binarize=True, reason="3x3", in_channels=8, out_channels=8, kernel_size=(3, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1, bias=False, input_shape=(8, 4, 4), output_shape=(8, 4, 4), calls=1,
)  # fmt: skip
PLAN = Plan("resnet18", (3, 32, 32), (DECISION,), PLAIN)


def make_run(output: Path, name: str = "a") -> Run:
    return Run.create(output, name, INFO, Recipe(epochs=3), PLAN, {"python": "3"})


def commit(run: Run, progress: Progress, weights: bytes = b"", publish: tuple[str, ...] = ()) -> None:
    draft = run.draft_state()
    draft.mkdir()
    (draft / EVALUATED).write_bytes(weights)
    progress.publish = list(publish)
    run.commit(draft, progress)


def test_a_new_run_reads_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    assert (run.info(), run.recipe(), run.plan()) == (INFO, Recipe(epochs=3), PLAN)
    assert run.metrics() == []
    assert run.progress() == Progress()
    assert (tmp_path / "runs" / "last").read_text() == "a\n"


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    names = [make_run(tmp_path).name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]
    assert [run.name for run in all_runs(tmp_path)] == names
    assert find_run(None, tmp_path).name == "a-3"
    assert find_run("a", tmp_path).name == "a"
    assert find_run(tmp_path / "a-2", Path("elsewhere")).name == "a-2"


def test_newest_run_without_a_valid_pointer(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b")
    for pointer in ("gone\n", "../b\n", "\n"):
        (tmp_path / "last").write_text(pointer)
        assert find_run(None, tmp_path).name == "b"


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in .*start one with"):
        find_run(None, tmp_path / "nothing")
    with pytest.raises(InputError, match="no run at b"):
        find_run("b", tmp_path)
    run = make_run(tmp_path)
    with pytest.raises(InputError, match="has no best weights: resume it"):
        run.weights("best")


def test_commit_publishes_and_replaces(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    commit(run, Progress(history=[{"phase": "binary", "top1": 1.5}]), b"one", ("last", "best"))
    commit(
        run, Progress(history=[{"phase": "binary", "top1": 1.5}, {"phase": "binary", "top1": 1.0}]), b"two", ("last",)
    )
    assert run.weights("best").read_bytes() == b"one"
    assert run.weights("last").read_bytes() == b"two"
    assert [record["top1"] for record in run.metrics()] == [1.5, 1.0]
    assert [path.name for path in (run.folder / "state").iterdir()] == ["000002"]
    assert run.progress().top1("binary") == 1.0


def test_a_kill_between_commit_and_publication_is_mended(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    commit(run, Progress(history=[{"phase": "binary", "top1": 1.0}]), b"one", ("last", "best"))
    before = tmp_path / "before"
    shutil.copytree(run.folder, before)
    commit(
        run,
        Progress(history=[{"phase": "binary", "top1": 1.0}, {"phase": "binary", "top1": 2.0}]),
        b"two",
        ("last", "best"),
    )
    # As if killed right after the rename: the new state beside everything else as it was, and litter of a half-written file.
    shutil.copytree(run.folder / "state" / "000002", before / "state" / "000002")
    for name in (".tmp-best.safetensors-x", ".tmp-metrics.jsonl-y", ".tmp-model.onnx-z"):
        (before / name).write_bytes(b"half")
    (before / "state" / ".tmp-000003").mkdir()
    killed = Run(before)
    killed.publish()
    for name in ("best.safetensors", "last.safetensors", "metrics.jsonl"):
        assert (before / name).read_bytes() == (run.folder / name).read_bytes()
    assert [path.name for path in (before / "state").iterdir()] == ["000002"]
    assert [path.name for path in before.glob(".tmp-*")] == [".tmp-model.onnx-z"]  # an export's, which may be at work


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "not valid JSON"),
        ("run.json", "[]", "not a run of format"),
        ("run.json", json.dumps({"format": 99}), "written by a newer siman"),
        ("run.json", json.dumps({"format": 1}), "written by an older siman"),
        ("run.json", json.dumps({"format": 2, "classes": []}), "malformed"),
        ("run.json", "[" * 100_000, "not valid JSON"),
        ("recipe.yaml", "nonsense: 1", "unknown field 'nonsense'"),
        ("plan.json", "{}", "plan: "),
        ("metrics.jsonl", "{}\n{", "malformed"),
    ],
)
def test_malformed_files_are_one_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = make_run(tmp_path)
    (run.folder / file).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        {"run.json": run.info, "recipe.yaml": run.recipe, "plan.json": run.plan, "metrics.jsonl": run.metrics}[file]()
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError, match="half-way"), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half-way")
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_full_and_unwritable_disks_are_one_line() -> None:
    with pytest.raises(SimanError, match="full: no space left on device") as caught, disk_errors(Path("full")):
        Path("/dev/full").write_text("x")
    assert caught.value.exit_code == 1
    with pytest.raises(SimanError, match="is the disk full"), disk_errors(Path("full")):
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/0")
    with pytest.raises(RuntimeError, match="unrelated"), disk_errors(Path("full")):
        raise RuntimeError("unrelated")


def test_text_files_have_the_users_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    write_text(ours, "x")
    assert ours.stat().st_mode == plain.stat().st_mode


def test_looking_whether_a_run_is_trained_makes_no_lock_and_keeps_nobody_from_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert not run.in_training()
    assert not (run.folder / ".lock").exists()
    with run.locked():
        assert run.in_training()
    assert not run.in_training()
    look = FileLock(run.folder / ".lock", thread_local=False)
    look.acquire()
    release = threading.Timer(0.1, look.release)
    release.start()
    with run.locked():  # waits for a look to end
        assert run.in_training()
    release.join()
