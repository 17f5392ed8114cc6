"""The devices and backends of this machine, and which engines of a bundle would run on it. Nothing is opened."""

from collections.abc import Mapping
from typing import Any

from tilewright.runtime.bundle.manifest import Component, EngineSpec
from tilewright.runtime.bundle.measured import Measured, on_processor
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.engines import BACKENDS, backend
from tilewright.runtime.engines.choose import Choice, Machine, choose_all, require, tile_sides
from tilewright.runtime.engines.machine import this_machine
from tilewright.runtime.engines.trust import strangers
from tilewright.runtime.errors import EnvironmentMismatch
from tilewright.runtime.profile import hardware

__all__ = ["diagnose", "summary"]

# of the instruction sets that engines use, the ones that are shown
NOTABLE = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)
NOTABLE_ARM = ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2")


def diagnose(bundle: Bundle | None, wish: str | None = None) -> tuple[dict[str, Any], EnvironmentMismatch | None]:
    """A report on this machine and on every engine of a bundle, and the fault if a component has no engine here."""
    components = bundle.manifest.components if bundle else {}
    machine = this_machine({p for c in components.values() for spec in c.engines for p in spec.needs.packages})
    known = on_processor(bundle.root, machine.processor) if bundle else {}
    sides = tile_sides(bundle.program) if bundle else {}
    strange = strangers(bundle.manifest) if bundle else {}
    choices = choose_all(components, machine, wish, measured=known, sides=sides, strange=strange) if components else {}
    fault = None
    try:
        require(choices)
    except EnvironmentMismatch as error:
        fault = error
    report = {
        "machine": _machine(machine),
        "bundle": bundle.digest if bundle else None,
        "components": {
            name: _component(components[name], choice, known.get(name, {})) for name, choice in sorted(choices.items())
        },
    }
    return report, fault


def _machine(machine: Machine) -> dict[str, Any]:
    return hardware() | {
        "cores": machine.cores,
        "devices": list(machine.devices),
        "instructions": list(machine.instructions),
        "compute_capability": machine.compute_capability,
        "backends": {name: backend(name).version() for name in machine.backends},
        "missing": {name: reason for name, reason in machine.missing.items() if name in BACKENDS},
        "packages": dict(machine.packages),
    }


def _component(component: Component, choice: Choice, measured: Mapping[str, Measured]) -> dict[str, Any]:
    return {
        "chosen": choice.spec.name if choice.spec else None,
        "engines": [_engine(spec, choice, measured.get(spec.name)) for spec in component.engines],
    }


def _engine(spec: EngineSpec, choice: Choice, measured: Measured | None) -> dict[str, Any]:
    reasons = choice.misfits | choice.others
    return {
        "name": spec.name,
        "backend": spec.backend,
        "device": spec.device,
        "precision": spec.precision,
        "runs": spec.name not in choice.misfits,
        "reason": reasons.get(spec.name),  # why it is not chosen
        "measured": encode(measured) if measured else None,  # on such a processor
    }


def summary(report: dict[str, Any]) -> str:
    """The report as text."""
    machine = report["machine"]
    shown = [name for name in (*NOTABLE, *NOTABLE_ARM) if name in machine["instructions"]]
    cores = [f"cpu:{i}" for i in range(machine["cores"])] if "cpu" in machine["devices"] else []
    capability = machine["compute_capability"]
    gpus = ["cuda, compute capability {}.{}".format(*capability)] if capability else []
    lines = [
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"devices: {', '.join(cores + gpus)}",
        f"instructions: {', '.join(shown) or 'none of those that engines need'}",
        *(f"backend {name}: {version}" for name, version in machine["backends"].items()),
        *(f"backend {name}: {reason}" for name, reason in machine["missing"].items()),
    ]
    for name, component in report["components"].items():
        lines.append(f"{name}:")
        width = max(len(engine["name"]) for engine in component["engines"])
        for engine in component["engines"]:
            chosen = engine["name"] == component["chosen"]
            verdict = (
                "chosen" if chosen else f"would run, but {engine['reason']}" if engine["runs"] else engine["reason"]
            )
            if engine["measured"]:
                error, psnr, seconds = (
                    engine["measured"][key] for key in ("relative_l2", "psnr_db", "seconds_per_megapixel")
                )
                verdict += f"; measured on such a processor: {seconds:.3g} s a megapixel, error {error:.1e}"
                verdict += "" if psnr is None else f", picture {psnr:.1f} dB"
            lines.append(f"  {engine['name']:<{width}}  {engine['device']}  {verdict}")
    return "\n".join(lines)
