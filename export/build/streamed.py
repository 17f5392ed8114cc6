"""Running a network once, reading its weights module by module, so that it may be larger than memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tilewright.export.graph.trace import network_on_meta
from tilewright.export.system import ComponentSpec
from tilewright.export.weights.files import mapped_tensor
from tilewright.runtime.bundle.weights import Reference

__all__ = ["run_streamed"]


def run_streamed(
    source: ComponentSpec, references: Mapping[str, tuple[Path, Reference]], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The outputs by name. The weights of a module are in memory, in float32, only while the module runs."""
    network = network_on_meta(source)
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        parameters = {name: references[prefix + name] for name, p in module._parameters.items() if p is not None}
        if parameters:
            module.register_forward_pre_hook(lambda module, _, parameters=parameters: _load(module, parameters))
            module.register_forward_hook(lambda module, *_: _unload(module))
    with torch.no_grad():
        results = network(**{name: torch.from_numpy(np.array(inputs[name])) for name in source.inputs})
    outputs = results if isinstance(results, tuple) else (results,)
    return {name: output.numpy() for name, output in zip(source.outputs, outputs, strict=True)}


def _load(module: nn.Module, parameters: Mapping[str, tuple[Path, Reference]]) -> None:
    for name, (folder, reference) in parameters.items():
        module._parameters[name] = nn.Parameter(mapped_tensor(folder, reference).float(), requires_grad=False)


def _unload(module: nn.Module) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
