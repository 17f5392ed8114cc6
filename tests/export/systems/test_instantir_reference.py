"""The eager reference of InstantIR against published counts, closed forms and diffusers' plain networks."""

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from support import instantir_reference as instantir

pytestmark = pytest.mark.slow
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers spend their time waiting for a second thread, seconds at a time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def files() -> dict[str, Any]:
    """Tiny random files; do not change them."""
    return instantir.make_files(instantir.TINY, 0)


@pytest.fixture(scope="session")
def reference(files: dict[str, Any]) -> Any:
    """The tiny system."""
    return instantir.Reference(files, instantir.TINY)


@pytest.fixture(scope="session")
def y(reference: Any) -> Tensor:
    """The latent of a random image, wider than high."""
    return reference.encode(torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def conditions(reference: Any) -> dict[str, Tensor]:
    """What the two prompts and the two images come to."""
    return conditions_of(reference)


def conditions_of(reference: Any) -> dict[str, Tensor]:
    """What the two prompts and the two images come to."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 62, (2, 16), generator=generator)
    ids[0, 5:], ids[1, 9:] = 63, 63
    texts = [reference.text(row[None], row[None]) for row in ids]
    image = torch.randn(1, 3, 28, 28, generator=generator)
    features = [reference.features(pixels) for pixels in (torch.zeros_like(image), image)]
    return {
        "context2": torch.cat([context for context, _ in texts]),
        "pooled2": torch.cat([pooled for _, pooled in texts]),
        "tokens2": torch.cat([reference.tokens(f, preview=False) for f in features]),
        "preview_tokens2": torch.cat([reference.tokens(f, preview=True) for f in features]),
    }


def noise(stream: int) -> Tensor:
    """The gaussian of a stream in the shape of y."""
    return torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(100 + stream))


def walk(reference: Any, y: Tensor, conditions: dict[str, Tensor], **how: Any) -> list[dict[str, Any]]:
    """A short trajectory."""
    defaults = {"steps": STEPS, "guidance": 7.0, "sampler": "ddim", "adares": "off"}
    return reference.trajectory(y, noise, **(conditions | defaults | how))


def apart(a: Tensor, b: Tensor) -> float:
    """How far b is from a, relative to a."""
    return ((a - b).norm() / a.norm()).item()


def millions(shapes: dict[str, tuple[int, ...]], part: str = "") -> float:
    """The parameters whose name has the part."""
    return sum(math.prod(shape) for key, shape in shapes.items() if part in key) / 1e6


def test_full_size_has_the_published_counts() -> None:
    """The table of 4.1."""
    shapes = instantir.file_shapes(instantir.FULL)
    assert millions(shapes["unet"]) == pytest.approx(2567.46, abs=0.005)
    assert millions(shapes["adapter"]["ip_adapter"]) == pytest.approx(767.1, abs=0.05)
    assert len(shapes["adapter"]["ip_adapter"]) == 70 * 6
    assert millions(shapes["adapter"]["image_proj"]) == pytest.approx(82.7, abs=0.05)
    assert millions(shapes["aggregator"]) == pytest.approx(1004.8, abs=0.05)
    assert millions(shapes["aggregator"], "controlnet_") == pytest.approx(30.9, abs=0.05)
    inside = {key: shape for key, shape in shapes["previewer"].items() if "image_projection_layers" in key}
    assert millions(inside) == pytest.approx(2.65, abs=0.005)
    assert millions(shapes["previewer"]) - millions(inside) == pytest.approx(229.5, abs=0.05)
    assert len(shapes["previewer"]) - len(inside) == 2 * 928
    assert millions(shapes["vae"]) == pytest.approx(83.65, abs=0.005)
    assert millions(shapes["text_encoder"]) == pytest.approx(123.06, abs=0.005)
    assert millions(shapes["text_encoder_2"]) == pytest.approx(694.66, abs=0.005)
    assert millions(shapes["dino"]) == pytest.approx(304.37, abs=0.005)


def test_the_tiny_unet_has_the_published_size() -> None:
    """345 780 parameters and 16 processors, half of them on the text."""
    assert millions(instantir.file_shapes(instantir.TINY)["unet"]) * 1e6 == 345780
    with torch.device("meta"):
        unet = UNet2DConditionModel(**instantir.TINY.unet)
    assert len(unet.attn_processors) == 16
    assert list(instantir.image_attentions(unet)) == list(range(1, 16, 2))


def test_the_adapter_counts_down_then_up_then_middle() -> None:
    """The ranges of 4.9 in diffusers' order."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**instantir.FULL.unet)
    found: dict[str, list[int]] = {}
    for k, name in instantir.image_attentions(unet).items():
        block = name.split(".attentions.")[0]
        found.setdefault(block if block != "down_blocks.1" else name.split(".transformer")[0], []).append(k)
    assert {block: (k[0], k[-1]) for block, k in found.items()} == {
        "down_blocks.1.attentions.0": (1, 3),
        "down_blocks.1.attentions.1": (5, 7),
        "down_blocks.2": (9, 47),
        "up_blocks.0": (49, 107),
        "up_blocks.1": (109, 119),
        "mid_block": (121, 139),
    }
    assert [k for block in found.values() for k in block] == list(range(1, 140, 2))


def test_files_have_the_published_names(files: dict[str, Any]) -> None:
    """One of every spelling that a loader must know."""
    attention = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    inside = "unet.encoder_hid_proj.image_projection_layers.0"
    for key in (
        f"{attention}.attn1.to_k.lora.down.weight",
        f"{attention}.attn2.to_out.0.lora.up.weight",
        f"{attention}.attn2.to_k_ip.lora_A.weight",
        f"{attention}.attn2.ln_v_ip.linear.lora_B.weight",
        f"{attention}.ff.net.0.proj.lora_A.weight",
        "unet.down_blocks.0.downsamplers.0.conv.lora_A.weight",
        f"{inside}.layers.1.0.to_kv.lora_A.weight",
        f"{inside}.proj_out.lora_B.weight",
    ):
        assert key in files["previewer"]
    assert not any("attn2.to_k." in key or "attn2.to_v." in key or ".layers.0.1." in key for key in files["previewer"])
    assert "15.ln_k_ip.linear.bias" in files["adapter"]["ip_adapter"]
    assert {"latents", "layers.0.0.to_kv.weight", "layers.1.1.3.weight"} <= files["adapter"]["image_proj"].keys()
    assert "encoder.layer.0.attention.attention.query.weight" in files["dino"]
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in files["text_encoder"]
    assert "text_projection.weight" in files["text_encoder_2"]
    assert "controlnet_mid_block.0.mlp_shared.0.weight" in files["aggregator"]
    assert "controlnet_down_blocks.3.1.bias" in files["aggregator"]
    assert not any("attn2" in key or ("norm2" in key and "transformer" in key) for key in files["aggregator"])
    assert all(tensor.dtype == torch.float32 for tensor in files["unet"].values())


def test_a_merged_lora_is_the_live_one() -> None:
    """Linear layers and strided convolutions, at 1/rank, or alpha/rank where a file says alpha."""
    a, b = torch.randn(4, 6), torch.randn(8, 4)
    kernel_a, kernel_b = torch.randn(4, 6, 3, 3), torch.randn(8, 4, 1, 1)
    file = {"unet.x.lora.down.weight": a, "unet.x.lora.up.weight": b}
    file |= {"unet.y.lora_A.weight": kernel_a, "unet.y.lora_B.weight": kernel_b, "unet.y.alpha": torch.tensor(2.0)}
    deltas = instantir.lora_deltas(file)
    flat, picture = torch.randn(5, 6), torch.randn(1, 6, 9, 9)
    torch.testing.assert_close(F.linear(flat, deltas["x"]), F.linear(F.linear(flat, a), b) / 4)
    live = F.conv2d(F.conv2d(picture, kernel_a, stride=2, padding=1), kernel_b) / 2
    merged = F.conv2d(picture, deltas["y"].view(8, 6, 3, 3), stride=2, padding=1)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)


