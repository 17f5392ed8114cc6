"""What a build is asked for, and what that means: files found, settings made, networks chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec
from tilewright.export.systems import system
from tilewright.export.weights.files import Tensors, find, locate
from tilewright.export.weights.lora import path_and_strength
from tilewright.runtime.errors import UsageError

__all__ = ["OPS", "VERIFY_COPIES", "VERIFY_MODES", "Request", "parameter_count"]

VERIFY_COPIES = 6  # of float32 weights: mapped, re-packed by the engine, eager, and float64 eager, which is two
VERIFY_MODES = ("auto", "always", "never")
OPS = ("tilewright", "standard")  # our ops as nodes of our domain with functions, or inlined


@dataclass(frozen=True)
class Request:
    """What to build and where."""

    system: str
    preset: str
    out: Path
    weights: Path | None = None
    seed: int | None = None  # random weights in the place of all that is not given
    pack: bool = False  # copy the weights into the bundle
    verify: str = "auto"
    ops: str = "tilewright"
    given: Mapping[str, Any] = field(default_factory=dict)  # the system's own options

    def __post_init__(self) -> None:
        module = system(self.system)
        if self.preset not in module.PRESETS:
            raise UsageError(f"preset {self.preset!r} of {self.system} is not one of {', '.join(module.PRESETS)}")
        if self.verify not in VERIFY_MODES:
            raise UsageError(f"verify={self.verify!r} is not one of {', '.join(VERIFY_MODES)}")
        if self.ops not in OPS:
            raise UsageError(f"ops={self.ops!r} is not one of {', '.join(OPS)}")
        wanted = next((o.argument for o in module.ORIGINS.values() if o.needed), "weights")
        if self.weights is None and self.seed is None and wanted not in self.given:
            flag = "--weights DIR" if wanted == "weights" else f"--{wanted.replace('_', '-')} PATH"
            raise UsageError(f"neither {flag} nor --random-weights SEED is given; give the system's weights")
        if unknown := sorted(self.given.keys() - module.OPTIONS.keys()):
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in module.OPTIONS) or "none of its own"
            raise UsageError(f"{self.system} takes no --{unknown[0].replace('_', '-')}; it takes {takes}")

    @cached_property
    def options(self) -> dict[str, Any]:
        """The system's options, with the files that lie under --weights by their usual names."""
        options = dict(self.given)
        for name, option in system(self.system).OPTIONS.items():
            usual = [self.weights / place for place in option.names if self.weights and (self.weights / place).exists()]
            if name not in options and usual and not self._instead(name):
                options[name] = str(usual[0])
        return options

    def _instead(self, name: str) -> bool:
        return name == "prompt_embeds" and "prompt" in self.given

    @cached_property
    def found(self) -> dict[str, Tensors]:
        """The weights of each origin that files are given for, as they lie."""
        module = system(self.system)
        paths = {name: path_and_strength(v)[0] for name, v in self.options.items() if isinstance(v, str)}
        paths |= {"weights": self.weights} if self.weights else {}
        located = {name: locate(origin, paths, required=self.seed is None) for name, origin in module.ORIGINS.items()}
        variant = self.given.get("variant", "")
        return {name: find(path, variant) for name, path in located.items() if path}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the system makes of the options and of what the files hold."""
        made: dict[str, Any] = system(self.system).settings(self.preset, self.options, self.found)
        return made

    @cached_property
    def used(self) -> dict[str, Tensors]:
        """Of what was found, all but what may be absent and no network reads: text encoders beside given embeddings."""
        module = system(self.system)
        read = {origin for component in self.components | self.build_time for origin in module.origins(component)}
        return {
            name: tensors
            for name, tensors in self.found.items()
            if name in read or module.ORIGINS[name].needed or module.ORIGINS[name].argument != "weights"
        }

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """Those that become graphs."""
        made: dict[str, ComponentSpec] = system(self.system).components(self.preset, **self.settings)
        return made

    @cached_property
    def build_time(self) -> dict[str, ComponentSpec]:
        """Those that run once, now."""
        made: dict[str, ComponentSpec] = system(self.system).build_time(self.preset, **self.settings)
        return made

    @property
    def folder(self) -> Path | None:
        """The folder of the base model, which may also hold tokenizers."""
        if self.weights is None or not self.weights.is_dir():
            return None
        candidates = [self.weights, *sorted(self.weights.glob("*/"))]
        return next((c for c in candidates if (c / "tokenizer").is_dir()), self.weights)

    @property
    def stand_in(self) -> bool:
        """Whether some weights are zeros in the place of real ones."""
        return any(tensors.stand_in for tensors in self.used.values())


def parameter_count(request: Request) -> int:
    """Parameters of the request's networks, counted without making them."""
    from tilewright.export.graph.trace import network_on_meta

    networks = [network_on_meta(source) for source in (request.components | request.build_time).values()]
    return sum(p.numel() for network in networks for p in network.parameters())
