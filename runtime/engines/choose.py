"""Choosing the engine of a component: the best one that fits the machine, and for every other one the reason why not.

Nothing is opened or imported here. The order of engines that fit is fixed:

1. engines in float32, and those whose measured picture is close to float32's, before all others: accuracy comes first
2. engines that were measured on such a processor before engines that were not, the fastest first
3. the most accurate precision, then the order of BACKENDS, then the order of names

A caller's wish leaves only the engines with that name, precision or backend.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tilewright.runtime.bundle.manifest import PRECISIONS, Component, EngineSpec
from tilewright.runtime.bundle.measured import PSNR_GATE, Measured
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.errors import EnvironmentMismatch, UsageError

__all__ = [
    "Choice",
    "Machine",
    "choose",
    "choose_all",
    "largest_batch",
    "outside",
    "require",
    "shortest_tile",
    "tile_sides",
]

# those that are made for the least hardware come first; OpenVINO last, as it is slower on small graphs
BACKENDS = ("tensorrt", "cuda", "aoti", "ort", "openvino")


@dataclass(frozen=True)
class Machine:
    """The parts of a machine that decide which engines run on it."""

    cores: int
    devices: tuple[str, ...] = ("cpu",)  # kinds of devices
    instructions: tuple[str, ...] = ()  # of the CPU, by the names in /proc/cpuinfo
    compute_capability: tuple[int, int] | None = None  # of the GPU
    backends: tuple[str, ...] = ()  # those that can run
    missing: Mapping[str, str] = field(default_factory=dict)  # other backends -> what they need, and how to install it
    packages: Mapping[str, str] = field(default_factory=dict)  # installed package -> version
    processor: str = "unknown"  # the name and the numbers of the CPU


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen for a component, and the reasons against all others."""

    spec: EngineSpec | None  # none: no engine fits
    misfits: dict[str, str]  # engine that cannot run here -> why
    others: dict[str, str]  # engine that would run here -> why it was not chosen


def choose(
    specs: Sequence[EngineSpec],
    machine: Machine,
    wish: str | None = None,
    *,
    measured: Mapping[str, Measured] | None = None,
    side_px: int | None = None,
    strange: Collection[str] = (),
) -> Choice:
    """Choose among the engines of a component.

    `measured`: the engines that were measured on such a processor. `side_px`: the side of the tiles that they get.
    `strange`: the engines whose machine code was compiled elsewhere; they must be asked for by name or backend.
    """
    wished, known = _wished(specs, wish), measured or {}
    misfits = {
        s.name: reason
        for s in specs
        if (reason := _misfit(s, machine) or outside(s, side_px) or _strange(s, strange, wish))
    }
    fitting = sorted((spec for spec in specs if spec.name not in misfits), key=lambda spec: _rank(spec, known))
    best = next((spec for spec in fitting if spec.name in wished), None)
    others = {
        spec.name: _why(best, spec, known) if best and spec.name in wished else f"--engine {wish} asks for another"
        for spec in fitting
        if spec is not best
    }
    return Choice(best, misfits, others)


def choose_all(
    components: Mapping[str, Component],
    machine: Machine,
    wish: str | None = None,
    *,
    measured: Mapping[str, Mapping[str, Measured]] | None = None,
    sides: Mapping[str, int] | None = None,
    strange: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Choice]:
    """Choose the engine of each component. A wish holds for those components that can fulfil it.

    `measured`, `sides` and `strange`: as for `choose`, by component.
    """
    known, tiles, others = measured or {}, sides or {}, strange or {}
    _wished([spec for component in components.values() for spec in component.engines], wish)
    return {
        name: choose(
            c.engines,
            machine,
            wish if any(_meets(spec, wish) for spec in c.engines) else None,
            measured=known.get(name),
            side_px=tiles.get(name),
            strange=others.get(name, ()),
        )
        for name, c in components.items()
    }


def require(choices: Mapping[str, Choice]) -> dict[str, EngineSpec]:
    """The engine of each component. Components without one are refused with all reasons."""
    lacking = sorted(name for name, choice in choices.items() if choice.spec is None)
    if lacking:
        reasons = sorted({f"{engine} {why}" for name in lacking for engine, why in choices[name].misfits.items()})
        raise EnvironmentMismatch(f"no engine of {', '.join(lacking)} can run here: {'; '.join(reasons)}")
    return {name: choice.spec for name, choice in choices.items() if choice.spec}


def tile_sides(program: Program, tile: int | None = None) -> dict[str, int]:
    """The side of the tiles that each component gets, where its passes have tiles."""
    return {call.run: tile or p.tiles.px for p in program.passes if p.tiles for *_, call in p.calls()}


def largest_batch(specs: Iterable[EngineSpec]) -> int:
    """The most tiles that one call of any of these engines takes."""
    return min(spec.profile.batch.most for spec in specs)


