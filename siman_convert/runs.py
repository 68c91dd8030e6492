"""The run folder: what a conversion writes, where, and in which order, so that it can be killed at any moment.

    run.json                 model, data, preprocessing, classes, weights' origin, versions: all that eval needs
    recipe.yaml  plan.json  environment.json
    metrics.jsonl            one line an evaluation, in order
    last.safetensors  best.safetensors  full-precision.safetensors
    teacher.safetensors      where another network teaches: a run needs nothing outside itself
    state/NNNNNN/            the newest committed training state

The state is the truth. A commit writes a whole state under a temporary name, flushes it and renames it: before the rename the
former state counts, after it the new one. Weights and metrics.jsonl are published from the committed state afterwards; a
kill in between is mended by publishing again on resume. The parent folder's `last` names the newest run; its `.lock` is held
while one is made there.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, ValidationError

from siman_convert.drafts import draft_folder, give_name
from siman_convert.errors import InputError
from siman_convert.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    flush_to_disk,
    replacing,
    temporary_prefix,
    write_json,
    write_text,
)
from siman_convert.recipe import Recipe, build_recipe, parse_recipe

if TYPE_CHECKING:
    from siman_convert.plans import Plan

Record = dict[str, Any]
T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**63)]
PhaseName = Literal["full-precision", "activations", "weights", "binary"]
Published = Literal["last", "best", "full-precision"]
FORMAT = 2  # of run.json and the state; raised when a reader of the old one would be wrong
MAX_JSON_BYTES = 64 << 20  # class names of the largest data sets fit many times over
PUBLISHED = ("metrics.jsonl", *(f"{name}.safetensors" for name in ("best", "last", "full-precision", "teacher")))
LOCK = ".lock"
LOOKING = 0.5  # seconds; who only looks whether a run is being trained holds it for much less
EVALUATED = "evaluated.safetensors"  # in a state: the weights whose metrics the last record holds


@dataclass(frozen=True)
class RunInfo:
    """run.json. `data`: what open_source takes; `preprocess`: data.Preprocess as a dict; `weights`: what load_model takes;
    `new_head`: the classifier was drawn at random, so that the starting model's accuracy means nothing. `images`: training and
    validation images; `data_digest`: Source.digest, empty in runs of versions that did not keep it."""

    model: str
    classes: tuple[str, ...]
    data: str
    data_name: str
    preprocess: dict[str, Any]
    weights: str
    new_head: bool
    recipe_digest: str
    created: str
    siman_version: str
    images: tuple[int, int] = (0, 0)
    data_digest: str = ""
    format: int = FORMAT


@dataclass
class Progress:
    """How far a run is. Epochs (of the phase) and steps count what is complete; `step` is 0 but in a state saved within an epoch.

    `stage` counts the stages of the binary training from 0; their phases are called activations, weights or binary.
    `sums` are the running totals of the epoch in progress; `bad_images` maps paths of unreadable images to why.
    """

    phase: PhaseName = "full-precision"
    stage: Count = 0
    epoch: Count = 0
    step: Count = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_top1: float | None = None
    best_epoch: int | None = None
    history: list[Record] = field(default_factory=list)
    bad_images: dict[str, str] = field(default_factory=dict)
    publish: list[Published] = field(default_factory=list)  # final names that `evaluated` gets
    processes: Count = 1  # that trained; the position within an epoch means nothing to another number

    @property
    def re_estimated(self) -> bool:
        """Whether BatchNorm was re-estimated after the last epoch and the result evaluated."""
        return any(record.get("re_estimated", False) for record in self.history)

    def finished(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do."""
        stages = recipe.resolved_stages
        final = recipe.binary_epochs == 0 or recipe.final_calibration_images == 0 or self.re_estimated
        trained = self.stage == len(stages) - 1 and self.epoch == stages[-1].recipe.epochs
        return self.phase == "binary" and trained and self.best_top1 is not None and final

    def epochs(self, recipe: Recipe) -> tuple[int, int]:
        """Complete epochs of the full-precision training, or of the binary one with all its stages, and how many it has."""
        if self.phase == "full-precision":
            return self.epoch, recipe.fp_epochs
        return recipe.resolved_stages[self.stage].before + self.epoch, recipe.binary_epochs

    def top1(self, phase: str) -> float | None:
        """The newest top-1 of a phase, percent."""
        return next((r["top1"] for r in reversed(self.history) if r["phase"] == phase), None)


