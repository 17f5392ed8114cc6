"""A network as its graph runs: traced, with seeded weights beside, before and after folding."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from support.systems import graph_of
from tilewright.export.graph.tidy import tidy
from tilewright.export.graph.trace import network_on_meta
from tilewright.export.system import ComponentSpec
from tilewright.export.weights.files import find, reference_parameters
from tilewright.export.weights.writing import random_weights
from tilewright.runtime.engines.ort import OrtEngine, open_graph


class Opened(NamedTuple):
    """A traced network: as folded, as it runs before and after folding, and as PyTorch runs it."""

    model: ir.Model
    engines: list[OrtEngine]
    eager: nn.Module


@pytest.fixture(scope="session")
def opened() -> Callable[[ComponentSpec, Path], Opened]:
    """Traces a source and opens its graphs in a folder."""

    def opened(source: ComponentSpec, folder: Path) -> Opened:
        model, network = graph_of(source), network_on_meta(source)
        assert {p.device.type for p in network.parameters()} == {"meta"}
        initializers = model.graph.initializers
        needed = [name for name, value in initializers.items() if isinstance(value.const_value, ir.ExternalTensor)]
        shapes = {"it": {name: tuple(initializers[name].shape.numpy()) for name in needed}}
        random_weights(shapes["it"], 7, folder / "weights.safetensors")
        plain = SimpleNamespace(origin_of=lambda *_: "it", keys=lambda _, name: (name,), ignored=lambda *_: False)
        references = reference_parameters(shapes, {"it": find(folder)}, plain)["it"]
        for name, r in references.items():
            initializers[name].const_value = ir.ExternalTensor(
                r.file, r.offset, r.length, ir.DataType.FLOAT, shape=ir.Shape(r.shape), name=name
            )
        ir.save(model, folder / "traced.onnx")
        tidy(model)
        ir.save(model, folder / "folded.onnx")
        network.load_state_dict(load_file(folder / "weights.safetensors"), assign=True)
        engines = [
            open_graph(folder / f"{form}.onnx", {"weights.safetensors": folder / "weights.safetensors"})
            for form in ("traced", "folded")
        ]
        return Opened(model, engines, network.requires_grad_(False))

    return opened


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No gradients, and one thread: for tensors as small as these, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
