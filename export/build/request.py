"""A request for a build, and everything that follows from it: files, settings and networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tilewright.export.build.parameters import Shapes, parameter_shapes
from tilewright.export.plans.profiles import check_sides
from tilewright.export.system import ComponentSpec, Lora, Preset, Settings, System, Tensors, UserFiles
from tilewright.export.systems import system
from tilewright.export.targets import engines_of
from tilewright.export.weights.files import find, locate
from tilewright.export.weights.lora import lora_of, path_and_strength
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["OPS", "VERIFY_MODES", "Request"]

VERIFY_MODES = ("auto", "always", "never")
OPS = ("tilewright", "standard")  # our ops as nodes with functions, or replaced by standard operators


@dataclass(frozen=True)
class Request:
    """The options of one build."""

    name: str  # the name of the system
    preset: str | None  # none: the files decide the sizes
    out: Path
    weights: Path | None = None
    seed: int | None = None  # seed of random weights, for everything without a file
    pack: bool = False  # copy the weights into the bundle
    verify: str = "auto"
    ops: str = "tilewright"
    system_options: Mapping[str, Any] = field(default_factory=dict)  # options that only some systems have
    allow_nonfinite: bool = False
    targets: tuple[str, ...] = ("ort",)
    precisions: tuple[str, ...] = ("float32",)
    tiles: tuple[int, ...] = ()  # sides of tiles for compiled engines, the bundle's own first; none: the system's
    batches: tuple[int, ...] = ()  # numbers of tiles in a call for compiled engines; the bundle's own is the largest

    def __post_init__(self) -> None:
        s = self.system
        if self.preset is not None and self.preset not in s.presets:
            raise UsageError(f"preset {self.preset!r} of {self.name} is not one of {', '.join(s.presets)}")
        if self.verify not in VERIFY_MODES:
            raise UsageError(f"verify={self.verify!r} is not one of {', '.join(VERIFY_MODES)}")
        if self.ops not in OPS:
            raise UsageError(f"ops={self.ops!r} is not one of {', '.join(OPS)}")
        engines_of(self.targets, self.precisions)
        first = next((o.argument for o in s.origins.values() if o.needed), "weights")
        if self.weights is None and self.seed is None and first not in self.system_options:
            flag = "--weights DIR" if first == "weights" else f"--{first.replace('_', '-')} PATH"
            raise UsageError(f"neither {flag} nor --random-weights SEED is given; give the system's weights")
        if unknown := sorted(self.system_options.keys() - s.options.keys()):
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in s.options) or "none of its own"
            raise UsageError(f"{self.name} takes no --{unknown[0].replace('_', '-')}; it takes {takes}")

    @cached_property
    def system(self) -> System:
        """The system to build."""
        return system(self.name)

    @property
    def engines(self) -> list[tuple[str, str]]:
        """The target and the precision of every engine."""
        return engines_of(self.targets, self.precisions)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The system's options, with files under --weights as defaults if they have their usual names."""
        options = dict(self.system_options)
        for name, option in self.system.options.items():
            usual = [self.weights / place for place in option.names if self.weights and (self.weights / place).exists()]
            if name not in options and usual and not self._instead(name):
                options[name] = str(usual[0])
        return options

    def _instead(self, name: str) -> bool:
        return name == "prompt_embeds" and "prompt" in self.system_options

    @cached_property
    def places(self) -> dict[str, Path]:
        """The folder or file of each origin for which the user has files."""
        paths = {name: path_and_strength(v)[0] for name, v in self.options.items() if isinstance(v, str)}
        paths |= {"weights": self.weights} if self.weights else {}
        origins = self.system.origins.items()
        located = {name: locate(origin, paths, required=self.seed is None) for name, origin in origins}
        return {name: path for name, path in located.items() if path}

    @cached_property
    def tensors(self) -> dict[str, Tensors]:
        """The tensors in the files of each origin, under the files' own names."""
        variant = self.system_options.get("variant", "")
        return {name: find(path, variant) for name, path in self.places.items()}

    @cached_property
    def lora(self) -> Lora | None:
        """The user's LoRA, or none."""
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
        """The system's settings for these options and files."""
        name = self.preset or next(iter(self.system.presets))
        preset = Preset(name, self.system.presets[name], explicit=self.preset is not None)
        return self.system.decide(preset, self.options, UserFiles(self.tensors, self.places, self.lora))

    @cached_property
    def components(self) -> dict[str, ComponentSpec]:
        """The networks that become graphs."""
        return self.system.components(self.settings)

    @cached_property
    def program(self) -> Program:
        """The program, which runs the networks on an image."""
        program = self.system.program(self.settings)
        check_sides(program, self.tiles)
        program = program.tiled(self.tiles[0]) if self.tiles else program
        return program.batched(max(self.batches)) if self.batches else program

    @cached_property
    def build_time(self) -> dict[str, ComponentSpec]:
        """The networks that run once, during the build."""
        return self.system.build_time(self.settings)

    @cached_property
    def parameters(self) -> dict[str, Shapes]:
        """The shape of every parameter of every component."""
        return {name: parameter_shapes(spec) for name, spec in (self.components | self.build_time).items()}

    @cached_property
    def used(self) -> dict[str, Tensors]:
        """The origins that networks read or the user named; not text encoders that embeddings replace."""
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
        """Whether some weights are stand-ins: zeros in the place of real weights."""
        return any(tensors.stand_in for tensors in self.used.values())

    @property
    def licence(self) -> str:
        """The licence of the weights, from their files or from the system."""
        named = str(self.settings.choices.get("licence", ""))
        return named or self.system.licences.get(self.preset or "", self.system.licence)

    def missing_files(self, origin: str) -> InputError:
        """The error for a build that needs files of this origin and has none."""
        needs = self.system.origins[origin]
        return InputError(f"{needs.what} is missing; add it under --{needs.argument}")