def test_the_lora_changes_its_targets_and_nothing_else(reference: Any) -> None:
    """The previewer differs in every module of 4.9 and keeps its text keys and values, norms and biases."""
    base, preview = (unet.state_dict() for unet in reference.unets)
    changed = {key for key in base if not torch.equal(base[key], preview[key])}
    attentions = {key for key in base if ".attn" in key and key.endswith(".weight")}
    assert attentions - changed == {key for key in attentions if ".attn2.to_k." in key or ".attn2.to_v." in key}
    assert not any(key.endswith(".bias") or "norm" in key for key in changed)
    assert not any(key.startswith(("conv_", "time_embedding", "add_embedding")) for key in changed)
    assert all(key in changed for key in base if ".conv" in key and key.endswith("weight"))


def test_without_image_attention_the_unet_is_diffusers_own(files: dict[str, Any], y: Tensor) -> None:
    """Image values at nought leave SDXL's network as it is, and both receive the same embedding of time."""
    bare = copy.copy(files)
    adapter = {k: 0 * v if "v_ip" in k else v for k, v in files["adapter"]["ip_adapter"].items()}
    bare["adapter"] = {"image_proj": files["adapter"]["image_proj"], "ip_adapter": adapter}
    reference = instantir.Reference(bare, instantir.TINY)
    conditions = conditions_of(reference)
    z2, t = torch.cat([noise(0), y]), torch.tensor(500)
    plain = UNet2DConditionModel(**instantir.TINY.unet).eval().requires_grad_(False)
    plain.load_state_dict(files["unet"], strict=True)
    time_ids = torch.tensor([[24.0, 32, 0, 0, 24, 32]] * 2)
    seen = []
    plain.mid_block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    added = {"text_embeds": conditions["pooled2"], "time_ids": time_ids}
    wanted = plain(z2, t, encoder_hidden_states=conditions["context2"], added_cond_kwargs=added).sample
    got = reference.eps(z2, t, conditions["context2"], conditions["pooled2"], conditions["tokens2"], None, False)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(instantir.embedding(plain, t, conditions["pooled2"], time_ids), seen[0])


