"""Finding the bytes of every parameter, by names and headers alone, before anything is traced, copied or merged."""

from collections.abc import Mapping
from dataclasses import dataclass

from tilewright.export.build.parameters import Shapes
from tilewright.export.build.request import Request
from tilewright.export.system import Rows, Tensors
from tilewright.export.weights.files import reference_parameters, resolve
from tilewright.export.weights.lora import Adapter, check_fit, without_pairs
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError

__all__ = ["Merge", "References", "check_attachment", "find_references", "merges", "missing_tensors", "origins_of"]

References = dict[str, dict[str, Reference]]  # component -> parameter -> bytes


def origins_of(request: Request, used: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The tensors of each origin, renamed as the system's keys expect."""
    return {name: request.system.origins[name].rename(tensors) for name, tensors in used.items()}


def missing_tensors(request: Request, origins: Mapping[str, Tensors]) -> dict[str, Shapes]:
    """Origin -> the tensors without a file, which random weights must replace."""
    system, missing = request.system, dict[str, Shapes]()
    for component, shapes in request.parameters.items():
        for name, shape in shapes.items():
            origin, key = system.origin_of(component, name), system.keys(component, name)[0]
            if origin in origins:
                continue
            if request.seed is None:
                raise request.missing_files(origin)
            whole = (shape[0] * key.parts, *shape[1:]) if isinstance(key, Rows) else shape
            missing.setdefault(origin, {})[key.key if isinstance(key, Rows) else key] = whole
    return missing


def find_references(request: Request, origins: Mapping[str, Tensors]) -> References:
    """The bytes of every parameter whose origin has files. Missing and unexpected keys are refused."""
    system, lora = request.system, request.settings.lora
    parameters = {
        component: {name: shape for name, shape in shapes.items() if system.origin_of(component, name) in origins}
        for component, shapes in request.parameters.items()
    }
    if lora and lora.merged and lora.origin in origins:  # its pairs are no parameters, since they are added to weights
        origins = {**origins, lora.origin: without_pairs(origins[lora.origin])}
    return reference_parameters(parameters, origins, system)


@dataclass(frozen=True)
class Merge:
    """A weight, and the low-rank pair that is added to it."""

    component: str
    parameter: str
    weight: Reference
    adapter: Adapter


def merges(request: Request, origins: Mapping[str, Tensors], references: References) -> list[Merge]:
    """Every weight that a merged LoRA changes, by name. A pair without a weight is refused."""
    lora, system = request.settings.lora, request.system
    if not lora or not lora.merged or lora.origin not in origins:
        return []
    pairs, changes, used_pairs = origins[lora.origin], list[Merge](), set[str]()
    for component, parameters in references.items():
        for name, weight in parameters.items():
            stem = name.removesuffix("weight")
            if stem == name or system.origin_of(component, f"{stem}lora_A") != lora.origin:
                continue
            keys = [system.keys(component, f"{stem}{half}") for half in ("lora_A", "lora_B")]
            down, up = (resolve(pairs, names) for names in keys)
            if down and up:
                first = keys[0][0]
                assert isinstance(first, str)
                used_pairs.add(branch := first.removesuffix(".lora_A"))
                adapter = Adapter(down, up, lora.branches[branch][1])
                base, file = origins[weight.folder].folder / weight.file, pairs.folder / down.file
                check_fit(base, weight, file, adapter)
                changes.append(Merge(component, name, weight, adapter))
    if unknown := sorted(lora.branches.keys() - used_pairs):
        raise InputError(
            f"LoRA {', '.join(pairs.sources.values())}: adapts {len(unknown)} modules that the network does not have:"
            f" {', '.join(unknown[:3])}; give the LoRA of this system and preset"
        )
    return sorted(changes, key=lambda merge: merge.parameter)


def check_attachment(request: Request) -> None:
    """Refuse files with missing tensors, unexpected tensors, or tensors of another shape."""
    origins = origins_of(request, request.used)
    random = missing_tensors(request, origins)
    references = find_references(request, origins)
    if not random:  # random weights, into which a LoRA may be merged, do not exist yet
        merges(request, origins, references)
