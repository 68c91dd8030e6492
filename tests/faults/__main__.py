"""The long form of the crash tests.

python tests/faults --kills 200 --seed 1
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # a forked child may not meet threads of its parent

from conftest import write_digits
from crashes import trials


def main() -> None:
    """Kill until the number is reached, one line a trial; a run that does not recover ends it with exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = write_digits(place / "digits", train=64, test=32)
        done = tried = 0
        started = time.monotonic()
        for name, done in trials(data, place, arguments.kills, arguments.seed):
            tried += 1
            print(f"{time.monotonic() - started:6.0f} s  {done} kills: {name}", flush=True)
        print(f"{done} kills in {tried} runs; every run ended as the one that nobody killed")


if __name__ == "__main__":
    main()
