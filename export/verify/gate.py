"""Which engines of a report miss their gate, and the part of a report that engines are chosen by."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.verify.repeat import commands
from tilewright.export.verify.seams import SEAM_GATE
from tilewright.runtime.bundle.manifest import PRECISIONS
from tilewright.runtime.bundle.measured import PSNR_GATE, Measured, Measurement
from tilewright.runtime.errors import AccuracyError

__all__ = ["RELATIVE_L2_GATE", "fault_of", "measurement", "require"]

RELATIVE_L2_GATE = 1e-4  # for float outputs of a component, in float32; measured are 1e-6 to 1e-5


def require(report: Mapping[str, Any], precisions: Collection[str] = PRECISIONS, root: Path | None = None) -> None:
    """Refuse a report with an engine of these precisions that misses its gate, and tiles that show.

    With `root`, the place of the bundle, the error has the commands that repeat the component.
    """
    for name, engine in report["engines"].items():
        if engine["precision"] in precisions and (fault := fault_of(engine)):
            refusal = AccuracyError(f"{name}: {fault}")
            missed = next((component for component, _ in _misses(engine["components"])), None)
            if root is not None and missed is not None:
                refusal.repeat = commands(root, missed, engine["components"][missed]["shapes"])
            raise refusal
    for picture, excess in report["seams"].items():
        if not excess <= SEAM_GATE:
            raise AccuracyError(
                f"tiles show on the {picture} picture: it changes {excess:.0%} more across their borders than beside"
                f" them, the gate is {SEAM_GATE:.0%}; use a larger overlap"
            )


def fault_of(engine: Mapping[str, Any]) -> str | None:
    """The reason why an engine misses its gate, or gives a constant or infinite picture; none if it passes."""
    if not engine["restore"]["deviation"] > 1e-4:  # written this way, NaN fails
        deviation = engine["restore"]["deviation"]
        return f"the restored picture is constant or not finite (deviation {deviation:.1e}); check the weights"
    if engine["precision"] != "float32":
        psnr = engine["restore"]["psnr_db"]
        return (
            None
            if psnr >= PSNR_GATE
            else f"the restored picture has {psnr:.1f} dB against eager PyTorch in float32, the gate is"
            f" {PSNR_GATE:.0f} dB; use an engine in float32, or judge the pictures and ask for this engine"
        )
    return next((fault for _, fault in _misses(engine["components"])), None)


def _misses(components: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The components that miss the gate of float32, and why."""
    for name, component in components.items():
        for output, difference in component["outputs"].items():
            if not difference["relative_l2"] <= RELATIVE_L2_GATE:
                yield (
                    name,
                    f"{name}.{output}: relative L2 {difference['relative_l2']:.2e} against eager PyTorch, the gate is"
                    f" {RELATIVE_L2_GATE:.0e}; compare the versions of torch and the engine with the manifest's",
                )
        if component.get("choices", {}).get("wrong"):
            yield (
                name,
                f"{name}: {component['choices']['wrong']} of {component['choices']['total']} choices differ from eager"
                " PyTorch by more than rounding explains; compare the versions of torch and the engine",
            )


def measurement(report: Mapping[str, Any]) -> Measurement:
    """The part of a report that engines are chosen by."""
    components: dict[str, dict[str, Measured]] = {}
    for name, engine in report["engines"].items():
        if engine["precision"] == "float32" and engine["fault"]:
            continue
        for component, c in engine["components"].items():
            error = max((output["relative_l2"] for output in c["outputs"].values()), default=0.0)
            components.setdefault(component, {})[name] = Measured(
                error, c["seconds_per_megapixel"], engine["restore"]["psnr_db"]
            )
    versions = {engine["backend"]: engine["version"] for engine in report["engines"].values()}
    return Measurement(report["processor"], report["threads"], versions, components)