class Run:
    """One run folder. Reading raises InputError for what is missing or malformed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, output: Path, name: str, info: RunInfo, recipe: Recipe, plan: "Plan", environment: Record) -> "Run":
        """A new folder `output/name` (`-2`, `-3` ... where taken), visible under its name only when complete.

        Of several processes that make one in the same `output` each gets its own. What killed ones left there is removed.
        """
        with draft_folder(output) as folder:
            (folder / "state").mkdir()
            write_json(folder / "run.json", asdict(info))
            write_json(folder / "plan.json", plan.to_dict())
            write_json(folder / "environment.json", environment)
            write_text(folder / "recipe.yaml", recipe.to_yaml())
            return cls(give_name(folder, output, name))

    @property
    def name(self) -> str:
        return self.folder.name

    def info(self) -> RunInfo:
        path = self.folder / "run.json"
        values = _read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            age = "an older" if isinstance(found, int) and found < FORMAT else "a newer"
            raise InputError(f"{path}: not a run of format {FORMAT} but {found}; was it written by {age} siman?")
        info = _validated(RunInfo, values, path)
        if not info.classes:
            raise InputError(f"{path}: malformed: classes: expected at least one")
        return info

    def recipe(self) -> Recipe:
        path = self.folder / "recipe.yaml"
        return build_recipe(parse_recipe(_read(path), str(path)), origin=str(path))

    def unfinished(self) -> str | None:
        """How far a run is that is not trained to its end, in words; None where it is."""
        progress, recipe = self.progress(), self.recipe()
        if progress.finished(recipe):
            return None
        phase = "full-precision" if progress.phase == "full-precision" else "binary"
        return "at {} epoch {} of {}".format(phase, *progress.epochs(recipe))

    def plan(self) -> "Plan":
        from siman_convert.plans import Plan  # torch: `siman runs` does without

        path = self.folder / "plan.json"
        try:
            return Plan.from_dict(_read_json(path))
        except InputError as error:
            raise InputError(f"{path}: malformed: {error}") from None

    def metrics(self) -> list[Record]:
        """The records of metrics.jsonl; empty where nothing was evaluated yet."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            records = [json.loads(line) for line in _read(path).splitlines()]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: malformed: {error}") from None
        _require_records(records, path)
        return records

    def weights(self, which: str = "best") -> Path:
        """Path of the `best`, `last` or `full-precision` weights."""
        path = self.folder / f"{which}.safetensors"
        if not path.is_file():
            made = which == "full-precision" and self.progress().phase != "full-precision"
            mend = "this run made none" if made else f"resume it with `siman convert --resume {self.folder}`"
            raise InputError(f"{self.folder} has no {which} weights: {mend}")
        return path

    def state(self) -> Path | None:
        """The newest committed training state."""
        folder = self._states()
        found = (path for path in folder.iterdir() if re.fullmatch("[0-9]{6,9}", path.name)) if folder.is_dir() else ()
        return max(found, default=None)

    def progress(self) -> Progress:
        """What the newest state says; a fresh Progress where there is none."""
        while (state := self.state()) is not None:
            try:
                return self._progress_of(state)
            except InputError:
                if self.state() == state:  # else training has replaced it meanwhile
                    raise
        return Progress()

    def _progress_of(self, state: Path) -> Progress:
        path = state / "progress.json"
        progress = _validated(Progress, _read_json(path), path)
        _require_records(progress.history, path)
        stages = len(self.recipe().resolved_stages)
        if progress.stage >= stages:
            raise InputError(f"{path}: malformed: stage {progress.stage} of a recipe of {stages}")
        return progress

    def published(self, records: list[Record]) -> bool:
        """Whether these are the newest state's records, so that the published weights are theirs; without a state, nobody knows
        of others."""
        return self.state() is None or self.progress().history == records

    @contextlib.contextmanager
    def locked(self, wanted: bool = True, patience: float = 0.0) -> Iterator[None]:
        """Hold the run while it is trained; InputError where another process does, for longer than `patience` seconds.

        A killed process lets go of it, at once or when its loading processes have noticed its death.
        """
        if not wanted:
            yield
            return
        lock = FileLock(self.folder / LOCK)
        try:
            with disk_errors(self.folder):
                lock.acquire(timeout=max(patience, LOOKING))
        except Timeout:
            raise InputError(
                f"{self.folder} is being trained by another process; wait for it, or stop it first"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def in_training(self) -> bool:
        """Whether a process holds the run; False as well where nobody may write, and so nobody can ask."""
        if not (self.folder / LOCK).is_file():  # asking would make one
            return False
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:
            return False
        lock.release()
        return False

    def draft_state(self) -> Path:
        """Where the next state is to be written before `commit`; the same path in every process."""
        current = self.state()
        return self._states() / f"{TEMPORARY_PREFIX}{int(current.name) + 1 if current else 1:06d}"

    def commit(self, draft: Path, progress: Progress) -> None:
        """Make a written draft the state, publish from it, and remove what it replaces."""
        write_json(draft / "progress.json", asdict(progress))
        for path in draft.rglob("*"):
            if path.is_file():
                flush_to_disk(path)
        state = draft.with_name(draft.name.removeprefix(TEMPORARY_PREFIX))
        draft.rename(state)
        self.publish()

    def publish(self) -> None:
        """Bring metrics.jsonl and the weights in line with the newest state, then remove everything older. Idempotent."""
        state = self.state()
        if state is None:
            return
        progress = self.progress()
        if progress.publish and not (state / EVALUATED).is_file():
            raise InputError(f"{state / EVALUATED} is missing; the state is damaged, start a new run")
        for name in progress.publish:
            _copy(state / EVALUATED, self.folder / f"{name}.safetensors")
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in progress.history))
        for path in self._states().iterdir():
            if path != state:
                shutil.rmtree(path, ignore_errors=True)
        ours = tuple(
            temporary_prefix(self.folder / name) for name in PUBLISHED
        )  # an export may write in here meanwhile
        for path in self.folder.iterdir():
            if path.name.startswith(ours):
                path.unlink()

    def _states(self) -> Path:
        folder = self.folder / "state"
        if folder.is_symlink():  # what is old in it is removed: nothing outside the run may be
            raise InputError(f"{folder} is a link; expected a folder of this run")
        return folder


