"""LoRA files that cannot be meant are refused in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.lora import METADATA, PAIRS, pair, refusal, written
from tilewright.export.weights.files import find
from tilewright.export.weights.lora import read_adapters


def refused(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: object) -> str:
    """What is said of a file with these tensors, less the file."""
    lora = written(tmp_path / "my lora.safetensors", tensors, **metadata)
    text = refusal(read_adapters, find(lora))
    assert text.startswith(f"LoRA {lora}: ")
    return text.removeprefix(f"LoRA {lora}: ")


@pytest.mark.parametrize("spelling", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("missing", [0, 1], ids=["down", "up"])
def test_half_a_pair_is_refused(tmp_path, spelling, missing):
    tensors = pair("transformer.a") | pair("transformer.b", spelling=spelling)
    del tensors[f"transformer.b.{spelling.split()[missing]}.weight"]
    kept = f"transformer.b.{spelling.split()[1 - missing]}.weight"
    assert refused(tmp_path, tensors) == f"holds only one half of {kept}; copy or export it again"


def test_halves_beyond_three_are_not_named(tmp_path):
    tensors = {key: tensor for m in "edcba" for key, tensor in pair(m).items() if "_A" in key}
    named = ", ".join(f"{m}.lora_A.weight" for m in "abc")
    assert refused(tmp_path, tensors) == f"holds only one half of {named}, ...; copy or export it again"


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((4, 8), (6, 5)),
        ((8,), (6, 8)),
        ((4, 8), (6,)),
        ((), ()),
        ((4, 8, 3, 3), (6, 4)),
        ((4, 8), (6, 4, 1, 1)),
        ((4, 8, 3, 3), (6, 5, 1, 1)),
        ((4, 8, 1, 1), (6, 4, 3, 3)),
    ],
    ids=str,
)
def test_shapes_that_are_no_pair_are_refused(tmp_path, down, up):
    tensors = {"transformer.m.lora_A.weight": torch.zeros(down), "transformer.m.lora_B.weight": torch.zeros(up)}
    assert refused(tmp_path, tensors) == (
        f"'transformer.m.lora_A.weight' {list(down)} and 'transformer.m.lora_B.weight' {list(up)} are no pair"
        " [rank, in, ...] and [out, rank, 1...] of one rank above 0; export it again"
    )


def test_rank_zero_is_refused(tmp_path):
    """By the header's reader or here; what an empty shard saves."""
    lora = written(tmp_path / "lora.safetensors", pair("m", rank=0))
    text = refusal(lambda: read_adapters(find(lora)))
    assert str(lora) in text
    assert "[0, 8]" in text
    found = find(written(tmp_path / "other.safetensors", pair("m")))
    tensors = {key: replace(r, shape=tuple(0 if d == 4 else d for d in r.shape)) for key, r in found.tensors.items()}
    text = refusal(read_adapters, replace(found, tensors=tensors))
    assert "'m.lora_A.weight' [0, 8] and 'm.lora_B.weight' [6, 0] are no pair" in text
    assert text.endswith(" of one rank above 0; export it again")


KOHYA = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    "tensors",
    [
        pair(KOHYA, spelling="lora_down lora_up"),
        pair("m") | pair(KOHYA, spelling="lora_down lora_up"),
        {f"{KOHYA}.alpha": torch.tensor(1.0)},
        pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        pair("transformer.a.attn.processor", spelling="to_q_lora.down to_q_lora.up"),
        {"m.lora_mid.weight": torch.zeros(4, 4)} | pair("m", spelling="lora_down lora_up"),
        {"m.lora_A.alpha": torch.tensor(1.0)},
        {"lora_A.weight": torch.zeros(4, 8)},
    ],
    ids=lambda tensors: min(tensors),
)
def test_other_styles_are_refused_and_those_that_are_read_are_named(tmp_path, tensors):
    text = refused(tmp_path, tensors)
    unread = [key for key in sorted(tensors) if key not in pair("m") | pair("m", spelling="lora_down lora_up")]
    assert text.startswith(f"holds LoRA keys of an unknown style: {', '.join(unread)[:40]}")
    assert text.endswith(
        "known are <module.path>.lora_A/.lora_B.weight, .lora.down/.lora.up.weight and .lora_down/.lora_up.weight;"
        " load it in diffusers and save it with save_lora_weights"
    )


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("transformer.m.lora_magnitude_vector", "DoRA (magnitude vectors)"),
        ("base_model.model.m.lora_magnitude_vector.default.weight", "DoRA (magnitude vectors)"),
        (f"{KOHYA}.dora_scale", "DoRA (magnitude vectors)"),
        ("transformer.m.lora_B.bias", "biases of LoRA"),
        ("m.lora_B.default.bias", "biases of LoRA"),
        ("m.lora.up.bias", "biases of LoRA"),
    ],
)
def test_dora_and_biases_are_refused(tmp_path, key, what):
    text = refused(tmp_path, pair("transformer.m") | {key: torch.zeros(6)})
    assert text == f"holds {what}: {key}; not supported, train or export it without"


