"""FLUX.1-Fill against diffusers, called as its own pipeline calls it."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines import FluxFillPipeline
from peft import LoraConfig
from torch import Tensor, nn

from support.random_networks import distance, made, random
from tilewright.export.networks import flux
from tilewright.export.networks.flux import Modulate, Step
from tilewright.export.networks.low_rank import Branches
from tilewright.export.systems.flux.sizes import PRESETS

SIZES = PRESETS["tiny"]
CONFIG = SIZES.transformer
CHANNELS, SPATIAL, WORDS, SEEN = SIZES.channels, SIZES.spatial, 7, 5
GUIDANCE = torch.tensor([30.0])
SIGMAS = torch.tensor([1.0, 0.9884, 0.5013, 0.0650, 0.0])
# batch and latent: wide, tall and square, and the smallest
LATENTS = pytest.mark.parametrize("size", [(1, 4, 12), (2, 10, 4), (2, 8, 8), (1, 2, 4)], ids=str)
pytestmark = pytest.mark.usefixtures("quick")


@dataclass
class Reference:
    """diffusers' transformer of 48 channels, and the weights that ours are to have, adapters included."""

    model: FluxTransformer2DModel
    state: dict[str, Tensor]
    branches: Branches = field(default_factory=dict)

    def load(self, network: nn.Module) -> nn.Module:
        """Ours with these weights; scale is the first half of the last modulation, shift the second."""
        last = {name: tensor.chunk(2) for name, tensor in self.state.items() if name.startswith("norm_out.linear.")}
        halves = {
            name.replace("linear.", f"linear.{half}."): parts[i]
            for name, parts in last.items()
            for i, half in enumerate(("scale", "shift"))
        }
        if "norm_out.linear.lora_A" in self.state:  # what goes in is not halved, only what comes out
            halves |= {f"norm_out.linear.{half}.lora_A": self.state["norm_out.linear.lora_A"] for half in LAST}
        state = {k: v for k, v in self.state.items() if k not in last} | halves
        network.transformer.load_state_dict({name: state[name] for name in network.transformer.state_dict()})
        return network.eval().requires_grad_(False)

    def step(self, kind: str, *, split: bool = True, exact: bool = True) -> Step:
        shape = {"diptych": kind == "diptych", "mask": float(kind == KINDS[1])}
        return self.load(Step(CONFIG, split=split, exact=exact, branches=self.branches, **shape))

    def modulate(self, *, exact: bool = True) -> Modulate:
        return self.load(Modulate(CONFIG, exact=exact, branches=self.branches))

    def velocity(self, z: Tensor, y: Tensor, mask: Tensor, text: Tensor, pooled: Tensor, sigma: Tensor, scale=None):
        """What FluxFillPipeline makes of packed tokens [noisy | condition | mask] and unpacks."""
        batch, channels, height, width = z.shape
        pack = FluxFillPipeline._pack_latents
        config = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0)
        pipeline = SimpleNamespace(vae_scale_factor=SPATIAL, vae=SimpleNamespace(config=config), _pack_latents=pack)
        sides_px = height * SPATIAL, width * SPATIAL
        packed_mask, condition = FluxFillPipeline.prepare_mask_latents(
            pipeline, mask, y, batch, channels, 1, *sides_px, z.dtype, "cpu", None
        )
        tokens = torch.cat((pack(z, batch, channels, height, width), condition, packed_mask), 2)
        assert tokens.shape[2] == CONFIG["in_channels"]
        answer = self.model(
            hidden_states=tokens,
            timestep=sigma.expand(batch),
            guidance=GUIDANCE.expand(batch),
            pooled_projections=pooled.expand(batch, -1),
            encoder_hidden_states=text.expand(batch, -1, -1),
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=FluxFillPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", z.dtype),
            joint_attention_kwargs=None if scale is None else {"scale": scale},
            return_dict=False,
        )[0]
        return FluxFillPipeline._unpack_latents(answer, *sides_px, SPATIAL)