def run_name(model: str, data: str) -> str:
    """`<model>-<data>-<time>`, local time to the second."""
    return f"{model}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_run(which: str | Path | None, output: Path) -> Run:
    """The run of that path, of that name in `output`, or the newest one when None. Raises InputError."""
    if which is None:
        return _newest(output)
    for folder in (Path(which), output / which):
        if (folder / "run.json").is_file():
            return Run(folder)
    if Path(which).is_file():
        raise InputError(f"{which}: neither a run nor an exported file; expected a run's folder, .onnx or .safetensors")
    raise InputError(f"no run at {which}: expected a folder with run.json; `siman runs` lists those in {output}")


def all_runs(output: Path) -> list[Run]:
    """The runs in a folder, oldest first."""
    folders = [path for path in output.iterdir() if (path / "run.json").is_file()] if output.is_dir() else []
    visible = [path for path in folders if not path.name.startswith(TEMPORARY_PREFIX)]
    return [Run(path) for path in sorted(visible, key=lambda path: (path / "run.json").stat().st_mtime_ns)]


def _newest(output: Path) -> Run:
    pointer = output / "last"
    if pointer.is_file():
        name = _read(pointer).strip()
        if Path(name).name == name != ".." and (output / name / "run.json").is_file():
            return Run(output / name)
    runs = all_runs(output)
    if not runs:
        raise InputError(f"no run in {output}; start one with `siman convert MODEL --data PATH`, or name a run")
    return runs[-1]


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise InputError(f"{path}: not a file; is {path.parent} a run folder?")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not a file of siman's")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; is {path.parent} a run folder?") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _require_records(records: list[Any], path: Path) -> None:
    """InputError unless each is an evaluation."""
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
            raise InputError(f"{path}: malformed: expected evaluations, each with the phase that it was made in")
        wrong = [name for name in ("top1", "top5", "images") if not isinstance(record.get(name, 0), (int, float))]
        if wrong or "top1" not in record:
            raise InputError(f"{path}: malformed: expected a number for {(wrong or ['top1'])[0]} in every evaluation")


def _validated(kind: type[T], values: Any, path: Path) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
