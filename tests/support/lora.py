"""LoRA files to read, and the line in which a wrong one must be refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tilewright.export.weights.files import find
from tilewright.export.weights.lora import merge, read_adapters
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError

__all__ = ["DTYPES", "METADATA", "NEEDED", "PAIRS", "assert_close", "merged", "pair", "refusal", "tensor_of", "written"]

NEEDED = "the package whose files are read"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METADATA = "lora_adapter_metadata"


def refusal(act, *arguments) -> str:
    """The one line that a wrong LoRA gets."""
    with pytest.raises(InputError) as caught:
        act(*arguments)
    assert caught.value.exit_code == 8
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def written(path: Path, tensors: dict[str, torch.Tensor], **metadata: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()} | {"format": "pt"})
    return path


def pair(module: str, rank: int = 4, out: int = 6, width: int = 8, spelling: str = "lora_A lora_B") -> dict:
    """The tensors of one linear's adapter, each different."""
    down, up = spelling.split()
    generator = torch.Generator().manual_seed(sum(module.encode()))
    return {
        f"{module}.{down}.weight": torch.randn(rank, width, generator=generator),
        f"{module}.{up}.weight": torch.randn(out, rank, generator=generator),
    }


def tensor_of(folder: Path, reference: Reference) -> torch.Tensor:
    data = bytearray((folder / reference.file).read_bytes()[reference.offset :][: reference.length])
    return torch.frombuffer(data, dtype=DTYPES[reference.dtype]).reshape(reference.shape)


def merged(base: Path, lora: Path, prefixes=("transformer.",), default_alpha=None, strength=1.0) -> dict:
    """Every weight of the base file with the LoRA file in it, and the names of those that it is in."""
    weights, found = find(base), find(lora)
    adapters, rest = read_adapters(found, prefixes, default_alpha)
    assert not rest
    result = {name: tensor_of(weights.folder, reference) for name, reference in weights.tensors.items()}
    for module, adapter in adapters.items():
        name = f"{module}.weight"
        data = merge(weights.folder, weights.tensors[name], found.folder, adapter, strength)
        result[name] = torch.frombuffer(bytearray(data), dtype=result[name].dtype).reshape(result[name].shape)
    return result


def assert_close(ours: dict, theirs: dict, base: dict, adapted: int) -> None:
    """Equal to a few float32 roundings, and changed in just as many places as were adapted."""
    assert ours.keys() == theirs.keys() == base.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert len(changed) == adapted
    assert all((ours[name] - base[name]).abs().mean() > 1e-3 for name in changed)


PAIRS = {
    "diffusers and PEFT": "lora_A lora_B",
    "with the adapter's name": "lora_A.default lora_B.default",
    "old diffusers": "lora.down lora.up",
    "underscores": "lora_down lora_up",
}
