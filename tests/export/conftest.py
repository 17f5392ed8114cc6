"""HiTokSR's tiny preset, traced once for all: its graphs beside seeded weights, and the networks they came from."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from safetensors.torch import load_file
from torch import nn

from support.shared import Shared
from support.systems import components_of
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.build.stages.trace import stage
from tilewright.export.graph.tidy import tidy
from tilewright.export.graph.trace import network_on_meta
from tilewright.export.systems.hitoksr.system import SYSTEM as HITOKSR
from tilewright.export.targets.ort import prepare
from tilewright.export.weights.files import find, reference_parameters
from tilewright.export.weights.writing import random_weights


@pytest.fixture(scope="session")
def unverified(cache: Path, shared: Shared) -> Callable[[str], Path]:
    """A system -> its tiny bundle, built without a comparison; do not change it."""

    def built(system: str) -> Path:
        return shared(f"{system}-unverified", lambda r: build(Request(system, "tiny", r, seed=0, verify="never")))

    return built


@pytest.fixture(scope="session")
def traced(cache: Path, shared: Shared) -> Path:
    """COMPONENT.onnx as traced, its weights unresolved; do not change them."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        stage(Request("hitoksr", "tiny", folder, seed=0)).work(folder)  # a build in this run needs these graphs too

    return shared("traced", fill)


@pytest.fixture(scope="session")
def graphs(traced: Path, shared: Shared) -> Path:
    """COMPONENT.FORM.onnx with weights.safetensors beside; FORM: traced, model (portable), ort. Do not change them."""
    return shared("graphs", lambda folder: _write_graphs(traced, folder))


def _write_graphs(traced: Path, folder: Path) -> None:
    folder.mkdir()
    models = {name: ir.load(traced / f"{name}.onnx") for name in components_of("hitoksr", "tiny")}
    shapes = {
        component: {
            name: tuple(value.const_value.shape.numpy())
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        for component, model in models.items()
    }
    keyed = {HITOKSR.keys(c, name)[0]: shape for c, of in shapes.items() for name, shape in of.items()}
    random_weights(keyed, 7, folder / "weights.safetensors")
    references = reference_parameters(shapes, {"hitoksr": find(folder)}, HITOKSR)
    for component, model in models.items():
        for name, r in references[component].items():
            model.graph.initializers[name].const_value = ir.ExternalTensor(
                r.file, r.offset, r.length, ir.DataType.FLOAT, shape=ir.Shape(r.shape), name=name
            )
        ir.save(model, folder / f"{component}.traced.onnx")
        tidy(model)
        ir.save(model, folder / f"{component}.model.onnx")
        prepare(model)
        ir.save(model, folder / f"{component}.ort.onnx")


@pytest.fixture(scope="session")
def eager(graphs: Path) -> dict[str, nn.Module]:
    """The networks with the weights of `graphs`."""
    tensors = load_file(graphs / "weights.safetensors")
    networks = {}
    for component, source in components_of("hitoksr", "tiny").items():
        network = network_on_meta(source)
        own = {name: tensors.get(HITOKSR.keys(component, name)[0]) for name, _ in network.named_parameters()}
        left = network.load_state_dict({n: t for n, t in own.items() if t is not None}, strict=False, assign=True)
        assert all(name.endswith("mask_token") for name in left.missing_keys)
        networks[component] = network.requires_grad_(False)
    return networks