LAST = ("scale", "shift")


def reference() -> Reference:
    model = made(FluxTransformer2DModel(**CONFIG))
    return Reference(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.fixture(scope="module")
def plain() -> Reference:
    """Without adapters."""
    return reference()


@pytest.fixture(scope="module")
def adapted() -> Reference:
    """Every linear has an adapter, of a rank and an alpha of its own."""
    made_of = reference()
    names = [name for name, module in made_of.model.named_modules() if isinstance(module, nn.Linear)]
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    alphas = {name: 1.0 + i % 5 for i, name in enumerate(names)}
    add_adapters(made_of, ranks, alphas)
    return made_of


def add_adapters(to: Reference, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    config = LoraConfig(
        target_modules="|".join(name.replace(".", r"\.") for name in ranks),
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items()},
    )
    to.model.add_adapter(config)
    for i, name in enumerate(ranks):
        module = to.model.get_submodule(name)
        assert module.r["default"] == ranks[name]
        assert module.scaling["default"] == alphas[name] / ranks[name]
        for which, pair in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            weight = pair["default"].weight
            weight.copy_(random(*weight.shape, seed=2 * i + (which == "lora_A")) * 0.7 * weight.shape[1] ** -0.5)
            to.state[f"{name}.{which}"] = weight.clone()
    to.branches = {name: (ranks[name], alphas[name] / ranks[name]) for name in ranks}
    to.model.eval().requires_grad_(False)


class Tensors(NamedTuple):
    """What a step reads, and the mask as the pipeline is given it, in pixels."""

    z: Tensor
    y: Tensor
    context: Tensor
    seen: Tensor
    pooled: Tensor
    bridge: Tensor
    mask: Tensor


KINDS = ("in-token, mask 0", "in-token, mask 1", "diptych")


def tensors(kind: str, size: tuple[int, int, int]) -> Tensors:
    batch, height, width = size
    mask = torch.full((batch, 1, height * SPATIAL, width * SPATIAL), float(kind == KINDS[1]))
    if kind == "diptych":
        mask[..., width * SPATIAL // 2 :] = 1
    latent = (batch, CHANNELS, height, width)
    text, pooled = CONFIG["joint_attention_dim"], CONFIG["pooled_projection_dim"]
    return Tensors(
        random(*latent, seed=1),
        random(*latent, seed=2),
        random(1, WORDS, text, seed=3),
        random(batch, SEEN, text, seed=4),
        random(1, pooled, seed=5),
        random(batch, pooled, seed=6),
        mask,
    )


def stepped(of: Reference, kind: str, t: Tensors, i: int, *, split: bool = True, lora_scale=None) -> Tensor:
    """Step i of ours, its modulation from Modulate or from itself."""
    diptych = kind == "diptych"
    step = of.step(kind, split=split)
    given = {"lora_scale": None if lora_scale is None else torch.tensor([lora_scale])}
    text = {"pooled": t.pooled, "guidance": GUIDANCE, "bridge": t.bridge if diptych else None}
    if split:
        given["modulation"] = of.modulate()(sigmas=SIGMAS[None], **text, **given)[:, i]
    else:
        given |= text
    return step(t.z, t.y, t.context, SIGMAS[[i]], SIGMAS[[i + 1]], None if diptych else t.seen, **given)


def expected_step(of: Reference, kind: str, t: Tensors, i: int, lora_scale=None) -> Tensor:
    diptych, batch = kind == "diptych", t.z.shape[0]
    context = t.context.expand(batch, -1, -1)
    text = context if diptych else torch.cat((context, t.seen), 1)
    pooled = t.pooled + t.bridge if diptych else t.pooled
    velocity = of.velocity(t.z, t.y, t.mask, text, pooled, SIGMAS[i], lora_scale)
    return t.z.double() + (SIGMAS[i + 1] - SIGMAS[i]).double() * velocity.double()


def assert_same_step(ours: Tensor, expected: Tensor, z: Tensor) -> None:
    """In what the step changed, not only in where it started."""
    assert distance(ours - z, expected - z) <= 1e-5  # float32 sums in another order; measured 2e-6


@LATENTS
@pytest.mark.parametrize("i", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_eulers_with_the_unrewritten_transformer(plain, kind, i, size):
    t = tensors(kind, size)
    assert_same_step(stepped(plain, kind, t, i), expected_step(plain, kind, t, i), t.z)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_librarys_scheduler(plain, kind):
    t = tensors(kind, (2, 6, 8))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=SIGMAS[:-1].tolist())
    assert torch.equal(scheduler.sigmas, SIGMAS)
    context = t.context.expand(2, -1, -1)
    text = context if kind == "diptych" else torch.cat((context, t.seen), 1)
    pooled = t.pooled + t.bridge if kind == "diptych" else t.pooled
    expected = ours = t.z
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = plain.velocity(expected, t.y, t.mask, text, pooled, timestep / 1000)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
        ours = stepped(plain, kind, t._replace(z=ours), i)
    assert distance(ours, expected) <= 1e-5


@pytest.mark.slow
@LATENTS
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_modulation_inside_a_step_is_the_same(plain, kind, size):
    t = tensors(kind, size)
    for i in (0, 2):
        assert distance(stepped(plain, kind, t, i, split=False), stepped(plain, kind, t, i)) <= 1e-6


def test_each_condition_counts(plain):
    """So that none of the comparisons above holds because nothing depends on what differs."""
    t = tensors("diptych", (2, 6, 8))
    for kind, changed in (
        ("diptych", {"y": -t.y}),
        ("diptych", {"context": -t.context}),
        ("diptych", {"pooled": -t.pooled}),
        ("diptych", {"bridge": -t.bridge}),
        ("in-token, mask 0", {"seen": -t.seen}),
    ):
        assert distance(stepped(plain, kind, t._replace(**changed), 0), stepped(plain, kind, t, 0)) > 1e-3
    zero, one, half = (
        plain.step(kind)(t.z, t.y, t.context, SIGMAS[:1], SIGMAS[1:2], None, random(1, *TABLE, seed=9))
        for kind in KINDS
    )
    assert min(distance(a, b) for a, b in ((zero, one), (zero, half), (one, half))) > 1e-4


TABLE = (SIZES.rows, SIZES.dim)


def test_the_full_transformer_has_344_vectors_a_step():
    assert PRESETS["full"].rows == 344
    assert SIZES.rows == 12 * 2 + 3 * 2 + 2


def test_the_table_is_each_norms_own_linear_in_the_order_of_use(plain):
    sigmas = SIGMAS[:4]
    rows = plain.modulate()(random(1, CONFIG["pooled_projection_dim"], seed=5), GUIDANCE, sigmas[None])[0]
    assert rows.shape == (4, *TABLE)
    model = plain.model
    pooled = random(1, CONFIG["pooled_projection_dim"], seed=5).expand(4, -1)
    active = F.silu(model.time_text_embed(sigmas * 1000, (GUIDANCE * 1000).expand(4), pooled))
    norms = [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in model.single_transformer_blocks]
    norms += [model.norm_out]
    at = 0
    for norm, count in zip(norms, [6] * 4 + [3] * 2 + [2], strict=True):
        for part in norm.linear(active).chunk(count, 1):
            assert distance(rows[:, at], part) <= 1e-6, (norm, at)
            at += 1
    assert at == rows.shape[1]


def test_texts_of_a_batch_have_tables_of_their_own(plain):
    pooled, bridge = random(1, 16, seed=5), random(3, 16, seed=6)
    together = plain.modulate()(pooled, GUIDANCE, SIGMAS[None], bridge)
    assert together.shape == (3, len(SIGMAS), *TABLE)
    for b in range(3):
        alone = plain.modulate()(pooled + bridge[[b]], GUIDANCE, SIGMAS[None])
        assert distance(together[[b]], alone) <= 1e-6
    assert distance(together[0], together[1]) > 1e-2


def arguments(network: nn.Module, transformer: nn.Module, run) -> list[Tensor]:
    """What the sinusoids are evaluated at, in the order of evaluation: timestep, guidance."""
    seen: list[Tensor] = []
    proj = transformer.time_text_embed.time_proj
    hook = proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().clone()))
    run(network)
    hook.remove()
    return seen


