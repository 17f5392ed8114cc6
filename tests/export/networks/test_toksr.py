"""TokSR against PyTorch's own blocks in float64, tile by tile, and diffusers' scheduler; the graphs the same."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from support.lazily import Lazily
from support.quick import few_quick
from support.toksr import Denoiser, picture_of, tokens_of
from tilewright.export.networks.toksr import Detokenise, Step, Text, Tokenise
from tilewright.export.system import ComponentSpec
from tilewright.runtime.bundle.program import ANY, TensorSpec
from tilewright.runtime.engines.ort import OrtEngine
from tilewright.runtime.plan.schedules import ddim

BASE = {"width": 768, "layers": 12, "heads": 12}
LARGE = {"width": 1024, "layers": 24, "heads": 16}
SMALL = {"width": 32, "layers": 2, "heads": 2}
FULL = {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768, "scale": 0.7525}
# the tokens are not square, so that a transposition is seen
TINY = {"image": 32, "patch": 8, "latents": 4, "token": 6, "words": 8, "text_width": 16, "scale": 0.7525}
TA_TITOK = TINY | {"encoder": SMALL | {"text": False}, "decoder": SMALL}
TEXTOK = TINY | {"encoder": SMALL | {"text": True}, "decoder": SMALL}
CLIP = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 8}
CLIP |= {"num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 62}
DEFAULT = {"text_mode": "pooled", "prediction": "eps", "output_projection": True, "guided": False}
OTHER = {"text_mode": "all77", "prediction": "x0", "output_projection": False, "guided": True}
# the default and all but one of the other choices: any two choices in every combination
STEPS: dict[str, dict[str, Any]] = {"default": SMALL | DEFAULT}
STEPS |= {f"other but {kept}": SMALL | OTHER | {kept: DEFAULT[kept]} for kept in DEFAULT}
SHAPES: dict[str, tuple[int | str, ...]] = dict.fromkeys(("tokens", "condition", "tokens_next"), ("batch", 6, 1, 4))
SHAPES |= {"ids": ("batch", 8), "words": (ANY, 8, 16), "pooled": (ANY, 16), "image": ("batch", 3, 32, 32)}
# of no schedule, but so that the denoiser's answer counts
SCALARS = {"guidance": 3.5, "t": 999.0, "alpha": 0.6, "beta": 0.8, "alpha_next": 0.96, "beta_next": 0.28}


def specs(names: str) -> dict[str, TensorSpec]:
    return {n: TensorSpec("int64" if n == "ids" else "float32", SHAPES.get(n, (ANY,))) for n in names.split()}


SOURCES = {
    "text": ComponentSpec(Text, specs("ids"), specs("words pooled"), arguments={"config": CLIP}),
    "ta-titok": ComponentSpec(Tokenise, specs("image"), specs("condition"), arguments={"sizes": TA_TITOK}),
    "textok": ComponentSpec(Tokenise, specs("image words"), specs("condition"), arguments={"sizes": TEXTOK}),
    "detokenise": ComponentSpec(Detokenise, specs("tokens words"), specs("image"), arguments={"sizes": TEXTOK}),
}
for name, dit in STEPS.items():
    label = ("pooled" if dit["text_mode"] == "pooled" else "words") + (" guidance" if dit["guided"] else "")
    step_inputs = specs(f"tokens condition {label} t alpha beta alpha_next beta_next")
    SOURCES[name] = ComponentSpec(Step, step_inputs, specs("tokens_next"), arguments={"sizes": TEXTOK, "dit": dit})
BATCHES = pytest.mark.parametrize("batch", [1, 3])


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """No gradients, and one thread: for tensors as small as these, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def networks(tmp_path_factory, opened) -> dict[str, Any]:
    """Every network, traced when it is first used."""
    return Lazily(lambda name: opened(SOURCES[name], tmp_path_factory.mktemp("toksr")))


