"""The launcher's side of a training of several processes: who of them this one is, and what they say beside training.

torchrun, and `accelerate launch` through it, tell each process its rank in the environment. Their agent keeps a key-value
store that outlives the processes it starts anew (--max-restarts). Two things stand in it: the folder of the run that this launch
trains, with which processes started anew go on, and whether a process has said already why it fails.
"""

import contextlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

RUN_KEY = "siman/run"
PATIENCE = timedelta(seconds=10)  # with a store that does not answer
JOINING = timedelta(minutes=30)  # torch's own, for processes that start at different times


def processes() -> int:
    """Processes of this training; 1 unless a launcher started more."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes, to files and to the terminal."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """This process's number, from 0, among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def attempt() -> int:
    """How often the launcher has started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rejoin(backend: str) -> None:
    """Make the process group of a later attempt on one machine; in all other cases accelerate makes it.

    In the store the former attempt's addresses still stand, and torch (2.14) looks under the same names again: whoever comes
    first finds a process that has ended. So each attempt gets names of its own. Over several machines the numbers of attempts may
    differ, and torch is left to itself.
    """
    import torch.distributed

    if attempt() == 0 or os.environ.get("GROUP_WORLD_SIZE") != "1" or torch.distributed.is_initialized():
        return
    if store := _store(JOINING):
        names = torch.distributed.PrefixStore(f"siman/group/{attempt()}", store)  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=names, rank=int(os.environ["RANK"]), world_size=processes())


def leave() -> None:
    """End the process group when all is done; NCCL warns, in every process, where nobody did."""
    if processes() > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def fails_first() -> bool:
    """Whether no other process of this attempt has asked this before: one of them says why all end.

    Those that fail later mostly fail because the first is gone. Where there is no store to ask, all speak.
    """
    with contextlib.suppress(RuntimeError):
        store = _store() if processes() > 1 else None
        return store is None or store.add(f"siman/failed/{attempt()}", 1) == 1
    return True


def remember_run(folder: str) -> None:
    """Let the processes of a later attempt know the run of this launch."""
    if store := _store():
        store.set(RUN_KEY, folder)


def former_run() -> str | None:
    """The run that an earlier attempt of this launch began. To be asked before `remember_run` is called."""
    store = _store()
    return store.get(RUN_KEY).decode() if store and store.check([RUN_KEY]) else None


def _store(patience: timedelta = PATIENCE) -> "TCPStore | None":
    """The agent's store; None where processes were started without one. Raises RuntimeError if it does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
