"""The processes that load batches: how they are started, which signals they answer, and what their deaths are called."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from siman_convert.errors import SimanError

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerLoader(DataLoader[Any]):
    """A DataLoader, made with `worker_options`, whose workers outlive what a terminal or torchrun sends to the process group.

    Forked and spawned ones from their start on, those of a fork server from `_start_worker` on.
    """

    def __iter__(self) -> Any:
        if self.num_workers:
            _start_helpers()
        with _signals_held():
            return super().__iter__()


def worker_options(workers: int, pin_memory: bool, seed: int) -> dict[str, Any]:
    """Options of a WorkerLoader. Its own generator, since a DataLoader otherwise draws from torch's global one; no persistent
    workers, since those would go on with the sampler of the epoch before."""
    _leave_deaths_to_polling()
    generator = torch.Generator()
    generator.manual_seed(seed)
    return {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "generator": generator,
        "worker_init_fn": _start_worker,
        "persistent_workers": False,
    }


def worker_error(error: BaseException) -> SimanError | None:
    """What a DataLoader's error means in one line, or None if it is not one from a worker process of ours."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        how = text.splitlines()[0].removeprefix("DataLoader ").rstrip(" .")
        return SimanError(f"a data loading process ended: {how}; if memory ran out, use fewer workers (-j 0 for none)")
    if isinstance(error, SimanError) and text.startswith("Caught ") and "\nOriginal " in text:
        last = text.rstrip().splitlines()[-1]  # "siman_convert.errors.InputError: the one line"
        return type(error)(last.partition(": ")[2])
    return None


def _start_helpers() -> None:
    """What multiprocessing starts beside workers that it does not fork, lest it do so while signals are held: the tracker would
    let them through again, and all that the fork server ever starts would be without them."""
    if multiprocessing.get_start_method() == "fork" or not hasattr(signal, "pthread_sigmask"):
        return
    resource_tracker.ensure_running()
    if multiprocessing.get_start_method() == "forkserver":
        importlib.import_module("multiprocessing.forkserver").ensure_running()  # Windows has none


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What is started inside gets no group signal before `_start_worker`; this thread gets them a moment later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_deaths_to_polling() -> None:
    """Keeps torch from raising the death of a worker out of a SIGCHLD handler, wherever the main thread then is.

    Between the taking of a queue's lock and the statement that gives it back, the lock stayed taken, and the end of the loader
    waited for it for ever. Without the handler the next look at the workers finds the death, within five seconds.
    """
    signal_handling._SIGCHLD_handler_set = True


def _start_worker(_: int) -> None:
    """Ctrl-C and torchrun's signals reach the whole process group: the parent alone answers them and ends its workers.

    In a group of its own a worker gets SIGTERM from its parent only, whose way to end it that is: hence the default (the parent's
    handler was inherited). What came before is forgotten: to ignore a signal drops one that was held.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
    torch.set_num_threads(1)
