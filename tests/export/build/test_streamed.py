"""A network run module by module gives what the whole one gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.systems import settings_of
from tilewright.export.build import streamed
from tilewright.export.build.streamed import run_streamed
from tilewright.export.graph.trace import network_on_meta, parameter_specs
from tilewright.export.system import ComponentSpec
from tilewright.export.systems.flux.fill import modulate, sizes_of, text_encoders
from tilewright.export.weights.files import find
from tilewright.export.weights.writing import random_weights
from tilewright.runtime.bundle.program import ANY

SETTINGS = settings_of("in-token")
SOURCES = text_encoders(sizes_of(SETTINGS)) | {"modulate": modulate(SETTINGS, bridge=False)}


def feed(source: ComponentSpec) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    sizes = {"steps": 4, "batch": 1, ANY: 1}
    shapes = {name: [sizes.get(str(d), d) for d in spec.shape] for name, spec in source.inputs.items()}
    return {
        name: random.integers(3, 60, shapes[name])
        if spec.dtype == "int64"
        else random.random(shapes[name]).astype(np.float32)
        for name, spec in source.inputs.items()
    }


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_what_the_whole_network_gives(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = SOURCES[name]
    shapes = {key: tuple(int(d) for d in spec.shape) for key, spec in parameter_specs(source).items()}
    random_weights(shapes, 5, tmp_path / "f32.safetensors")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / "f32.safetensors").items()}
    (tmp_path / "w").mkdir()
    save_file(tensors, tmp_path / "w" / "w.safetensors")
    found = find(tmp_path / "w")
    inputs = feed(source)
    ours = run_streamed(source, {key: (found.folder, r) for key, r in found.tensors.items()}, inputs)
    network = network_on_meta(source)
    network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    with torch.no_grad():
        whole = network(**{key: torch.from_numpy(np.array(inputs[key])) for key in source.inputs})
    assert ours.keys() == source.outputs.keys()
    np.testing.assert_array_equal(next(iter(ours.values())), whole.numpy())
    assert whole.std() > 0.01


def test_few_weights_are_there_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["t5"]
    shapes = {key: tuple(int(d) for d in spec.shape) for key, spec in parameter_specs(source).items()}
    random_weights(shapes, 5, tmp_path / "w.safetensors")
    found, there, most = find(tmp_path), 0, 0
    load, unload = streamed._load, streamed._unload

    def counted(module, own):  # type: ignore[no-untyped-def]
        nonlocal there, most
        load(module, own)
        there += sum(r.length for _, r in own.values())
        most = max(most, there)

    def given_back(module):  # type: ignore[no-untyped-def]
        nonlocal there
        there -= sum(4 * p.numel() for p in module._parameters.values() if p is not None)
        unload(module)
        assert all(p.is_meta for p in module._parameters.values() if p is not None)

    monkeypatch.setattr(streamed, "_load", counted)
    monkeypatch.setattr(streamed, "_unload", given_back)
    run_streamed(source, {key: (found.folder, r) for key, r in found.tensors.items()}, feed(source))
    total = sum(r.length for r in found.tensors.values())
    assert there == 0 and 0 < most <= max(4 * int(np.prod(shape)) for shape in shapes.values()) < total
