"""Timing several contenders: they take turns, so that a drift of the machine hits all alike. Gives medians."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["RUNS", "medians"]

RUNS, WARM_UP = 10, 2
FLUSHED = 256 * 2**20  # bytes; writing so many replaces the content of a GPU's cache


def medians(
    contenders: dict[str, Callable[[], Any]], *, runs: int = RUNS, warm_up: int = WARM_UP, gpu: bool = False
) -> dict[str, float]:
    """The median seconds of each contender; on a GPU between two events of its stream."""
    clock = _gpu_clock() if gpu else _clock
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warm_up + runs):
        for name, run in contenders.items():
            seconds[name].append(clock(run))
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def _clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_clock() -> Callable[[Callable[[], Any]], float]:
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def clock(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()  # it runs long enough that the next launches are queued in time
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return clock
