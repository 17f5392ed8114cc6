"""The networks that a bundle was traced from, in eager PyTorch with the bundle's weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.export.graph.trace import network_on_meta
from tilewright.export.system import Settings
from tilewright.export.systems import system
from tilewright.export.weights.files import mapped_tensor
from tilewright.runtime.bundle.read import Bundle

__all__ = ["Eager", "eager_network"]


@dataclass
class Eager:
    """An eager network with the interface of an engine."""

    network: Any
    names: tuple[str, ...]  # names of its outputs

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        with torch.no_grad():  # it holds for one thread only, and tiles run in several
            results = self.network(**{name: torch.from_numpy(np.array(array)) for name, array in inputs.items()})
        arrays = dict(zip(self.names, results if isinstance(results, tuple) else (results,), strict=True))
        return {name: arrays[name].numpy() for name in outputs}

    def close(self) -> None:
        """Nothing to free."""


def eager_network(bundle: Bundle, component: str, weights_dir: Path | None) -> Eager:
    """The eager network with the bundle's weights, which are mapped if they are stored in float32."""
    settings = Settings.from_json(bundle.manifest.options["settings"])
    spec = system(bundle.manifest.system).components(settings)[component]
    network = network_on_meta(spec)
    references = bundle.weights.tensors.get(component, {})
    folders = {name: bundle.folder(name, weights_dir) for name in bundle.weights.folders_of(component)}
    tensors = {n: mapped_tensor(folders[r.folder], r).float() for n, r in references.items()}
    network.load_state_dict(tensors, strict=False, assign=True)
    return Eager(network, tuple(spec.outputs))
