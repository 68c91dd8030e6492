"""Around a whole command: signals become a wish to stop, and what libraries raise becomes one line."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from siman_convert.data import worker_error
from siman_convert.errors import Interrupted, SimanError


@dataclass
class Stop:
    """Set from a signal handler; whoever works looks at it between steps."""

    requested: bool = False

    def check(self, what: str) -> None:
        """Raise Interrupted, saying `what` that means, when a signal asked to stop."""
        if self.requested:
            raise Interrupted(what)


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM asks for a clean stop, a second one ends at once. Does nothing outside the main thread."""
    stop = Stop()
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        stop.requested = True  # and no more: printing from a handler may interrupt a print

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def one_line_errors(batch_size: int, grad_accum_steps: int) -> Iterator[None]:
    """Out of memory, and the death of a data worker or of another training process, as one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and (translated := worker_error(error)):
            raise translated from error
        if _is_lost_process(error):
            raise SimanError("another process of this training ended, or cannot be reached any more; what was saved before "
                             "is kept and can be resumed") from error  # fmt: skip
        if _is_out_of_memory(error):
            fewer = f"--batch-size {batch_size // 2} --grad-accum-steps {2 * grad_accum_steps} (as many images a step)"
            advice = fewer if batch_size > 1 else "a smaller --img-size"
            raise SimanError(f"out of memory at --batch-size {batch_size}; try {advice}") from error
        raise


def _is_lost_process(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors that name its source files; torch's own are DistError and its subclasses."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    texts = ("not enough memory", "can't allocate memory", "CUDA out of memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)