def shortest_tile(specs: Iterable[EngineSpec]) -> int:
    """The shortest side of a tile that all of these engines take."""
    return max((spec.profile.side_px.least for spec in specs), default=1)


def outside(spec: EngineSpec, side_px: int | None) -> str | None:
    """The reason why an engine does not take tiles with this side."""
    sides = spec.profile.side_px
    if side_px is None or sides.least <= side_px <= sides.most:
        return None
    return f"takes tiles of {sides.least} to {sides.most} px, and these have {side_px}"


def _wished(specs: Sequence[EngineSpec], wish: str | None) -> set[str]:
    """The names of the engines that a wish leaves. A wish that leaves none is refused."""
    names = {spec.name for spec in specs if _meets(spec, wish)}
    if not names:
        raise UsageError(
            f"engine={wish!r} is none of this bundle's engines: {_listed(s.name for s in specs)}; their precisions:"
            f" {_listed(s.precision for s in specs)}; their backends: {_listed(s.backend for s in specs)}"
        )
    return names


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _meets(spec: EngineSpec, wish: str | None) -> bool:
    return wish is None or wish in (spec.name, spec.precision, spec.backend)


def _misfit(spec: EngineSpec, machine: Machine) -> str | None:
    """The reason why an engine cannot run on a machine."""
    needs, has = spec.needs, machine.compute_capability
    if spec.device not in machine.devices:
        return f"runs on {spec.device}, and here is {' and '.join(machine.devices)} only"
    if spec.backend not in machine.backends:
        return machine.missing.get(spec.backend) or f"has a backend that is not known here, {spec.backend!r}"
    if lacking := [name for name in needs.instructions if name not in machine.instructions]:
        return f"needs {', '.join(lacking)}, which this CPU lacks"
    if machine.cores < needs.cores:
        return f"needs {needs.cores} cores, and this process may use {machine.cores}"
    if needs.compute_capability and _unfit(has, needs.compute_capability, needs.exactly):
        there = "this GPU's is {}.{}".format(*has) if has else "this GPU's is unknown"
        return f"needs compute capability {needs.compute_capability[0]}.{needs.compute_capability[1]}, {there}"
    for package, least in sorted(needs.packages.items()):
        version = machine.packages.get(package)
        if needs.exactly and version is not None and _release(version) != _release(least):
            again = f"compile it again, or pip install '{package}=={least}'"
            return f"was compiled with {package} {least}, and {version} is installed: {again}"
        if version is None or _release(version) < _release(least):
            there = f"{version} is installed" if version else "it is not installed"
            return f"needs {package} {least} or later, {there}: pip install '{package}>={least}'"
    return None


def _unfit(has: tuple[int, int] | None, needs: tuple[int, int], exactly: bool) -> bool:
    return has is None or (has != needs if exactly else has < needs)


def _strange(spec: EngineSpec, strange: Collection[str], wish: str | None) -> str | None:
    """The reason why machine code does not run by itself."""
    if spec.name not in strange or wish in (spec.name, spec.backend):
        return None
    return f"is machine code that was not compiled here; if you trust its maker, ask for it: --engine {spec.name}"


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version without the zeros at its end: 1.20.0rc1 is (1, 20)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def _rank(spec: EngineSpec, measured: Mapping[str, Measured]) -> tuple[bool, float, int, int, str]:
    """The place of an engine in the order."""
    seconds = measured[spec.name].seconds_per_megapixel if spec.name in measured else math.inf
    backend = BACKENDS.index(spec.backend) if spec.backend in BACKENDS else len(BACKENDS)
    return not _accurate(spec, measured), seconds, PRECISIONS.index(spec.precision), backend, spec.name


def _accurate(spec: EngineSpec, measured: Mapping[str, Measured]) -> bool:
    psnr = measured[spec.name].psnr_db if spec.name in measured else None
    return spec.precision == "float32" or (psnr is not None and psnr >= PSNR_GATE)


def _why(best: EngineSpec, spec: EngineSpec, measured: Mapping[str, Measured]) -> str:
    """The reason why an engine comes after the best one."""
    if _accurate(best, measured) and not _accurate(spec, measured):
        psnr = measured[spec.name].psnr_db if spec.name in measured else None
        lacks = "not measured" if psnr is None else f"{psnr:.1f} dB, the gate is {PSNR_GATE:.0f} dB"
        return f"{best.name} is more accurate ({lacks}); --engine {spec.name} asks for this one"
    one, other = (measured[s.name].seconds_per_megapixel if s.name in measured else None for s in (best, spec))
    if one is not None and other is not None and one < other:
        return f"{best.name} is faster: {one:.3g} s a megapixel, this one {other:.3g}"
    if one is not None and other is None:
        return f"{best.name} was measured, this one was not"
    return f"{best.name} comes first in the fixed order"
