"""A system's networks with the weights of files, run eagerly in the place of engines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tilewright.export.graph.trace import network_on_meta, parameter_specs
from tilewright.export.system import ComponentSpec, Settings, System, Tensors
from tilewright.export.weights.files import converted, mapped_tensor, reference_parameters

__all__ = ["EagerEngine", "eager_engines"]


class EagerEngine:
    """A component's network, called as an engine is."""

    def __init__(self, spec: ComponentSpec, network: nn.Module) -> None:
        self.spec, self.network = spec, network

    def run(self, inputs: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """All outputs, by name."""
        tensors = {
            name: torch.from_numpy(np.array(inputs[name], spec.dtype)) for name, spec in self.spec.inputs.items()
        }
        with torch.no_grad():
            outputs = self.network(**tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: output.numpy() for name, output in zip(self.spec.outputs, outputs, strict=True)}


def eager_engines(system: System, settings: Settings, tensors: Mapping[str, Tensors]) -> dict[str, EagerEngine]:
    """Component -> its network, every parameter from the files of its origin; those of the build too."""
    origins = {name: system.origins[name].rename(converted(of)) for name, of in tensors.items()}
    specs = {**system.components(settings), **system.build_time(settings)}
    shapes = {
        component: {name: tuple(parameter.shape) for name, parameter in parameter_specs(spec).items()}
        for component, spec in specs.items()
    }
    engines = {}
    for component, references in reference_parameters(shapes, origins, system).items():
        network = network_on_meta(specs[component])
        state = {
            name: mapped_tensor(origins[str(r.folder)].folder, r).clone().float() for name, r in references.items()
        }
        for name in network.load_state_dict(state, strict=False, assign=True).missing_keys:
            assert system.ignored(system.origin_of(component, name), str(system.keys(component, name)[0])), name
        engines[component] = EagerEngine(specs[component], network.requires_grad_(False))
    return engines
