"""What a build is asked for, and what that means: files located, settings decided, networks chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tilewright.export.build.parameters import Shapes, parameter_shapes
from tilewright.export.system import ComponentSpec, Lora, Preset, Settings, System, Tensors, UserFiles
from tilewright.export.systems import system
from tilewright.export.weights.files import find, locate
from tilewright.export.weights.lora import lora_of, path_and_strength
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["OPS", "VERIFY_MODES", "Request"]

VERIFY_MODES = ("auto", "always", "never")
OPS = ("tilewright", "standard")  # our ops as nodes of our domain with functions, or inlined


@dataclass(frozen=True)
class Request:
    """What to build and where."""

    name: str  # of the system
    preset: str | None  # none: what the files say
    out: Path
    weights: Path | None = None
    seed: int | None = None  # random weights for everything that no file is given for
    pack: bool = False  # copy the weights into the bundle
    verify: str = "auto"
    ops: str = "tilewright"
    asked: Mapping[str, Any] = field(default_factory=dict)  # of the system's own options
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        s = self.system
        if self.preset is not None and self.preset not in s.presets:
            raise UsageError(f"preset {self.preset!r} of {self.name} is not one of {', '.join(s.presets)}")
        if self.verify not in VERIFY_MODES:
            raise UsageError(f"verify={self.verify!r} is not one of {', '.join(VERIFY_MODES)}")
        if self.ops not in OPS:
            raise UsageError(f"ops={self.ops!r} is not one of {', '.join(OPS)}")
        first = next((o.argument for o in s.origins.values() if o.needed), "weights")
        if self.weights is None and self.seed is None and first not in self.asked:
            flag = "--weights DIR" if first == "weights" else f"--{first.replace('_', '-')} PATH"
            raise UsageError(f"neither {flag} nor --random-weights SEED is given; give the system's weights")
        if unknown := sorted(self.asked.keys() - s.options.keys()):
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in s.options) or "none of its own"
            raise UsageError(f"{self.name} takes no --{unknown[0].replace('_', '-')}; it takes {takes}")

    @cached_property
    def system(self) -> System:
        """The system that is built."""
        return system(self.name)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The system's options, with the files that lie under --weights by their usual names."""
        options = dict(self.asked)
        for name, option in self.system.options.items():
            usual = [self.weights / place for place in option.names if self.weights and (self.weights / place).exists()]
            if name not in options and usual and not self._instead(name):
                options[name] = str(usual[0])
        return options

    def _instead(self, name: str) -> bool:
        return name == "prompt_embeds" and "prompt" in self.asked

    @cached_property
    def places(self) -> dict[str, Path]:
        """The folder or file of each origin that the user has."""
        paths = {name: path_and_strength(v)[0] for name, v in self.options.items() if isinstance(v, str)}
        paths |= {"weights": self.weights} if self.weights else {}
        origins = self.system.origins.items()
        located = {name: locate(origin, paths, required=self.seed is None) for name, origin in origins}
        return {name: path for name, path in located.items() if path}

    @cached_property
    def tensors(self) -> dict[str, Tensors]:
        """What the files of each origin hold, as they lie."""
        variant = self.asked.get("variant", "")
        return {name: find(path, variant) for name, path in self.places.items()}

    @cached_property
    def lora(self) -> Lora | None:
        """The LoRA that the user gave."""
        rule = self.system.lora
        if rule is None:
            return None
        argument, merged = self.system.origins[rule.origin].argument, self.options.get("lora_mode") == "merge"
        if rule.origin not in self.tensors:
            if merged:
                raise UsageError(f"--lora-mode merge needs a LoRA to merge; give --{argument.replace('_', '-')} FILE")
            return None
        strength = path_and_strength(str(self.options.get(argument, "")))[1]
        return lora_of(rule, self.tensors[rule.origin], strength, merged=merged)

    @cached_property
    def settings(self) -> Settings:
        """What the system makes of the options and of what the files say."""
        name = self.preset or next(iter(self.system.presets))
        preset = Preset(name, self.system.presets[name], explicit=self.preset is not None)
        return self.system.decide(preset, self.options, UserFiles(self.tensors, self.places, self.lora))

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """Those that become graphs."""
        return self.system.components(self.settings)

    @cached_property
    def build_time(self) -> dict[str, ComponentSpec]:
        """Those that run once, now."""
        return self.system.build_time(self.settings)

    @cached_property
    def parameters(self) -> dict[str, Shapes]:
        """The shape of every parameter of every component."""
        return {name: parameter_shapes(spec) for name, spec in (self.components | self.build_time).items()}

    @cached_property
    def used(self) -> dict[str, Tensors]:
        """The files that are read or that the user meant: not text encoders beside embeddings that are given."""
        s = self.system
        read = {s.origin_of(component, name) for component, shapes in self.parameters.items() for name in shapes}
        return {
            name: tensors
            for name, tensors in self.tensors.items()
            if name in read or s.origins[name].needed or s.origins[name].argument != "weights"
        }

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

    @property
    def licence(self) -> str:
        """Of the weights: what their files say, or the system."""
        named = str(self.settings.choices.get("licence", ""))
        return named or self.system.licences.get(self.preset or "", self.system.licence)

    def lacking(self, origin: str) -> InputError:
        """The refusal of a build that needs files of this origin and has none."""
        needs = self.system.origins[origin]
        return InputError(f"{needs.what} is needed for this and not there; add it under --{needs.argument}")
