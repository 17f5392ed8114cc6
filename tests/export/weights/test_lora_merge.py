"""A LoRA's merge is rounded once, and never to a number that is not finite."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.lora import DTYPES, merged, pair, refusal, written
from tilewright.export.weights.files import find
from tilewright.export.weights.lora import merge, read_adapters
from tilewright.runtime.bundle.weights import Reference

sizes = st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(sizes, sizes, sizes),
    st.sampled_from([(), (1, 1), (3, 3), (2,), (2, 1, 3)]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([0.0, 0.25, 1.0, -2.0]),
    st.integers(0, 2**31),
)
def test_a_merge_is_rounded_once(dimensions, kernel, base_dtype, dtype, strength, seed):
    """All values are multiples of 2**-9 below 2**12, so that only the last rounding can lose anything."""
    rank, out, width = dimensions
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator).double()

    base = (drawn(2**10, out, width, *kernel) / 2**7).to(DTYPES[base_dtype])
    down, up = drawn(8, rank, width, *kernel), drawn(8, out, rank, *(1 for _ in kernel))
    exact = base.double() + strength * 0.5 * torch.einsum("or,r...->o...", up.flatten(1), down)
    with tempfile.TemporaryDirectory() as name:
        weights = find(written(Path(name) / "base.safetensors", {"pad": torch.zeros(1), "m.weight": base}))
        lora = {"m.lora_A.weight": down.to(DTYPES[dtype]), "m.lora_B.weight": up.to(DTYPES[dtype])}
        file = written(Path(name) / "lora.safetensors", lora | {"m.alpha": torch.tensor(rank / 2)})
        before = (Path(name) / "base.safetensors").read_bytes()
        found = find(file)
        (adapter,) = read_adapters(found)[0].values()
        data = merge(weights.folder, weights.tensors["m.weight"], found.folder, adapter, strength)
        assert data == exact.to(base.dtype).view(torch.uint8).numpy().tobytes()
        assert (Path(name) / "base.safetensors").read_bytes() == before


def test_a_merge_into_bfloat16_goes_to_the_nearest_and_to_even_halfway(tmp_path):
    """The spacing above 256 is 2: adding 1 is halfway."""
    base = torch.tensor([[256.0], [258.0], [256.0], [-258.0]], dtype=torch.bfloat16)
    lora = {"m.lora_A.weight": torch.ones(1, 1), "m.lora_B.weight": torch.tensor([[1.0], [1.0], [1.001], [-1.0]])}
    find(written(tmp_path / "base.safetensors", {"m.weight": base}))
    written(tmp_path / "lora.safetensors", lora)
    ours = merged(tmp_path / "base.safetensors", tmp_path / "lora.safetensors")["m.weight"]
    assert ours.dtype == torch.bfloat16
    assert ours.flatten().tolist() == [256, 260, 258, -260]


def test_large_merges_are_as_exact_as_float32(tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, down, up = (torch.randn(s, generator=generator) for s in ((96, 80), (64, 80), (96, 64)))
    written(tmp_path / "base.safetensors", {"m.weight": base})
    written(tmp_path / "lora.safetensors", {"m.lora_A.weight": down, "m.lora_B.weight": up})
    ours = merged(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", default_alpha=1.0, strength=0.8)
    exact = base.double() + 0.8 / 64 * up.double() @ down.double()
    assert (ours["m.weight"] - exact).abs().max() < 2e-6
    assert (base - exact).abs().mean() > 0.05


def test_a_row_slice_of_a_fused_tensor_merges_on_its_own(tmp_path):
    fused = torch.randn(18, 8, generator=torch.Generator().manual_seed(4)).bfloat16()
    weights = find(written(tmp_path / "base.safetensors", {"qkv.weight": fused}))
    found = find(written(tmp_path / "lora.safetensors", pair("to_k")))
    whole = weights.tensors["qkv.weight"]
    rows = Reference(whole.file, whole.dtype, (6, 8), whole.offset + 6 * 8 * 2, 6 * 8 * 2)
    down, up = pair("to_k").values()
    expected = (fused[6:12].float() + up @ down).bfloat16()
    data = merge(weights.folder, rows, found.folder, read_adapters(found)[0]["to_k"], 1.0)
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(6, 8), expected)


def merge_refusal(tmp_path: Path, base: torch.Tensor, strength: float = 1.0, scale: float = 1.0) -> str:
    weights = find(written(tmp_path / "base.safetensors", {"m.weight": base}))
    found = find(written(tmp_path / "lora.safetensors", pair("m")))
    adapter = read_adapters(found, default_alpha=4 * scale)[0]["m"]
    return refusal(merge, weights.folder, weights.tensors["m.weight"], found.folder, adapter, strength)


def test_a_base_of_another_type_or_shape_takes_no_merge(tmp_path):
    assert merge_refusal(tmp_path, torch.zeros(6, 8).to(torch.float8_e4m3fn)) == (
        f"weights {tmp_path / 'base.safetensors'}: float8_e4m3fn takes no LoRA;"
        " give them in one of float32, float16, bfloat16"
    )
    for shape in ((8, 6), (6, 1), (6, 8, 1, 1)):
        assert merge_refusal(tmp_path, torch.zeros(shape)) == (
            f"LoRA {tmp_path / 'lora.safetensors'}: a pair for [6, 8] does not fit {list(shape)} of"
            f" {tmp_path / 'base.safetensors'}; is this the LoRA of this system and size?"
        )


@pytest.mark.parametrize(
    ("dtype", "strength", "scale"),
    [("float16", 1e6, 1.0), ("float16", 1.0, 1e6), ("bfloat16", 1e39, 1.0), ("float32", float("nan"), 1.0)],
)
def test_a_merge_that_is_not_finite_is_refused(tmp_path, dtype, strength, scale):
    assert merge_refusal(tmp_path, torch.ones(6, 8, dtype=DTYPES[dtype]), strength, scale) == (
        f"LoRA {tmp_path / 'lora.safetensors'}: at strength {strength} {dtype} weights are not finite; lower it"
    )