@pytest.fixture(scope="module")
def in_bfloat16() -> FluxTransformer2DModel:
    return made(FluxTransformer2DModel(**CONFIG)).to(torch.bfloat16)


def by_the_bfloat16_pipeline(model: FluxTransformer2DModel, sigmas: Tensor, guidance: Tensor) -> list[Tensor]:
    """As FluxFillPipeline calls it: the timestep to the latents' type, by 1000; guidance stays in float32."""
    count, brain = len(sigmas), torch.bfloat16
    timestep = (sigmas * 1000).to(brain)

    def run(transformer: FluxTransformer2DModel) -> None:
        transformer(
            hidden_states=torch.zeros(count, 1, CONFIG["in_channels"], dtype=brain),
            timestep=timestep / 1000,
            guidance=guidance.expand(count),
            pooled_projections=torch.zeros(count, 16, dtype=brain),
            encoder_hidden_states=torch.zeros(count, 1, 32, dtype=brain),
            txt_ids=torch.zeros(1, 3, dtype=brain),
            img_ids=torch.zeros(1, 3, dtype=brain),
        )

    return arguments(model, model, run)


@pytest.mark.parametrize("guidance", [30.0, 3.5, 1.0, 7.77, 0.0, 100.0])
def test_inexact_scalars_are_rounded_as_in_a_bfloat16_pipeline(plain, in_bfloat16, guidance):
    sigmas, strength = torch.linspace(0, 1, 1501), torch.tensor([guidance])
    modulate = plain.modulate(exact=False)
    ours = arguments(modulate, modulate.transformer, lambda m: m(torch.zeros(1, 16), strength, sigmas[None]))
    theirs = by_the_bfloat16_pipeline(in_bfloat16, sigmas, strength)
    assert torch.equal(ours[0][0], theirs[0])
    assert torch.equal(ours[1], theirs[1][:1])
    assert float((ours[0][0] - sigmas * 1000).abs().max()) > 1  # it is a rounding that is tested