def test_the_aggregator_bends_the_reference_by_the_low_quality_half(files: dict[str, Any]) -> None:
    """Heads that do nothing give back the lower half, which at the first skip is the reference's own convolution."""
    weights = {key: 0 * v if ".mul." in key or ".add." in key else v for key, v in files["aggregator"].items()}
    weights["controlnet_down_blocks.0.1.weight"] = torch.eye(16)[:, :, None, None]
    weights["controlnet_down_blocks.0.1.bias"] = torch.zeros(16)
    reference = instantir.Reference(files | {"aggregator": weights}, instantir.TINY)
    low, high, pooled, t = noise(1), noise(2), torch.randn(1, 16), torch.tensor(500)
    down, mid = reference.aggregate(low, t, high, pooled)
    assert [r.shape[1:] for r in [*down, mid]] == [(16, 12, 16), (16, 12, 16), (16, 6, 8), (32, 6, 8), (32, 6, 8)]
    lower = F.conv2d(high, weights["ref_conv_in.weight"], weights["ref_conv_in.bias"], padding=1)
    torch.testing.assert_close(down[0], lower)
    # The halves share convolutions, norms and attention beyond the first skip.
    assert apart(mid, reference.aggregate(-low, t, high, pooled)[1]) > 1e-3


def test_the_resampler_is_diffusers_own(reference: Any, files: dict[str, Any]) -> None:
    """IP-Adapter Plus has the same projection under other names, its keys and values apart."""
    plain = IPAdapterPlusImageProjection(32, 32, hidden_dims=32, depth=2, dim_head=16, heads=2, num_queries=4)
    weights = {}
    for key, value in files["adapter"]["image_proj"].items():
        if "to_kv" in key:
            for name, half in zip("kv", value.chunk(2), strict=True):
                weights[key.replace(".0.to_kv", f".attn.to_{name}")] = half
            continue
        key = re.sub(r"\.0\.norm(\d)", lambda found: f".ln{int(found[1]) - 1}", key)
        key = key.replace(".0.to_q", ".attn.to_q").replace(".0.to_out", ".attn.to_out.0")
        key = re.sub(r"(layers\.\d)\.1\.", r"\1.ff.", key)
        weights[key.replace("ff.1.", "ff.1.net.0.proj.").replace("ff.3.", "ff.1.net.2.")] = value
    plain.load_state_dict(weights, strict=True)
    features = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(reference.tokens(features, preview=False), plain(features), rtol=1e-4, atol=1e-5)
    assert apart(reference.tokens(features, preview=False), reference.tokens(features, preview=True)) > 0.1


