"""`python tests/sweep`: every architecture family of timm all the way, into siman_convert/coverage.jsonl.

A model runs in a process of its own, with a memory cap and a time limit, so that one that dies is a row like any other. Rows are
appended as they come and sorted at the end; started again it goes on, and with names it runs those anew.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from sweep_families import representatives
from sweep_stages import sweep_model

import siman_convert
from siman_convert.files import write_text
from siman_convert.model_table import COVERAGE, Row, read_table

MEMORY = 12 << 30  # bytes of address space of a model's process
SECONDS = 900  # of one model, on one core that it has for itself
PATIENCE = 10  # times as long by the clock, on a busy machine
FORK = multiprocessing.get_context("fork")  # torch, timm and the exporter are imported once


@dataclass
class Child:
    """A model on its way."""

    name: str
    family: str
    process: multiprocessing.process.BaseProcess
    answer: Connection
    started: float

    @classmethod
    def start(cls, name: str, family: str, limit: float) -> Child:
        answer, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_work, args=(name, theirs, limit), daemon=True)
        process.start()
        theirs.close()
        return cls(name, family, process, answer, time.monotonic())

    def row(self, limit: float) -> Row | None:
        """The row; None: not yet. A child that dies or takes too long gets one, too."""
        if self.answer.poll():
            try:
                row: Row = json.loads(self.answer.recv())
            except EOFError:
                self.process.join()
                slow = self.process.exitcode == -signal.SIGXCPU
                row = self._lost(f"took more than {limit:.0f} s" if slow else f"died ({self.process.exitcode})")
        elif time.monotonic() - self.started > PATIENCE * limit:
            self.process.kill()
            row = self._lost(f"no answer in {PATIENCE * limit:.0f} s")
        else:
            return None
        self.process.join()
        return row

    def _lost(self, why: str) -> Row:
        seconds = round(time.monotonic() - self.started, 1)
        stages = {"process": why}
        return {"name": self.name, "family": self.family, "stages": stages, "outcome": "failed", "seconds": seconds}


def _work(name: str, answer: Connection, limit: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 10))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    answer.send(json.dumps(sweep_model(name)))


def sweep(chosen: dict[str, str], path: Path, jobs: int, limit: float) -> None:
    """Run `chosen` (model -> family), `jobs` at a time, and append a row for each to the file."""
    waiting, running = list(chosen.items()), list[Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child.start(*waiting.pop(0), limit))
        for child in list(running):
            if (row := child.row(limit)) is not None:
                running.remove(child)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                failed = [f"{stage}: {text}" for stage, text in row["stages"].items() if text != "passed"]
                print(f"{row['outcome']:<20} {row['seconds']:6.1f} s  {row['name']}  {''.join(failed)}", flush=True)
        time.sleep(0.05)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by model; of a model with several the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> int:
    """Sweep, sort the file, print the totals; 1 if an eligible family failed."""
    parser = argparse.ArgumentParser(prog="python tests/sweep", description=__doc__)
    parser.add_argument("models", nargs="*", help="run these anew; default: every family that has no row yet")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time limit of one model, in seconds of one core"
    )
    parser.add_argument("--output", type=Path, default=Path(siman_convert.__file__).with_name(COVERAGE))
    options = parser.parse_args(arguments)
    everything = representatives(read_table())
    rows = read_rows(options.output)
    unknown = [name for name in options.models if name not in everything]
    if unknown:
        parser.error(f"{unknown[0]} is not in the sweep; it has {', '.join(sorted(everything)[:5])}, ...")
    chosen = {name: family for name, family in everything.items() if name not in rows}
    chosen = {name: everything[name] for name in options.models} or chosen
    sweep(chosen, options.output, options.jobs, options.seconds)
    rows = {name: row for name, row in read_rows(options.output).items() if name in everything}
    write_text(options.output, "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
    counts = Counter(row["outcome"] for row in rows.values())
    print(f"{len(rows)} models: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