def test_a_file_without_lora_keys_is_refused(tmp_path):
    text = refused(tmp_path, {"vcb.fc1.weight": torch.zeros(2), "m.alpha": torch.zeros(1)})
    assert text == "holds no LoRA key; give the file with the lora_A and lora_B tensors"


@pytest.mark.parametrize(
    ("tensors", "both"),
    [
        (pair("transformer.m") | pair("m"), "m.lora_A.weight, transformer.m.lora_A.weight"),
        (pair("m") | pair("m", spelling="lora_A.x lora_B.x"), "m.lora_A.weight, m.lora_A.x.weight"),
        (pair("m") | {k: torch.zeros(1) for k in ("m.alpha", "m.lora_A.alpha")}, "m.alpha, m.lora_A.alpha"),
    ],
    ids=["two prefixes", "two adapters", "two alphas"],
)
def test_two_tensors_for_one_role_are_refused(tmp_path, tensors, both):
    assert refused(tmp_path, tensors) == f"holds both {both} for one module; keep one of them"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_alpha_that_is_not_finite_is_refused_wherever_it_stands(tmp_path, value):
    expected = f"alpha of 'm' is {value}, not a finite number; export it again"
    assert refused(tmp_path, pair("transformer.m") | {"transformer.m.alpha": torch.tensor(float(value))}) == expected
    assert refused(tmp_path, pair("m"), **{METADATA: {"lora_alpha": float(value)}}) == expected


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    text = refused(tmp_path, pair("m") | {"m.alpha": torch.zeros(2)})
    assert text == "'m.alpha' has shape [2], not one number; export it again"


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_pair_of_another_type_is_refused(tmp_path, role):
    tensors = pair("m")
    tensors[f"m.{role}.weight"] = tensors[f"m.{role}.weight"].to(torch.float8_e4m3fn)
    assert refused(tmp_path, tensors) == (
        f"'m.{role}.weight' is float8_e4m3fn, not one of float32, float16, bfloat16; convert it"
    )


BROKEN = {
    "not JSON": "{",
    "no object": "[1]",
    "a number": "1",
    "alpha is a word": '{"lora_alpha": "much"}',
    "alpha is null": '{"lora_alpha": null}',
    "alpha is beyond any float": f'{{"lora_alpha": 1{"0" * 400}}}',
    "patterns are a list": '{"lora_alpha": 1, "alpha_pattern": [1]}',
    "a pattern is no expression": '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}',
    "nested beyond measure": "[" * 200_000,
    "not UTF-8": b"\xff\xfe\xfa",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_notes_are_refused(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    lora = written(tmp_path / "adapter_model.safetensors", pair("m"))
    config = tmp_path / "adapter_config.json"
    config.write_bytes(data)
    said = refusal(read_adapters, find(lora))
    assert said.startswith(f"LoRA {config}: unreadable notes on alpha (")
    assert said.endswith("); export it again")


def test_broken_notes_in_the_header_are_refused(tmp_path):
    save_file(pair("m"), tmp_path / "a.safetensors", {METADATA: "{"})
    said = refusal(read_adapters, find(tmp_path / "a.safetensors"))
    assert said.startswith(f"LoRA {tmp_path / 'a.safetensors'}: unreadable notes on alpha (")
