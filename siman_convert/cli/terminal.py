"""What a person sees of a running conversion: numbered checks, progress bars, one line an epoch.

Bars are drawn on a terminal only, whatever FORCE_COLOR says. With `aside` (--json) everything goes to stderr, so that stdout
holds one document. `silent` prints nothing at all: of several processes one speaks; with -q none does.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from siman_convert.cli.common import QUIET
from siman_convert.watch import Watcher

STEPS = 5  # of the check before training


class Terminal(Watcher):
    """A Watcher that prints; a context manager, since progress bars have to be taken down."""

    def __init__(self, aside: bool = False, silent: bool = False) -> None:
        silent = silent or QUIET.get()
        self._console = Console(stderr=aside, quiet=silent, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            disable=silent or not self._console.file.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Terminal":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line, as it is."""
        self._console.print(escape(text))

    def stage(self, number: int, title: str, text: str) -> None:
        """One of the numbered checks."""
        self._console.print(f"[dim]{number}/{STEPS}[/] [bold]{title:<11}[/] {escape(text)}")

    def start_run(self, folder: Path) -> None:
        """Training starts, in this folder."""
        self.say(f"run {folder}")

    def start_epoch(self, phase: str, epoch: int, epochs: int, steps: int, done: int) -> None:
        """A bar for the steps of an epoch."""
        self._new_bar(f"{phase} {epoch + 1}/{epochs}", steps, done)

    def step(self, done: int, loss: float, top1: float, lr: float) -> None:
        """Figures of the epoch so far."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, figures=f"loss {loss:.3f}  top-1 {top1:.1f} %  lr {lr:.2g}")

    def start_evaluation(self, images: int) -> None:
        """A bar for the images of an evaluation."""
        self._new_bar("evaluating", images, 0)

    def evaluated(self, images: int) -> None:
        """So many images more."""
        if self._task is not None:
            self._bar.advance(self._task, images)

    def end_epoch(self, record: dict[str, Any], epochs: int) -> None:
        """The line of an epoch; what was not trained in an epoch is the state that a phase starts from."""
        self._drop_bar()
        stage = f"{record['epoch']}/{epochs}" if "train_loss" in record else "untrained"
        name = f"{record['phase']} {'re-estimated' if record.get('re_estimated') else stage}"
        trained = f"train loss {record['train_loss']:.3f}  lr {record['lr']:.2g}  " if "train_loss" in record else ""
        seconds = record.get("train_seconds", 0.0) + record["eval_seconds"]
        self.say(f"{name:<24} top-1 {record['top1']:.2f} %  loss {record['loss']:.3f}  {trained}{seconds:.0f} s")

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self._console.print(f"[yellow]note[/] {escape(text)}")

    def _new_bar(self, title: str, total: int, done: int) -> None:
        self._drop_bar()
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def _drop_bar(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
