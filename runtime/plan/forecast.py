"""How much of a job's work is done, and how long the rest takes, by the seconds that its calls have taken so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Forecast", "Part", "forecast"]


@dataclass(frozen=True)
class Part:
    """Nodes that run the same components."""

    components: tuple[str, ...]  # one for each call
    nodes: int
    done: int
    before: int = 0  # nodes that were done before the job began, by an earlier run


@dataclass(frozen=True)
class Forecast:
    """The share of a job's work that is done, and the seconds that are left; none while too little is known."""

    share: float
    left_s: float | None


def forecast(parts: Sequence[Part], call_s: Mapping[str, float], elapsed_s: float) -> Forecast:
    """The forecast of a job. `call_s`: component -> mean seconds of a node in it, of those that were timed.

    A component that was not timed yet counts as the mean of the others. If most of the calls that are left are of these
    components, nobody knows how long they take.
    """
    usual = sum(call_s.values()) / len(call_s) if call_s else 1.0
    costs = [sum(call_s.get(name, usual) for name in part.components) for part in parts]
    total, done, new = (
        sum(count * cost for count, cost in zip(counts, costs, strict=True))
        for counts in ([p.nodes for p in parts], [p.done for p in parts], [p.done - p.before for p in parts])
    )
    if total <= 0:
        return Forecast(1.0, 0.0)
    left = {name: 0 for part in parts for name in part.components}
    for part in parts:
        for name in part.components:
            left[name] += part.nodes - part.done
    timed = sum(count for name, count in left.items() if name in call_s)
    known = new > 0 and 2 * timed >= sum(left.values())
    return Forecast(done / total, elapsed_s * (total - done) / new if known else None)
