"""Explaining a bundle: the inputs that decided each stage of its build, what runs again, and the choice of engines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import Stage
from tilewright.export.build.code import code
from tilewright.export.build.history import note_of
from tilewright.export.build.versions import version
from tilewright.runtime.bundle.digests import remembered_sha256
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.doctor import diagnose

__all__ = ["explain"]

Inputs = Mapping[str, str]  # an input of a stage -> its value or digest


def explain(root: Path, expect: str | None = None) -> dict[str, Any]:
    """A report on the stages, as far as this machine remembers the build, and on the engines that run here."""
    bundle = read_bundle(root, expect=expect)
    stages = _remembered(root, bundle.digest)
    before = {name: {s for s in stages if _key(stages, s) == inputs.get(s)} for name, inputs in stages.items()}
    order = sorted(stages, key=lambda name: (len(_all_before(before, name)), name))
    changed = {name: _changed(stages[name]) for name in order}
    again: dict[str, list[str]] = {}
    for name in order:
        for i in stages[name].keys() - before[name]:
            again[i] = [s for s in order if any(i in stages[b] for b in (s, *_all_before(before, s)))]
    return {
        "bundle": str(root),
        "digest": bundle.digest,
        "remembered": bool(stages),
        "stages": [
            {
                "stage": name,
                "inputs": dict(stages[name]),
                "after": sorted(before[name]),
                "changed": changed[name],
                "would_run": any(changed[s] for s in (name, *_all_before(before, name))),
                **_place(root, name, stages[name]),
            }
            for name in order
        ],
        "runs_again": dict(sorted(again.items())),
        "components": diagnose(bundle)[0]["components"],
    }


def _remembered(root: Path, digest: str) -> dict[str, Inputs]:
    """Stage -> its inputs, from the note of the build that made this bundle; nothing without one."""
    try:
        note = json.loads(note_of(root).read_text())
        stages: dict[str, Inputs] = note["stages"] if note["digest"] == digest else {}
        return stages
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _key(stages: Mapping[str, Inputs], name: str) -> str:
    return _stage(name, stages[name]).key


def _stage(name: str, inputs: Inputs) -> Stage:
    return Stage(name, dict(inputs), lambda folder: None)


def _all_before(before: Mapping[str, set[str]], name: str) -> set[str]:
    """The stages whose results a stage depends on."""
    return before[name].union(*(_all_before(before, earlier) for earlier in before[name]))


def _place(root: Path, name: str, inputs: Inputs) -> dict[str, Any]:
    """Where the result of a stage lies, and what it cost if it ran in the last build."""
    directory = root if name == "seal" else _stage(name, inputs).directory
    try:
        cost = json.loads((root / "reports" / "build.json").read_text()).get(name, {})
        spent = {key: float(cost[key]) for key in ("seconds", "peak_bytes") if key in cost}
    except (OSError, ValueError, TypeError, AttributeError):
        spent = {}
    return {"directory": str(directory), "cached": directory.is_dir(), **spent}


def _changed(inputs: Inputs) -> list[str]:
    """The inputs whose values are others now, among those that can be looked up without the build's options."""
    return sorted(name for name, value in inputs.items() if (now := _now(name, inputs)) is not None and now != value)


def _now(name: str, inputs: Inputs) -> str | None:
    """The present value of an input; none if it is not known."""
    kind, _, which = name.partition(" ")
    if kind == "version":
        return version(which or "tilewright")
    if kind == "code":
        try:
            return code(which)[name]
        except LookupError:
            return "gone"
    if kind == "weights" and (folder := inputs.get(f"folder {which.partition('/')[0]}")):
        try:
            return remembered_sha256(Path(folder) / which.partition("/")[2])
        except OSError:
            return "gone"
    return None
