"""The speed of a small bundle's engines: with the threads and the tiles of a restoration that asks for no others.

The engines take turns, so that other work on the machine slows all alike.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.restore import load

__all__ = ["ROUNDS", "seconds_of"]

ROUNDS = 3  # after one that is not counted, as the first call of each size takes longer


def seconds_of(
    bundle: Bundle, names: Sequence[str], job: Job, weights_dir: Path | None
) -> tuple[int, dict[str, dict[str, float]]]:
    """The number of threads, and for each engine the least time that each component took in a run of the job."""
    rounds: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        restorers = {n: stack.enter_context(load(bundle, engine=n, weights_dir=weights_dir)) for n in names}
        for _ in range(ROUNDS + 1):
            for name, restorer in restorers.items():
                timed = replace(job, seconds={})
                run(restorer.bundle.program, restorer.engines, restorer.constants, timed)
                rounds[name].append(timed.seconds)
        threads = restorers[names[0]].threads
    least = {name: {c: min(each[c] for each in runs[1:]) for c in runs[0]} for name, runs in rounds.items()}
    return threads, least
