"""The passes of a program that must run again when inputs change, found from the program alone."""

from collections.abc import Collection

from tilewright.runtime.bundle.program import Program, untiled_values
from tilewright.runtime.errors import UsageError

__all__ = ["reached", "skipped_passes", "with_other_writers"]


def reached(program: Program) -> dict[str, set[str]]:
    """Pass -> the caller's inputs and values on which its outputs depend."""
    sources: dict[str, set[str]] = {name: {name} for name in untiled_values(program)}
    reach = {}
    for p in program.passes:
        direct = {s[1:] for *_, c in p.calls() for s in c.inputs.values() if s[0] == "$"}
        reach[p.name] = direct.union(*(sources.get(name, set()) for name in p.reads()))
        for name in p.writes():
            sources[name] = sources.get(name, set()) | reach[p.name]
    return reach


def skipped_passes(program: Program, names: Collection[str]) -> set[str]:
    """The passes without tiles that need not run, because the caller gives all their values."""
    skipped = set()
    for p in program.passes:
        if p.tiles is None and (present := p.writes() & set(names)):
            if missing := sorted(p.writes() - present):
                raise UsageError(f"input {sorted(present)[0]!r} is given without {missing[0]!r}; give all or none")
            skipped.add(p.name)
    return skipped


def with_other_writers(program: Program, again: set[str]) -> set[str]:
    """Passes to run again, with all other passes that write the same grids and values.

    A grid that one of the passes reads and a later pass overwrites must also be written again.
    """
    while True:
        names = {name for p in program.passes if p.name in again for name in p.writes()}
        for i, p in enumerate(program.passes):
            if p.name in again:
                names |= {name for later in program.passes[i + 1 :] for name in later.writes() & p.reads()}
        more = again | {p.name for p in program.passes if p.writes() & names}
        if more == again:
            return again
        again = more
