"""From a portable graph to engines. Each target is one file:

FROM_BUNDLE                                   whether a sealed bundle's portable graph is enough to prepare from
COMPILED                                      whether its engines are made from a sealed bundle, after its build
PRECISIONS                                    the precisions of its engines, the most accurate first
FORMS                                         precision in 8 bits -> the forms to choose from, by measuring
missing() -> str | None                       what this machine lacks to make its engines, and what to do
prepare(model) -> bool                        rewrites a copy of the portable graph for the backend; whether it changed
spec(precision, graph, memory, parameters)    the description of the engine of this precision with this graph
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

from tilewright.runtime.bundle.manifest import PRECISIONS, Memory
from tilewright.runtime.engines.choose import Machine, choose
from tilewright.runtime.errors import EnvironmentMismatch, UsageError

__all__ = ["TARGETS", "USUAL", "check_makeable", "engine_folder", "engines_of", "target_module", "usual_engines"]

TARGETS = {name: f"tilewright.export.targets.{name}" for name in ("ort", "openvino", "cuda", "tensorrt", "aoti")}
USUAL = ("ort", "openvino")  # targets of a build that names none, where the machine runs their engines


def target_module(name: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(TARGETS[name])


def engines_of(targets: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """The target and the precision of every engine that these targets make in these precisions."""
    for option, names, known in (("target", targets, tuple(TARGETS)), ("precision", precisions, PRECISIONS)):
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"{option}={unknown[0]!r} is not one of {', '.join(known)}")
        if not names or len(set(names)) < len(names):
            raise UsageError(f"{option}={','.join(names)!r} must name each {option} once")
    able = {target: target_module(target).PRECISIONS for target in targets}
    for target in targets:
        if not set(able[target]) & set(precisions):
            wants = f"precision={','.join(precisions)!r}: target {target!r} makes {', '.join(able[target])}"
            makers = [name for name in TARGETS if set(precisions) & set(target_module(name).PRECISIONS)]
            other = bool(makers) and not set(makers) & set(targets)
            advice = f"take target {' or '.join(makers)} instead" if other else "leave the target out"
            raise UsageError(f"{wants} only; add one of these, or {advice}")
    if lacking := [p for p in precisions if not any(p in able[target] for target in targets)]:
        makers = [target for target in TARGETS if lacking[0] in target_module(target).PRECISIONS]
        advice = f"add target {makers[0]!r}" if makers else "leave it out"
        raise UsageError(f"precision={lacking[0]!r} is none that {' or '.join(targets)} makes; {advice}")
    return [(target, p) for target in targets for p in able[target] if p in precisions]


def check_makeable(targets: Sequence[str]) -> None:
    """Refuse targets whose engines cannot be made on this machine."""
    for target in targets:
        if reason := target_module(target).missing():
            raise EnvironmentMismatch(reason)


def usual_engines(
    machine: Machine, targets: Sequence[str] = (), precisions: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The targets and the precisions of a build that leaves out one of them, or both: those that the machine runs."""
    known = [target for target in targets or USUAL if target in TARGETS]
    runs = [
        (target, precision)
        for target in known
        for precision in target_module(target).PRECISIONS
        if choose([target_module(target).spec(precision, "", Memory(), 0)], machine).spec
        and precision in (precisions or PRECISIONS)
    ]
    able = {target for target, _ in runs}
    return (
        tuple(targets) or tuple(target for target in USUAL if target in able) or USUAL[:1],
        tuple(precisions) or tuple(p for p in PRECISIONS if p in {p for _, p in runs}) or PRECISIONS[:1],
    )


def engine_folder(component: str, target: str) -> str:
    """The folder in a bundle for the files that the engines of a target share."""
    return f"engines/{component}.{target}"
