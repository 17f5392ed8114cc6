"""Telling how engines in 8 bits were judged."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.cli.terminal import answer, mebibytes, table
from tilewright.runtime.bundle.manifest import PRECISIONS

__all__ = ["FRONTIER", "report_text", "tell_gate"]

MOST_GROUPS = 8

FRONTIER = ("work in 8 bits", "of linear layers", "dB", "worst", "returned to float")
HEADS = ("engine", "dB", "worst", "SSIM", "choices", "drift", "lost dB", "s/MP", "peak", "in 8 bits")


def tell_gate(arguments: argparse.Namespace, root: Path, report: dict[str, Any], before: str = "") -> None:
    """Keep and print a report of the gate, then raise its fault if it has one."""
    from tilewright.calib.judge.gates import REPORT, measurement, require
    from tilewright.runtime.bundle.digests import writing
    from tilewright.runtime.bundle.measured import remember
    from tilewright.runtime.errors import AccuracyError

    path = root / REPORT
    path.parent.mkdir(exist_ok=True)
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    remember(root, measurement(report))
    fault = None
    try:
        require(report)
    except AccuracyError as error:
        fault = error
    answer(arguments, report, f"{before}{_judged(report)}\nwritten to {path}", fault=fault)


def report_text(facts: Mapping[str, Any]) -> str:
    """A report in lines."""
    parts = [_recipe(precision, recipe) for precision, recipe in facts["recipes"].items()]
    if facts["stale"]:
        parts.append("The bundle has changed since it was judged; judge it again with 'calib gate'.")
    parts.append(_judged(facts["gate"]) if facts["gate"] else "Not judged yet; 'calib gate' does it.")
    return "\n\n".join(parts)


def _recipe(precision: str, recipe: Mapping[str, Any]) -> str:
    """What was measured for a recipe, and what it keeps."""
    from tilewright.calib.judge.frontier import frontier_rows
    from tilewright.calib.recipe.evidence import Point

    layers = recipe["layers"]
    text = (
        f"{precision}: {recipe['quantised']} of {len(layers)} layers, {recipe['linear_share']:.1%} of the linear work"
    )
    if groups := recipe["groups"]:
        rows = [[g["name"], f"{g['share']:.1%}", f"{g['mean_db']:.1f}", f"{g['worst_db']:.1f}"] for g in groups]
        text += "\n" + table(["most sensitive, alone in 8 bits", "share of work", "dB", "worst"], rows[:MOST_GROUPS])
    if recipe["frontier"]:
        rows = frontier_rows([Point(**point) for point in recipe["frontier"]])
        marks = ["<- this recipe" if place == recipe["chosen"] else "" for place in range(len(rows))]
        text += "\n" + table([*FRONTIER, ""], [[*row, mark] for row, mark in zip(rows, marks, strict=True)])
    return text


def _judged(report: Mapping[str, Any]) -> str:
    """What the gate found."""
    return "\n".join([judges(report), engine_table(report), *verdicts(report)])


def judges(report: Mapping[str, Any]) -> str:
    """By what and where the engines were judged."""
    count = len(report["images"])
    return f"{count} held-out image{'s' * (count != 1)}, {report['threads']} threads, {report['processor']}"


def engine_table(report: Mapping[str, Any]) -> str:
    """All engines and how they did, without the columns that no engine has."""
    from tilewright.calib.report.facts import filled

    engines = sorted(report["engines"].items(), key=lambda item: PRECISIONS.index(item[1]["precision"]))
    heads, rows = filled(HEADS, [_row(name, engine) for name, engine in engines])
    return table(heads, [[cell or "-" for cell in row] for row in rows])


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with the engines in 8 bits."""
    lines = []
    for name, engine in report["engines"].items():
        if engine.get("low_share", 1) < engine.get("asked_share", 0):
            lines.append(f"{name}: the recipe asks for {engine['asked_share']:.1%} of the linear work in 8 bits")
        if engine.get("fault"):
            lines.append(f"{name} misses the budget: {engine['fault']}")
        if engine.get("slower_than"):
            lines.append(f"{name} is slower than {engine['slower_than']} here, so it is not the default")
    return lines


def _row(name: str, engine: Mapping[str, Any]) -> list[str]:
    """An engine's cells; empty: it has no such number."""
    from tilewright.calib.report.facts import figures

    number, share = figures(engine), engine.get("low_share")
    drift = max((steps[-1] for steps in engine["drift"].values()), default=None)
    return [
        name,
        *(number[key] for key in ("mean", "worst", "ssim", "changed")),
        "" if drift is None else f"{drift:.1e}",
        number["lost"],
        number["seconds"],
        mebibytes(engine["peak_bytes"]),
        "" if share is None else f"{share:.1%}",
    ]
