"""Which bytes every parameter has: found by names and headers alone, before anything is traced, copied or merged."""

from collections.abc import Mapping
from dataclasses import dataclass

from tilewright.export.build.parameters import Shapes
from tilewright.export.build.request import Request
from tilewright.export.system import Rows, Tensors
from tilewright.export.weights.files import reference_parameters, resolve
from tilewright.export.weights.lora import Adapter, check_fit, without_pairs
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError

__all__ = ["Merge", "References", "check_attachment", "lacking", "merges", "origins_of", "references"]

References = dict[str, dict[str, Reference]]  # component -> parameter -> bytes


def origins_of(request: Request, used: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The tensors of each origin under the names that the system's keys give."""
    return {name: request.system.origins[name].read(tensors) for name, tensors in used.items()}


def lacking(request: Request, origins: Mapping[str, Tensors]) -> dict[str, Shapes]:
    """Origin -> the tensors that no file is given for, which random weights must stand for."""
    system, left = request.system, dict[str, Shapes]()
    for component, shapes in request.parameters.items():
        for name, shape in shapes.items():
            origin, key = system.origin_of(component, name), system.keys(component, name)[0]
            if origin in origins:
                continue
            if request.seed is None:
                raise request.lacking(origin)
            whole = (shape[0] * key.parts, *shape[1:]) if isinstance(key, Rows) else shape
            left.setdefault(origin, {})[key.key if isinstance(key, Rows) else key] = whole
    return left


def references(request: Request, origins: Mapping[str, Tensors]) -> References:
    """The bytes of every parameter whose origin is there; each key of the files is accounted for."""
    system, lora = request.system, request.settings.lora
    wanted = {
        component: {name: shape for name, shape in shapes.items() if system.origin_of(component, name) in origins}
        for component, shapes in request.parameters.items()
    }
    if lora and lora.merged and lora.origin in origins:  # its pairs are added to weights, and are nobody's parameters
        origins = {**origins, lora.origin: without_pairs(origins[lora.origin])}
    return reference_parameters(wanted, origins, system)


@dataclass(frozen=True)
class Merge:
    """A weight and the pair that is added to it."""

    component: str
    parameter: str
    weight: Reference
    adapter: Adapter


def merges(request: Request, origins: Mapping[str, Tensors], attached: References) -> list[Merge]:
    """Every weight that a merged LoRA changes, by name; a pair that fits none is refused."""
    lora, system = request.settings.lora, request.system
    if not lora or not lora.merged or lora.origin not in origins:
        return []
    pairs, found, taken = origins[lora.origin], list[Merge](), set[str]()
    for component, of in attached.items():
        for name, weight in of.items():
            stem = name.removesuffix("weight")
            if stem == name or system.origin_of(component, f"{stem}lora_A") != lora.origin:
                continue
            keys = [system.keys(component, f"{stem}{half}") for half in ("lora_A", "lora_B")]
            down, up = (resolve(pairs, names) for names in keys)
            if down and up:
                first = keys[0][0]
                assert isinstance(first, str)
                taken.add(branch := first.removesuffix(".lora_A"))
                adapter = Adapter(down, up, lora.branches[branch][1])
                base, file = origins[weight.folder].folder / weight.file, pairs.folder / down.file
                check_fit(base, weight, file, adapter)
                found.append(Merge(component, name, weight, adapter))
    if unknown := sorted(lora.branches.keys() - taken):
        raise InputError(
            f"LoRA {', '.join(pairs.sources.values())}: adapts {len(unknown)} modules that the network does not have:"
            f" {', '.join(unknown[:3])}; give the LoRA of this system and preset"
        )
    return sorted(found, key=lambda merge: merge.parameter)


def check_attachment(request: Request) -> None:
    """Refuse files that lack a tensor, hold one that nobody reads, or one of another shape."""
    origins = origins_of(request, request.used)
    random = lacking(request, origins)
    attached = references(request, origins)
    if not random:  # a LoRA may be merged into random weights, which are not there yet
        merges(request, origins, attached)