def test_the_norm_of_image_keys_shifts_by_the_first_half() -> None:
    """Shift, then scale, over a layer norm of its own epsilon."""
    norm = instantir.AdaLayerNorm(2, 3).requires_grad_(False)
    norm.linear.weight.zero_()
    norm.linear.bias.copy_(torch.tensor([10.0, 20.0, 1.0, 2.0]))
    x = torch.tensor([[[0.001, -0.001]]])
    size = 0.001 / (0.001**2 + 1e-6) ** 0.5
    torch.testing.assert_close(norm(x, torch.ones(1, 3)), torch.tensor([[[10 + 2 * size, 20 - 3 * size]]]))
    norm.linear.weight.fill_(1.0)
    temb = torch.tensor([[1.0, 2.0, 3.0]])
    moved = norm(0 * x, temb) - norm(0 * x, 0 * temb)
    torch.testing.assert_close(moved, F.silu(temb).sum().expand(1, 1, 2))


def test_positions_are_resized_as_either_transformers_did(files: dict[str, Any]) -> None:
    """`current` is what the installed model does by itself; `release` reads a ramp at the release's places."""
    reference = instantir.Reference(files, instantir.TINY, dino_positions="current")
    native = Dinov2Model(Dinov2Config(**instantir.TINY.dino)).eval().requires_grad_(False)
    renamed = {}
    for key, value in files["dino"].items():
        for word in ("query", "key", "value"):
            key = key.replace(f"attention.attention.{word}", f"attention.{word[0]}_proj")
        renamed[key.replace("attention.output.dense", "attention.o_proj")] = value
    native.load_state_dict(renamed, strict=True)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(reference.features(pixels), native(pixels).last_hidden_state)

    ramp = torch.arange(37.0).expand(37, 37).reshape(1, -1, 1)
    table = torch.cat([torch.full((1, 1, 1), 7.0), ramp], dim=1)
    places = torch.arange(16) + 0.5
    for positions, sides in (("current", 16), ("release", 16.1)):
        resized = instantir.dino_table(table, 16, positions)
        assert resized.shape == (1, 257, 1) and resized[0, 0] == 7
        # Torch's bicubic (a = -0.75) bends a ramp by 0.05; the two ways differ by more than 0.2 at the far end.
        torch.testing.assert_close(
            resized[0, 1:, 0].view(16, 16)[3, 1:15], (places * 37 / sides - 0.5)[1:15], rtol=0, atol=0.06
        )


def test_text_is_the_penultimate_layer_and_pools_at_the_largest_id(reference: Any) -> None:
    """What comes after the last id of the sequence's end changes its own rows of the context alone."""
    ids = torch.tensor([[62, 5, 9, 63, 0, 0]])
    other = torch.tensor([[62, 5, 9, 63, 1, 2]])
    (context, pooled), (changed, same) = reference.text(ids, ids), reference.text(other, other)
    assert context.shape == (1, 6, 32) and pooled.shape == (1, 16)
    torch.testing.assert_close(pooled, same)
    torch.testing.assert_close(context[:, :4], changed[:, :4])
    assert apart(context[:, 4:], changed[:, 4:]) > 0.1
    for tower, part in zip(reference.texts, context.chunk(2, dim=-1), strict=True):
        inner = getattr(tower, "text_model", tower)
        x = inner.embeddings(ids)
        mask = torch.full((1, 1, 6, 6), -torch.inf).triu(1)
        layer = inner.encoder.layers[0](x, attention_mask=mask)
        torch.testing.assert_close(layer[0] if isinstance(layer, tuple) else layer, part)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_thirty_steps(sampler: str) -> None:
    """The numbers of 4.5."""
    scheduler = instantir.make_scheduler(sampler, 30)
    assert scheduler.timesteps.tolist() == list(range(958, 0, -33))
    alpha = scheduler.alphas_cumprod.sqrt()
    assert alpha[958] == pytest.approx(0.086803, abs=1e-6) and alpha[1] == pytest.approx(0.999148, abs=1e-6)
    assert (1 - alpha[1] ** 2).sqrt() == pytest.approx(0.041279, abs=1e-5)
    if sampler == "ddim":
        assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-5)


