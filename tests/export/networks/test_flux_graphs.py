"""The graphs of FLUX.1-Fill's networks against eager PyTorch."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support.lazily import Lazily
from support.quick import few_quick
from support.random_networks import distance, made, random
from support.systems import graph_of
from tilewright.export.graph.trace import network_on_meta
from tilewright.export.networks import vae as vae_networks
from tilewright.export.system import ComponentSpec, Lora, Preset, UserFiles
from tilewright.export.systems.flux.in_token import SYSTEM as IN_TOKEN
from tilewright.export.systems.flux.sizes import PRESETS, Sizes
from tilewright.export.systems.flux.vicr import SYSTEM as VICR
from tilewright.export.weights.files import find
from tilewright.runtime.bundle.program import ANY
from tilewright.runtime.engines.ort import OrtEngine, open_graph

SIZES = PRESETS["tiny"]
CONFIG = SIZES.transformer
pytestmark = pytest.mark.usefixtures("quick")


class Opened(NamedTuple):
    """A traced network: as a graph, as it runs, and as PyTorch runs it."""

    source: ComponentSpec
    model: ir.Model
    engine: OrtEngine
    eager: nn.Module


def opened(source: ComponentSpec, folder: Path) -> Opened:
    model, network = graph_of(source), network_on_meta(source)
    weights = {n: torch.empty(p.shape) for n, p in network.named_parameters()}
    filled = made(nn.ParameterDict({n.replace(".", "/"): t for n, t in weights.items()}), seed=7)
    save_file({n.replace("/", "."): p.data for n, p in filled.items()}, folder / "weights.safetensors")
    network.load_state_dict({n.replace("/", "."): p.data for n, p in filled.items()}, assign=True)
    found = find(folder)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            r = found.tensors[name]
            value.const_value = ir.ExternalTensor(
                r.file, r.offset, r.length, ir.DataType.FLOAT, shape=ir.Shape(r.shape), name=name
            )
    ir.save(model, folder / "traced.onnx")
    files = {"weights.safetensors": folder / "weights.safetensors"}
    engine = open_graph(folder / "traced.onnx", files, threads=1)
    return Opened(source, model, engine, network.requires_grad_(False))


BRANCHED = [
    "x_embedder",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.norm.linear",
    "single_transformer_blocks.0.proj_out",
]


def sources(sizes: Sizes) -> dict[str, ComponentSpec]:
    preset, nothing = Preset("it", sizes, explicit=False), UserFiles({}, {})
    one = IN_TOKEN.components(IN_TOKEN.decide(preset, {}, nothing))
    options = {"no_split_modulation": True, "mask": "1", "exact_scalars": "off"}
    whole = IN_TOKEN.components(IN_TOKEN.decide(preset, options, nothing))
    diptych = VICR.decide(preset, {"margin_columns": 3}, nothing)
    lora = Lora("lora", 1.0, False, {module: [2, 0.5 + i / 4] for i, module in enumerate(BRANCHED)})
    branched = VICR.components(dataclasses.replace(diptych, lora=lora))
    return {
        "step": one["step"],
        "whole step": whole["step"],
        "diptych step with branches": branched["step"],
        "modulate": one["modulate"],
        "modulate with branches": branched["modulate"],
        "encode": one["encode"],
        "diptych encode": branched["encode"],
        "decode": one["decode"],
        "diptych decode": branched["decode"],
    }


GRAPHS = few_quick(sources(SIZES), "step")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[str, Opened]:
    """Every network, traced when it is first used; fewer chunks and, but for three, fewer blocks save time."""
    single, shallow = (
        replace(
            SIZES,
            transformer=CONFIG | {"num_layers": layers, "num_single_layers": 1},
            vae=SIZES.vae | {"block_out_channels": (8, 8), "layers_per_block": 0},
        )
        for layers in (0, 1)
    )
    taken = sources(shallow) | {"whole step": sources(single)["whole step"]}
    taken |= {name: sources(SIZES)[name] for name in ("step", "encode", "decode")}

    def open_it(name: str) -> Opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vae_networks, "QUERY_CHUNKS", 3)
            return opened(taken[name], tmp_path_factory.mktemp("graph"))

    return Lazily(open_it)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_needs_each_parameter_and_has_plain_operators(graphs, name):
    model, eager = graphs[name].model, graphs[name].eager
    outside = {n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert outside == {n for n, _ in eager.named_parameters()}
    ours = {node.op_type.split("_without_")[0] for node in model.graph.all_nodes() if node.domain == "tilewright"}
    double = {"JointAttention"} if any(".transformer_blocks." in name for name in outside) else set()
    assert ours == ({"ConcatProject", "QkvNormRope", *double} if "step" in name else set())
    assert {node.domain for node in model.graph.all_nodes()} <= {"", "tilewright"}
    assert {overload for *_, overload in model.functions} <= {""}  # NVIDIA's tools know none
    assert [value.name for value in model.graph.inputs] == list(graphs[name].source.inputs)


# none is the example's own size, and two have a batch of 2
@pytest.mark.slow
@pytest.mark.parametrize("mixed", [0, 1])
@pytest.mark.parametrize("units", [(2, 3, 2, 3), (2, 1, 5, 1), (1, 6, 1, 4)], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_runs_as_eager_pytorch_does_tile_by_tile(graphs, name, units, mixed):
    graph = graphs[name]
    batch, tall, wide, steps = units
    sizes = {"batch": batch, "h": tall, "w": wide, "w2": wide, "height": tall, "width": wide, "steps": steps}
    scalars = {"sigma": 0.9884, "sigma_next": 0.9762, "guidance": 30.0, "lora_scale": 0.7}
    inputs = {}
    for i, (key, spec) in enumerate(graph.source.inputs.items()):
        # what tiles may share has a row for each in every second input, else one
        sizes[ANY] = batch if i % 2 == mixed else 1
        shape = [d if isinstance(d, int) else sizes[d] * graph.source.multiples.get(d, 1) for d in spec.shape]
        inputs[key] = random(*shape, seed=i)
        if key in scalars:
            inputs[key] = scalars[key] * torch.linspace(1, 0.5, len(inputs[key]))
    if "sigmas" in inputs:
        inputs["sigmas"] = torch.linspace(1, 0.01, steps)[None]
    expected = torch.cat(
        [graph.eager(**{k: x[[b]] if len(x) > 1 else x for k, x in inputs.items()}) for b in range(batch)]
    )
    (wanted,) = graph.source.outputs
    ours = graph.engine.run({key: value.numpy() for key, value in inputs.items()}, [wanted])[wanted]
    if "step" in name:  # in what the step changed
        ours, expected = ours - inputs["z"].numpy(), expected - inputs["z"]
    assert float(expected.std()) > 1e-3
    assert distance(torch.from_numpy(np.asarray(ours)), expected) <= (1e-6 if name == "modulate" else 1e-5)


@pytest.mark.slow
def test_in_onnx_runtime_the_modulation_keeps_the_last_bit_of_guidance(graphs):
    """Whose sinusoid is evaluated at 30,000, where neighbouring numbers of float32 are 0.002 apart."""
    graph, pooled, sigmas = graphs["modulate"], random(1, 16, seed=5), torch.linspace(1, 0.04, 28)[None]
    for guidance in (30.0, 29.99, 3.5):
        inputs = {"pooled": pooled, "guidance": torch.tensor([guidance]), "sigmas": sigmas}
        ours = graph.engine.run({key: value.numpy() for key, value in inputs.items()}, ["modulation"])["modulation"]
        expected = graph.eager(**inputs)
        for row in range(expected.shape[2]):
            assert distance(torch.from_numpy(ours[0, :, row]), expected[0, :, row]) <= 1e-6
