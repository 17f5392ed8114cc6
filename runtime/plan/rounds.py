"""Which passes of a program must run when inputs change: what depends on what, read off the program alone."""

from collections.abc import Collection

from tilewright.runtime.bundle.program import Program, untiled_values
from tilewright.runtime.errors import UsageError

__all__ = ["reached", "skipped_passes", "with_other_writers"]


def reached(program: Program) -> dict[str, set[str]]:
    """Pass -> the caller's inputs and values that what it makes depends on."""
    of: dict[str, set[str]] = {name: {name} for name in untiled_values(program)}
    reach = {}
    for p in program.passes:
        direct = {s[1:] for *_, c in p.calls() for s in c.inputs.values() if s[0] == "$"}
        reach[p.name] = direct.union(*(of.get(name, set()) for name in p.reads()))
        for name in p.writes():
            of[name] = of.get(name, set()) | reach[p.name]
    return reach


def skipped_passes(program: Program, given: Collection[str]) -> set[str]:
    """The passes without tiles whose values are all given."""
    skipped = set()
    for p in program.passes:
        if p.tiles is None and (there := p.writes() & set(given)):
            if missing := sorted(p.writes() - there):
                raise UsageError(f"input {sorted(there)[0]!r} is given without {missing[0]!r}; give all or none")
            skipped.add(p.name)
    return skipped


def with_other_writers(program: Program, again: set[str]) -> set[str]:
    """What is written anew is written by all who write it, and so is what is read and then written over."""
    while True:
        names = {name for p in program.passes if p.name in again for name in p.writes()}
        for i, p in enumerate(program.passes):
            if p.name in again:
                names |= {name for later in program.passes[i + 1 :] for name in later.writes() & p.reads()}
        more = again | {p.name for p in program.passes if p.writes() & names}
        if more == again:
            return again
        again = more