def test_the_preview_is_a_consistency_step() -> None:
    """diffusers' own coefficients, and the values of 4.5 at t = 1."""
    scheduler = LCMScheduler.from_config(instantir.SCHEDULE)
    abar = scheduler.alphas_cumprod
    for t in (1, 34, 958):
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(t)))
        z, eps = noise(1), noise(2)
        x0 = (z - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        torch.testing.assert_close(instantir.consistency(eps, torch.tensor(t), z, abar), out * x0 + skip * z)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(1))
    assert skip == pytest.approx(0.0025, abs=5e-5) and out == pytest.approx(0.9988, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["lq", "noise"])
@pytest.mark.parametrize("adares", ["off", "paper", "code"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_every_way_through_is_finite(
    reference: Any, y: Tensor, conditions: dict[str, Tensor], sampler: str, adares: str, start: str
) -> None:
    """Samplers, AdaRes and starts; latents stay within what an image can come from."""
    records = walk(reference, y, conditions, sampler=sampler, adares=adares, start=start)
    assert len(records) == STEPS
    for record in records:
        for name in ("z", "x0", "preview"):
            assert record[name].shape == y.shape and record[name].isfinite().all() and record[name].std() < 30
        assert 0 <= record["delta"] <= 1 and 0 <= record["cond"] <= 1
    image = reference.decode(records[-1]["z"])
    assert image.shape == (1, 3, 24, 32) and 0 <= image.min() < image.max() <= 1


def test_ddim_follows_its_closed_form(reference: Any, y: Tensor, conditions: dict[str, Tensor]) -> None:
    """z' = alpha' x0 + beta' eps from the noised latent on, the last alpha being abar[0]."""
    records = walk(reference, y, conditions)
    scheduler = instantir.make_scheduler("ddim", STEPS)
    abar = scheduler.alphas_cumprod.double()[torch.cat([scheduler.timesteps, torch.zeros(1, dtype=torch.int64)])]
    z = abar[0].sqrt() * y + (1 - abar[0]).sqrt() * noise(0)
    for record, now, after in zip(records, abar[:-1], abar[1:], strict=True):
        x0 = record["x0"].double()
        eps = (z - now.sqrt() * x0) / (1 - now).sqrt()
        z = record["z"].double()
        torch.testing.assert_close(z, after.sqrt() * x0 + (1 - after).sqrt() * eps, rtol=1e-4, atol=1e-4)


def test_ddpm_asks_for_one_noise_a_step(reference: Any, y: Tensor, conditions: dict[str, Tensor]) -> None:
    """Stream 0 for the start, 1 + i for step i; DDIM asks for the first alone."""
    for sampler, streams in (("ddpm", list(range(STEPS + 1))), ("ddim", [0])):
        asked: list[int] = []
        reference.trajectory(
            y,
            lambda stream, asked=asked: asked.append(stream) or noise(stream),
            **conditions,
            steps=STEPS,
            guidance=7.0,
            sampler=sampler,
            adares="off",
        )
        assert asked == streams


def test_adares_of_the_paper(reference: Any, y: Tensor, conditions: dict[str, Tensor]) -> None:
    """First the reference is the low-quality latent; then delta is as in 4.7, and it moves the reference."""
    first, second, third = walk(reference, y, conditions, adares="paper")[:3]
    torch.testing.assert_close(first["reference"], y, rtol=0, atol=1e-5)
    assert (first["delta"], first["cond"], second["cond"]) == (1.0, 1.0, 1.0)
    ratio = (first["preview"] - first["x0"]).norm() ** 2 / first["preview"].norm() ** 2
    assert first["ratio"] == pytest.approx(ratio.item(), rel=1e-4)
    assert second["delta"] == pytest.approx(min(1.0, ratio.item()), rel=1e-4)
    ratio = (second["preview"] - second["x0"]).norm() ** 2 / (second["preview"] - first["preview"]).norm() ** 2
    assert third["delta"] == pytest.approx(min(1.0, ratio.item()), rel=1e-4)
    assert 0 < third["delta"] < 1
    torch.testing.assert_close(third["reference"], third["preview"] + third["delta"] * (y - third["preview"]))


def test_adares_of_the_release(reference: Any, y: Tensor, conditions: dict[str, Tensor]) -> None:
    """It scales the residuals, starts as without it, and leaves the preview as the reference."""
    plain, scaled = walk(reference, y, conditions), walk(reference, y, conditions, adares="code")
    torch.testing.assert_close(scaled[0]["z"], plain[0]["z"], rtol=0, atol=0)
    assert all(record["cond"] == record["delta"] for record in scaled)
    assert all(torch.equal(record["reference"], record["preview"]) for record in scaled if record["cond"] > 0.1)
    assert scaled[1]["delta"] == min(1.0, scaled[0]["ratio"])
    assert apart(plain[-1]["z"], scaled[-1]["z"]) > 1e-4
    bounded = walk(reference, y, conditions, adares="code", control_scale=0.5)
    assert bounded[0]["cond"] == 0.5 and all(record["cond"] <= 0.5 for record in bounded)


def test_a_weak_step_is_skipped_and_the_next_is_at_full_strength(
    reference: Any, y: Tensor, conditions: dict[str, Tensor]
) -> None:
    """Under DDPM the previews soon jump by more than they are wrong."""
    records = walk(reference, y, conditions, sampler="ddpm", adares="code")
    skipped = [i for i, record in enumerate(records[:-1]) if record["cond"] <= 0.1]
    assert skipped
    for i in skipped:
        assert records[i]["reference"] is None
        assert torch.equal(records[i]["preview"], records[i - 1]["preview"])
        assert records[i + 1]["delta"] == 1.0
    never = walk(reference, y, conditions, control_scale=0.1)
    assert all(record["reference"] is None and not record["preview"].any() for record in never)


@pytest.mark.slow
def test_every_part_matters(reference: Any, files: dict[str, Any], y: Tensor) -> None:
    """Another LoRA, Aggregator, adapter, table of positions, text, image or latent gives another end."""
    conditions = conditions_of(reference)
    wanted = walk(reference, y, conditions)[-1]["z"]
    assert torch.equal(wanted, walk(reference, y, conditions)[-1]["z"])
    others = instantir.make_files(instantir.TINY, 1)
    doubled = {key.rsplit(".lora", 1)[0] + ".alpha": torch.tensor(2.0) for key in files["previewer"]}
    for part, replacement in (
        ("previewer", others["previewer"]),
        ("previewer", files["previewer"] | doubled),
        ("aggregator", others["aggregator"]),
        ("unet", others["unet"]),
        ("adapter", files["adapter"] | {"image_proj": others["adapter"]["image_proj"]}),
        ("adapter", files["adapter"] | {"ip_adapter": others["adapter"]["ip_adapter"]}),
        ("dino", others["dino"]),
        ("text_encoder", others["text_encoder"]),
        ("text_encoder_2", others["text_encoder_2"]),
    ):
        changed = instantir.Reference(files | {part: replacement}, instantir.TINY)
        assert apart(wanted, walk(changed, y, conditions_of(changed))[-1]["z"]) > 1e-3, part
    for how in (
        {"tokens2": conditions["tokens2"].flip(0)},
        {"tokens2": conditions["preview_tokens2"]},
        {"preview_tokens2": conditions["tokens2"]},
        {"context2": conditions["context2"].flip(0)},
        {"pooled2": conditions["pooled2"].flip(0)},
        {"guidance": 1.0},
        {"control_scale": 0.5},
        {"start": "noise"},
    ):
        assert apart(wanted, walk(reference, y, conditions, **how)[-1]["z"]) > 1e-3, how
    assert apart(wanted, walk(reference, y.flip(-1), conditions, start="lq")[-1]["z"]) > 1e-2
    current = instantir.Reference(files, instantir.TINY, dino_positions="current")
    assert apart(conditions["tokens2"], conditions_of(current)["tokens2"]) > 1e-3


def test_the_first_of_the_batch_is_unconditional(reference: Any, y: Tensor, conditions: dict[str, Tensor]) -> None:
    """With no guidance the second half has no say in the latents; at a guidance of 1 the first has none."""
    second = {name: torch.cat([value[:1], value[:1]]) for name, value in conditions.items()}
    first = {name: torch.cat([value[1:], value[1:]]) for name, value in conditions.items()}
    for guidance, other in ((0.0, second), (1.0, first)):
        wanted = walk(reference, y, conditions, guidance=guidance)[-1]["z"]
        torch.testing.assert_close(walk(reference, y, other, guidance=guidance)[-1]["z"], wanted, rtol=1e-3, atol=1e-3)