@pytest.mark.parametrize(("timestep", "rounded"), [(988.4, 988), (925, 924), (501.3, 504), (1000, 1000), (0, 0)])
def test_known_timesteps_and_the_usual_guidance_are_rounded_to_known_values(plain, timestep, rounded):
    modulate = plain.modulate(exact=False)
    sigmas = torch.tensor([[timestep / 1000]])
    ours = arguments(modulate, modulate.transformer, lambda m: m(torch.zeros(1, 16), GUIDANCE, sigmas))
    assert [float(x) for x in ours] == [rounded, 29952]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_a_step_with_its_modulation_inside_rounds_as_the_table_does(plain, exact, split):
    network = plain.modulate(exact=exact) if split else plain.step(KINDS[0], split=False, exact=exact)
    t, sigma = tensors(KINDS[0], (1, 2, 4)), torch.tensor([0.5013])

    def run(network: nn.Module) -> None:
        if split:
            network(t.pooled, GUIDANCE, sigma[None])
        else:
            network(t.z, t.y, t.context, sigma, SIGMAS[3:4], t.seen, pooled=t.pooled, guidance=GUIDANCE)

    at_time, at_guidance = arguments(network, network.transformer, run)
    assert torch.equal(at_time, sigma[None] * 1000 if exact else torch.tensor([[504.0]]))
    assert torch.equal(at_guidance, torch.tensor([30000.0 if exact else 29952.0]))


