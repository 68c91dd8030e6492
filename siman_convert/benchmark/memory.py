"""The peak memory of one contestant, in a process of its own: `python -m siman_convert.benchmark.memory SPECIFICATION`.

What is counted: the most physical memory that the process ever held while it opened the file and ran one batch, less
what a process holds that only imports the engine. The batch itself, the file's bytes while they are read, weights,
their rearranged copies and activations all count; Python and the engine's libraries do not.

On Linux the figure is VmHWM: ru_maxrss of a child starts at what its parent held when it was made, here hundreds of
megabytes of torch. Elsewhere it is ru_maxrss, and None where the system has neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from siman_convert.benchmark.contestants import Contestant, Engine, Images, import_engine, open_contestant
from siman_convert.errors import SimanError

_STATUS = Path("/proc/self/status")


def peak_memory(contestant: Contestant, threads: int, images: Images) -> int | None:
    """Bytes, of opening the file and running one batch like `images`. Raises SimanError where the process fails."""
    values = {"file": str(contestant.file), "threads": threads, "shape": images.shape, "dtype": images.dtype.name}
    try:
        whole, bare = _in_child(contestant.engine, values), _bare(contestant.engine)
    except SimanError as error:
        raise SimanError(f"{contestant.name}: the process that measures its memory failed: {error}") from error
    return None if whole is None or bare is None else max(0, whole - bare)


@cache
def _bare(engine: Engine) -> int | None:
    """Peak of a process that only imports the engine."""
    return _in_child(engine, {})


def _in_child(engine: Engine, work: dict[str, Any]) -> int | None:
    command = [sys.executable, "-m", __name__, json.dumps({"engine": engine, "work": work})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SimanError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    peak: int | None = json.loads(done.stdout)
    return peak


def main(specification: str) -> None:
    """The child: does its work and prints its peak, in bytes, or null."""
    values: dict[str, Any] = json.loads(specification)
    engine: Engine = values["engine"]
    work: dict[str, Any] = values["work"]
    import_engine(engine)
    if work:
        run = open_contestant(Contestant("", Path(work["file"]), engine), work["threads"], tuple(work["shape"]))
        run(np.ones(work["shape"], work["dtype"]))
    print(json.dumps(_peak_bytes()))


def _peak_bytes() -> int | None:
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(sys.argv[1])
