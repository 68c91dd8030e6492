"""Run folders in the making: each process gets its own, and what killed ones left is removed, theirs alone."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from siman_convert import drafts
from siman_convert.drafts import OTHERS_DRAFT, PREFIX, draft_folder, give_name
from siman_convert.errors import SimanError
from siman_convert.files import ABANDONED, replacing


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def make_run(output: Path, text: str) -> Path:
    with draft_folder(output) as draft:
        (draft / "run.json").write_text(text)
        return give_name(draft, output, "run")


def test_a_draft_gets_its_name_and_last_names_it(tmp_path: Path) -> None:
    assert [make_run(tmp_path / "new", text).name for text in "ab"] == ["run", "run-2"]
    assert names(tmp_path / "new") == {"run", "run-2", "last"}
    assert (tmp_path / "new" / "last").read_text() == "run-2\n"
    assert names(tmp_path / "new" / "run") == {"run.json"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "new" / "run").stat().st_mode == plain.stat().st_mode


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"), draft_folder(tmp_path) as draft:
        (draft / "run.json").write_text("{")
        raise ValueError("half-way")
    assert names(tmp_path) == set()


def drafted(output: Path, host: str, age: float) -> Path:
    draft = output / f"{PREFIX}{host}-x"
    (draft / "state").mkdir(parents=True)
    past = time.time() - age
    os.utime(draft, (past, past))
    return draft


def test_drafts_of_killed_processes_are_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts.platform, "node", lambda: "here")
    for host, age in (("here", 0.0), ("there", OTHERS_DRAFT - 600), ("far", OTHERS_DRAFT + 600)):
        drafted(tmp_path, host, age)
    for name in (".tmp-mine", ".tmp-siman", "siman-run-here"):
        (tmp_path / name).mkdir()
    make_run(tmp_path, "")
    assert names(tmp_path) == {"run", "last", f"{PREFIX}there-x", ".tmp-mine", ".tmp-siman", "siman-run-here"}


def make_runs(output: Path, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    for number in range(20):
        make_run(output, f"{os.getpid()} {number}")


def test_processes_at_once_get_a_folder_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.time() + 2
    makers = [context.Process(target=make_runs, args=(tmp_path, start)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(120)
    assert [maker.exitcode for maker in makers] == [0] * 4
    made = [(tmp_path / name / "run.json").read_text() for name in names(tmp_path) - {"last"}]
    assert sorted(made) == sorted(f"{maker.pid} {number}" for maker in makers for number in range(20))


def hold(output: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with draft_folder(output) as draft:
        (draft / "run.json").write_text("slow")
        ready.set()
        time.sleep(600)


def test_a_draft_at_work_is_waited_for_and_that_of_a_killed_process_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    maker = context.Process(target=hold, args=(tmp_path, ready))
    maker.start()
    assert ready.wait(60)
    (draft,) = tmp_path.glob(f"{PREFIX}*")
    with (
        monkeypatch.context() as patch,
        pytest.raises(SimanError, match="another process has been making a run there for 1 s"),
    ):
        patch.setattr(drafts, "PATIENCE", 1.0)
        make_run(tmp_path, "")
    assert names(draft) == {"run.json"}
    maker.kill()
    maker.join(60)
    make_run(tmp_path, "")
    assert names(tmp_path) == {"run", "last"}


def test_temporary_files_of_killed_writers_are_removed_after_an_hour(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    ages = {"old": ABANDONED + 60, "young": ABANDONED - 60}
    for name, age in ages.items():
        for written in ("model.onnx", "other.onnx"):
            path = tmp_path / f".tmp-{written}-{name}"
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    with replacing(target) as first, replacing(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"  # the last to end
    assert names(tmp_path) == {"model.onnx", ".tmp-model.onnx-young", ".tmp-other.onnx-old", ".tmp-other.onnx-young"}
