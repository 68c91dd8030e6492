"""Timing several programs beside each other, so that what disturbs the machine disturbs them all.

They take turns: in every round each runs for a moment, first once untimed, since it finds the caches full of its
predecessor's data, then at least once timed. What is said about a pair is taken from the ratios of their turns in the same
round, a fraction of a second apart: the median ratio, and the quartiles between which half of the rounds lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Literal

import numpy as np

TURN_SECONDS = 0.02  # of timed runs, at least
MIN_ROUNDS = 5
Verdict = Literal["faster", "slower", "same"]


@dataclass(frozen=True)
class Timing:
    """Of one program: milliseconds a run over all rounds, and the median of each round."""

    median_ms: float
    p95_ms: float
    runs: int
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as long another program takes as ours: the median of all rounds, and their quartiles."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """What ours is: neither faster nor slower where the quartiles lie on both sides of 1, or on it."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "same"


def take_turns(
    programs: dict[str, Callable[[], None]], seconds: float, progress: Callable[[float], None]
) -> dict[str, Timing]:
    """Time programs in rounds, for about `seconds` each. `progress` hears after each round which share is done."""
    for run in programs.values():
        run()  # the first run of all allocates
    turns: dict[str, list[list[float]]] = {name: [] for name in programs}
    started, budget_ns = perf_counter_ns(), 1e9 * seconds * len(programs)
    rounds, share = 0, 0.0
    while share < 1:
        for name, run in programs.items():
            turns[name].append(_turn(run))
        rounds += 1
        share = min(rounds / MIN_ROUNDS, (perf_counter_ns() - started) / budget_ns)
        progress(min(1.0, share))
    return {name: _timing(times) for name, times in turns.items()}


def _turn(run: Callable[[], None]) -> list[float]:
    """Milliseconds of each timed run."""
    run()
    times: list[float] = []
    while sum(times) < 1e3 * TURN_SECONDS:
        started = perf_counter_ns()
        run()
        times.append((perf_counter_ns() - started) / 1e6)
    return times


def _timing(turns: list[list[float]]) -> Timing:
    times = np.concatenate(turns)
    return Timing(
        median_ms=float(np.median(times)),
        p95_ms=float(np.percentile(times, 95)),
        runs=len(times),
        rounds_ms=tuple(float(np.median(turn)) for turn in turns),
    )


def ratio(other: Timing, ours: Timing) -> Ratio:
    """`other` over `ours`, round by round; both are of the same rounds."""
    ratios = np.divide(other.rounds_ms, ours.rounds_ms)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return Ratio(float(median), float(low), float(high))
