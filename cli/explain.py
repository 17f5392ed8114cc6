"""The verb `tilewright export explain`."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tilewright.cli.terminal import answer, table

__all__ = ["explain"]

MANY = {"code": "source file", "network": "network", "graph": "graph", "weights": "weight file"}  # counted, not listed


def explain(arguments: argparse.Namespace) -> None:
    """Print why each stage ran, what runs again after a change, and why each engine is chosen."""
    from tilewright.export.explain import explain

    report = explain(arguments.bundle, arguments.expect)
    answer(arguments, report, "\n".join([*_stages(report), *_engines(report)]))


def _stages(report: dict[str, Any]) -> Iterator[str]:
    if not report["remembered"]:
        why = "another machine or folder, a cleaned cache, or engines added since"
        yield f"the cache here knows no build of {report['bundle']} as it is: {why}"
        return
    rows = [
        [s["stage"], _state(s), f"{s['seconds']:.1f} s" if "seconds" in s else "", _short(s["inputs"])]
        for s in report["stages"]
    ]
    yield table(["stage", "result", "last run", "decided by"], rows)
    yield ""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, stages in report["runs_again"].items():
        groups.setdefault(tuple(stages), []).append(name)
    yield table(["after a change of", "run again"], [[_short(names), ", ".join(s)] for s, names in groups.items()])
    yield ""
    changed = sorted({name for s in report["stages"] for name in s["changed"]})
    if changed:
        run = [s["stage"] for s in report["stages"] if s["would_run"]]
        yield f"changed since: {_short(changed, counted=())}; {', '.join(run)} would run"
    else:
        yield "no source file, package or weight file has changed since"


def _state(stage: dict[str, Any]) -> str:
    return f"in {stage['directory']}" if stage["cached"] else "no longer in the cache"


def _short(names: Iterable[str], counted: Iterable[str] = tuple(MANY)) -> str:
    """Names of inputs in one line; those of a kind that has many are counted."""
    kinds = {name: name.partition(" ")[0] if " " in name else "" for name in names}
    many = Counter(kind for kind in kinds.values() if kind in counted)
    few = [name for name, kind in kinds.items() if kind not in counted]
    return ", ".join([*few, *(f"{n} {MANY[kind]}{'s' * (n > 1)}" for kind, n in sorted(many.items()))])


def _engines(report: dict[str, Any]) -> Iterator[str]:
    for name, component in report["components"].items():
        chosen = component["chosen"]
        engines = component["engines"]
        why = "the only one" if len(engines) == 1 else "the best that runs here"
        yield f"{name}: {chosen}, {why}" if chosen else f"{name}: no engine runs here"
        yield from (f"    not {e['name']}: {e['reason']}" for e in engines if e["name"] != chosen)