def inputs_of(name: str, batch: int) -> dict[str, Tensor]:
    """Random inputs of a network, and the scalars above; what tiles may share has one row."""
    inputs = {}
    for seed, (i, spec) in enumerate(SOURCES[name].inputs.items()):
        shape = [batch if d == "batch" else 1 if d == ANY else int(d) for d in spec.shape]
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        inputs[i] = torch.tensor([SCALARS[i]]) if i in SCALARS else value.sigmoid() if i == "image" else value
    return inputs


def ways(network: Any) -> list[Callable[[dict[str, Tensor]], tuple[Tensor, ...]]]:
    """The network as eager PyTorch runs it, and its graphs as the engines do."""
    names = [value.name for value in network.model.graph.outputs]

    def eagerly(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        results = network.eager(**inputs)
        return results if isinstance(results, tuple) else (results,)

    def by(engine: OrtEngine, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        results = engine.run({name: tensor.numpy() for name, tensor in inputs.items()}, names)
        return tuple(torch.from_numpy(results[name]) for name in names)

    return [eagerly, *(partial(by, engine) for engine in network.engines)]


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative L2; float32 sums in another order, measured 5e-6."""
    assert ours.shape == expected.shape
    assert expected.std() > 0.1
    assert (ours - expected).norm() <= tolerance * expected.norm()


def answers(network: nn.Module, inputs: dict[str, Tensor], z: Tensor, t: float) -> Tensor:
    """The denoiser's answer for every tile, guided if there is guidance."""
    denoiser = Denoiser(network, SMALL["heads"])
    label = (inputs["pooled"] if "pooled" in inputs else inputs["words"][0]).double()

    def answer(labels: Tensor) -> Tensor:
        pairs = zip(z.double(), inputs["condition"].double(), strict=True)
        return torch.stack([denoiser(noisy, condition, t, labels) for noisy, condition in pairs])

    if "guidance" not in inputs:
        return answer(label)
    without = answer(0 * label)
    return without + SCALARS["guidance"] * (answer(label) - without)


@pytest.mark.slow
@pytest.mark.parametrize("name", few_quick(SOURCES, "default", "detokenise"))
def test_the_graph_needs_each_parameter_and_has_plain_operators(networks, name):
    model, _, eager = networks[name]
    outside = {n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert outside == {n for n, _ in eager.named_parameters()}
    nodes = list(model.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    assert [node.op_type for node in nodes].count("Attention") == (4 if name in STEPS else 2)


@pytest.mark.slow
def test_the_texts_words_and_its_end_are_those_of_the_bare_class(networks):
    bare = CLIPTextModel(CLIPTextConfig(**CLIP, attn_implementation="eager")).eval()
    bare.load_state_dict({n.removeprefix("model."): w for n, w in networks["text"].eager.state_dict().items()})
    ids = torch.tensor([[62, 5, 9, 63, 0, 0, 0, 0]])  # padded with zeros behind its end
    expected = bare(ids).last_hidden_state.double()
    for way in ways(networks["text"]):
        words, pooled = way({"ids": ids})
        close(words, expected)
        close(pooled, expected[:, 3])


@pytest.mark.slow
@BATCHES
@pytest.mark.parametrize(
    ("name", "expected_of"), [("ta-titok", tokens_of), ("textok", tokens_of), ("detokenise", picture_of)]
)
def test_a_half_of_the_tokenizer_does_what_pytorchs_blocks_do(networks, name, expected_of, batch):
    inputs = inputs_of(name, batch)
    expected = expected_of(networks[name].eager, SOURCES[name].arguments["sizes"], **inputs)
    for way in ways(networks[name]):
        close(*way(inputs), expected)


def test_a_patchs_pixels_come_row_by_row_and_the_three_of_a_pixel_together():
    network = Detokenise(TEXTOK)
    for parameter in network.parameters():
        parameter.zero_()
    network.decoder.ffn[0].bias.copy_(torch.arange(192) / 192)
    network.decoder.conv_out.weight[:, :, 1, 1] = torch.eye(3)
    picture = network(**inputs_of("detokenise", 1))[0] * 192
    expected = torch.arange(192.0).reshape(8, 8, 3).permute(2, 0, 1).repeat(1, 4, 4)
    torch.testing.assert_close(picture, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.0, 480.0, 999.0])
@pytest.mark.parametrize("name", few_quick(STEPS, "default"))
def test_a_step_is_the_formula_of_the_denoisers_answer(networks, name, t):
    inputs = inputs_of(name, 2) | {"t": torch.tensor([t])}
    z, answer = inputs["tokens"].double(), answers(networks[name].eager, inputs, inputs["tokens"], t)
    x0 = answer if STEPS[name]["prediction"] == "x0" else (z - 0.8 * answer) / 0.6
    for way in ways(networks[name]):
        close(*way(inputs), 0.96 * x0 + 0.28 * (z - 0.6 * x0) / 0.8)


@BATCHES
@pytest.mark.parametrize("name", few_quick(STEPS, "default"))
def test_twenty_five_steps_end_where_diffusers_scheduler_does(networks, name, batch):
    prediction = {"eps": "epsilon", "x0": "sample"}[STEPS[name]["prediction"]]
    scheduler: Any = DDIMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(25)
    # its own product is of float32, which the last step's small beta would show
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    tables = ddim(25, 0, betas="linear", beta_start=1e-4, beta_end=2e-2, spacing_offset=0, final_alpha="one")
    inputs = inputs_of(name, batch)
    z = inputs["tokens"].double()
    for t in scheduler.timesteps.tolist():
        z = scheduler.step(answers(networks[name].eager, inputs, z, t), t, z).prev_sample
    for way in ways(networks[name]):
        tokens = inputs["tokens"]
        for row in zip(*tables.values(), strict=True):
            (tokens,) = way(
                inputs | {"tokens": tokens} | {table: torch.tensor([x]) for table, x in zip(tables, row, strict=True)}
            )
        close(tokens, z)


@pytest.mark.parametrize("name", few_quick([name for name in SOURCES if name != "text"], "default"))
def test_three_tiles_are_three_times_one(networks, name):
    inputs = inputs_of(name, 3)
    tiled = {i: inputs[i] for i, spec in SOURCES[name].inputs.items() if "batch" in spec.shape}
    for way in ways(networks[name]):
        alone = [way(inputs | {i: tiles[k : k + 1] for i, tiles in tiled.items()})[0] for k in range(3)]
        close(*way(inputs), torch.cat(alone), 2e-6)


@pytest.mark.parametrize("name", few_quick([n for n in SOURCES if n not in ("text", "ta-titok")], "default"))
def test_rows_of_their_own_are_as_one_by_one(networks, name):
    """Tiles of other steps and other images in one call: all rows differ, or only every second input's."""
    shared = [i for i, spec in SOURCES[name].inputs.items() if spec.shape[0] == ANY]
    for several in (shared, shared[::2], shared[1::2]):
        inputs = inputs_of(name, 3)
        for i in several:
            inputs[i] = torch.cat([inputs[i] * (1 - k / 8) for k in range(3)])
        for way in ways(networks[name]):
            alone = [way({i: x[k : k + 1] if len(x) == 3 else x for i, x in inputs.items()})[0] for k in range(3)]
            close(*way(inputs), torch.cat(alone), 2e-6)


@pytest.mark.slow
def test_sizes_are_the_published_ones():
    ta_titok = FULL | {"encoder": BASE | {"text": False}, "decoder": LARGE}
    textok = FULL | {"encoder": BASE | {"text": True}, "decoder": BASE}
    with torch.device("meta"):
        halves = Tokenise(ta_titok), Detokenise(ta_titok)
        networks = [*halves, Tokenise(textok), Detokenise(textok), Step(textok, BASE | DEFAULT)]
    shapes = {name: tuple(p.shape) for half in halves for name, p in half.named_parameters()}
    assert shapes["latent_tokens"] == (32, 768)
    assert shapes["encoder.conv_out.weight"] == (32, 768, 1, 1)
    assert shapes["decoder.ffn.0.weight"] == (768, 1024, 1, 1)
    assert shapes["decoder.text_guidance_positional_embedding"] == (77, 1024)
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert [round(m, 1) for m in millions] == [85.9, 304.3, 86.6, 86.5, 114.8]
    assert all(name.startswith("dit.") for name in networks[-1].state_dict())