@pytest.mark.parametrize("lora_scale", [0.0, 0.7, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_are_pefts_adapters_on_every_linear(adapted, kind, lora_scale):
    assert len(adapted.branches) == 10 + 2 * 14 + 2 * 6  # around the blocks, in a double one, in a single one
    t = tensors(kind, (2, 4, 12))
    ours, expected = stepped(adapted, kind, t, 1, lora_scale=lora_scale), expected_step(adapted, kind, t, 1, lora_scale)
    assert_same_step(ours, expected, t.z)


@pytest.mark.parametrize("kind", KINDS)
def test_branches_inside_an_unsplit_step_are_pefts_adapters_too(adapted, kind):
    t = tensors(kind, (2, 6, 4))
    ours = stepped(adapted, kind, t, 1, split=False, lora_scale=0.7)
    assert_same_step(ours, expected_step(adapted, kind, t, 1, 0.7), t.z)


def test_the_strength_of_branches_counts_and_none_is_the_base(adapted, plain):
    t = tensors("diptych", (1, 4, 8))
    none, some, all_ = (stepped(adapted, "diptych", t, 1, lora_scale=scale) for scale in (0.0, 0.7, 1.0))
    assert distance(none, stepped(plain, "diptych", t, 1)) <= 1e-7
    assert min(distance(a, b) for a, b in ((none, some), (some, all_))) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_on_the_image_embedder_alone_sees_the_mask_too(kind):
    only = reference()
    add_adapters(only, {"x_embedder": 3}, {"x_embedder": 5.0})
    assert list(only.branches) == ["x_embedder"]
    t = tensors(kind, (2, 4, 8))
    for scale in (0.7, 1.0):
        ours = stepped(only, kind, t, 1, lora_scale=scale)
        assert_same_step(ours, expected_step(only, kind, t, 1, scale), t.z)


def test_positions_turn_as_in_diffusers_and_text_does_not_turn(monkeypatch):
    """With the published axes, to rows and columns of a picture of 2560 px."""
    config = CONFIG | {"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}
    step, turn = made(Step(config)), []
    project = flux.qkv_norm_rope
    monkeypatch.setattr(flux, "qkv_norm_rope", lambda *given, **k: turn.append(given[10:]) or project(*given, **k))
    table = random(1, replace(PRESETS["full"], transformer=config).rows, 128)
    worst = 0.0
    for height, width in ((160, 1), (1, 160), (13, 9)):
        turn.clear()
        latent = random(1, CHANNELS, 2 * height, 2 * width)
        step(latent, latent, random(1, WORDS, 32), SIGMAS[:1], SIGMAS[1:2], None, table)
        ids = FluxFillPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
        expected = FluxPosEmbed(10_000, (16, 56, 56))(torch.cat((torch.zeros(WORDS, 3), ids)))
        assert sorted(map(len, turn)) == [0, 0, 2, 2, 2, 2]  # no tables for the text of two double blocks
        for tables in filter(None, turn):
            for ours, theirs in zip(tables, expected, strict=True):
                assert ours.shape == (height * width, 64)  # the last tokens: those before them do not turn
                assert torch.equal(theirs[:, ::2], theirs[:, 1::2])  # channels turn in neighbouring pairs
                worst = max(worst, float((ours - theirs[WORDS:, ::2]).abs().max()))
    assert worst <= 2e-5  # float32 rounds the frequency and its product with 159: 1.7e-5 at most


def test_the_order_of_text_tokens_does_not_matter(plain):
    t = tensors(KINDS[0], (2, 6, 8))
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(3))
    reordered = t._replace(context=t.context[:, order], seen=t.seen.flip(1))
    one, other = (stepped(plain, KINDS[0], each, 1) for each in (t, reordered))
    assert distance(one - t.z, other - t.z) <= 1e-5
    moved = stepped(plain, KINDS[0], t._replace(z=t.z.flip(3), y=t.y.flip(3)), 1).flip(3)
    assert distance(moved - t.z, one - t.z) > 1e-2  # that of image tokens does
