"""In-Token Learning end to end, against a pipeline of diffusers' and transformers' own parts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from support.fill import Canvas, InToken, distance, psnr
from support.systems import components_of, settings_of
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.systems.flux.in_token import SYSTEM
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.bundle.program import Program, Signature
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal

SIZES = PRESETS["tiny"]
MULTIPLE, SPATIAL, CHANNELS = SIZES.multiple, SIZES.spatial, SIZES.channels
PROGRAMS = Path(__file__).parents[2] / "programs"


@pytest.mark.parametrize(
    ("name", "options"), [("in-token", {}), ("in-token-fixed", {"fixed_tile": [1024, 512]})], ids=["free", "fixed"]
)
def test_the_full_program_is_the_one_that_the_runtime_is_tested_with(name: str, options: dict[str, Any]) -> None:
    settings = settings_of("in-token", "full", **options)
    assert SYSTEM.program(settings) == from_json(Program, (PROGRAMS / f"{name}.json").read_text(), name)
    signatures = json.loads((PROGRAMS / f"{name}.signatures.json").read_text())["components"]
    made = components_of("in-token", "full", **options)
    assert signatures.keys() == made.keys()
    for component, signature in signatures.items():
        expected = from_json(Signature, json.dumps(signature), component)
        assert Signature(made[component].inputs, made[component].outputs) == expected


class Recording:
    """An engine that keeps the latents it gives."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.made = engine, []

    def run(self, inputs: Any, wanted: Any) -> Any:
        outputs = self.engine.run(inputs, wanted)
        self.made.append(outputs["z_next"])
        return outputs


@pytest.fixture(scope="module")
def eager(in_token_tiny: Path, upstream: Callable[[Path], tuple[Any, Any]]) -> InToken:
    """The system from upstream parts."""
    siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES.siglip, vision_use_head=False)).eval()
    held = load_file(in_token_tiny / "weights" / "image_encoder" / "image_encoder.safetensors")
    siglip.load_state_dict({k.removeprefix("vision_model."): t for k, t in held.items()}, strict=True)
    redux = ReduxImageEncoder(SIZES.siglip["hidden_size"], SIZES.context).eval()
    held = load_file(in_token_tiny / "weights" / "image_embedder" / "image_embedder.safetensors")
    redux.load_state_dict(held, strict=True)
    constants = load_numpy(in_token_tiny / "constants.safetensors")
    context, pooled = (torch.from_numpy(constants[name]) for name in ("context", "pooled"))
    transformer, vae = upstream(in_token_tiny)
    processor = SIZES.siglip_processor
    return InToken(transformer, vae, SIZES.schedule, siglip, redux, processor, context, pooled)


def canvas(width: int, height: int) -> np.ndarray:
    """A picture of that size, planes in [0, 1]."""
    return sample_photo(width, height, 1).transpose(2, 0, 1).astype(np.float32) / 255


@pytest.mark.parametrize(("width", "height"), [(48, 32), (36, 60)])
def test_the_whole_trajectory_and_the_picture_are_those_of_upstream_parts(
    in_token_tiny: Path, eager: InToken, width: int, height: int
) -> None:
    image, steps = canvas(width, height), 28
    rows, columns = height // SPATIAL, width // SPATIAL
    noise = normal(7, region=0, stream=0, channels=CHANNELS, top=0, left=0, height=rows, width=columns)
    path, picture = eager.walk(image, noise, steps)
    with load(in_token_tiny) as restorer:
        step = Recording(restorer.engines["step"])
        engines = {name: restorer.engines[name] for name in restorer.engines} | {"step": step}
        ours = run(restorer.bundle.program, engines, restorer.constants, Job(Canvas(image), seed=7))
    assert len(step.made) == steps
    for latent, expected in zip(step.made, path, strict=True):
        assert distance(latent, expected) <= 1e-4
    assert psnr(ours, picture) >= 60
    assert ours.std() > 0.05


@torch.no_grad()
def test_tiles_are_joined_on_one_latent_every_step(in_token_tiny: Path, eager: InToken) -> None:
    """The same written out: velocities of crops, their new latents blended, the schedule of a tile's own tokens."""
    tile, overlap, steps = 32, 8, 5
    image = canvas(tile * 2 - overlap, tile)
    cells, shared = tile // SPATIAL, overlap // SPATIAL
    lefts = [0, cells - shared]
    width = lefts[1] + cells
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(shared) + 0.5) / shared)
    weights = np.ones((2, cells))
    weights[0, -shared:], weights[1, :shared] = ramp[::-1], ramp
    total = np.zeros(width)
    for left, weight in zip(lefts, weights, strict=True):
        total[left : left + cells] += weight

    def joined(parts: list[torch.Tensor], scale: int = 1) -> torch.Tensor:
        whole = torch.zeros(*parts[0].shape[:3], width * scale, dtype=torch.float64)
        spread = ramp if scale == 1 else 0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)
        for i, part in enumerate(parts):
            weight = np.ones(cells * scale)
            weight[-len(spread) :] = spread[::-1] if i == 0 else 1.0
            weight[: len(spread)] = spread if i == 1 else 1.0
            whole[..., lefts[i] * scale : (lefts[i] + cells) * scale] += part * torch.from_numpy(weight)
        return whole.float()

    assert np.allclose(total, 1)
    z = normal(3, region=0, stream=0, channels=CHANNELS, top=0, left=0, height=cells, width=width)
    z = torch.from_numpy(z)[None]
    crops = [image[:, :, left * SPATIAL : (left + cells) * SPATIAL] for left in lefts]
    y = joined([eager.given(np.ascontiguousarray(crop)) for crop in crops])
    seen = [eager.see(np.ascontiguousarray(crop)) for crop in crops]
    schedule = eager.sigmas(cells * cells // 4, steps)
    for i in range(steps):
        at = [slice(left, left + cells) for left in lefts]
        z = joined(
            [eager.step(z[..., s], y[..., s], e, schedule[i], schedule[i + 1]) for s, e in zip(at, seen, strict=True)]
        )
    theirs = joined([torch.from_numpy(eager.decode(z[..., left : left + cells]))[None] for left in lefts], SPATIAL)
    with load(in_token_tiny) as restorer:
        job = Job(Canvas(image), seed=3, tile_px=tile, overlap_px=overlap, steps=steps)
        ours = run(restorer.bundle.program, restorer.engines, restorer.constants, job)
    assert psnr(ours, theirs[0].numpy()) >= 60


def test_a_network_that_looks_at_one_cell_gives_the_same_tiled_and_whole() -> None:
    """The system's program on pointwise engines; the schedule's bound makes it the same for all sizes."""
    program = SYSTEM.program(settings_of("in-token", max_mu=0.3))

    class Encode:
        def run(self, inputs: Any, wanted: Any) -> Any:
            x = inputs["image"]
            blocks = x.reshape(*x.shape[:2], x.shape[2] // SPATIAL, SPATIAL, x.shape[3] // SPATIAL, SPATIAL)
            mean = blocks.mean((3, 5))
            return {"latent": np.concatenate((mean, mean[:, :1] ** 2), 1).astype(np.float32)}

    class Decode:
        def run(self, inputs: Any, wanted: Any) -> Any:
            z = np.repeat(np.repeat(inputs["latent"], SPATIAL, 2), SPATIAL, 3)
            return {"image": np.tanh(z[:, :3] + z[:, 3:])}

    class Step:
        def run(self, inputs: Any, wanted: Any) -> Any:
            move = inputs["sigma_next"] - inputs["sigma"]
            velocity = np.sin(3 * inputs["z"]) - inputs["y"] + inputs["modulation"].mean()
            return {"z_next": (inputs["z"] + move * velocity).astype(np.float32)}

    class Modulate:
        def run(self, inputs: Any, wanted: Any) -> Any:
            rows = np.ones((SIZES.rows, SIZES.dim), np.float32)
            return {"modulation": rows * inputs["sigmas"][:, :, None, None]}

    class Blind:
        def __init__(self, name: str, width: int) -> None:
            self.name, self.width = name, width

        def run(self, inputs: Any, wanted: Any) -> Any:
            return {self.name: np.zeros((1, 4, self.width), np.float32)}

    engines: Any = {
        "encode": Encode(),
        "decode": Decode(),
        "step": Step(),
        "modulate": Modulate(),
        "see": Blind("features", 32),
        "redux": Blind("tokens", 32),
    }
    constants = {"context": np.zeros((1, SIZES.words, 32), np.float32), "pooled": np.zeros((1, 16), np.float32)}
    image = Canvas(canvas(200, 120))
    whole = run(program, engines, constants, Job(image, seed=1))
    tiled = run(program, engines, constants, Job(image, seed=1, tile_px=64, overlap_px=16))
    assert np.abs(whole - tiled).max() <= 1e-5 and whole.std() > 0.1


def test_graphs_hold_no_sequences_which_tensorrt_has_none_of(in_token_tiny: Path) -> None:
    ops = {
        node.op_type
        for path in in_token_tiny.rglob("*.onnx")
        for node in onnx.load(path, load_external_data=False).graph.node
    }
    assert "Attention" in ops and not [name for name in ops if "Sequence" in name]


# Options of a build


def restored(bundle: Path, **options: Any) -> np.ndarray:
    with load(bundle) as restorer:
        return restorer(sample_photo(64, 48, 1), seed=2, **options)


@pytest.fixture(scope="module")
def usual(in_token_tiny: Path) -> np.ndarray:
    return restored(in_token_tiny, scale=1, steps=6)


def built(tmp_path: Path, **options: Any) -> Path:
    build(Request("in-token", "tiny", tmp_path / "b", seed=0, verify="never", system_options=options))
    return tmp_path / "b"


def test_the_whole_modulation_in_the_step_gives_the_same_picture(tmp_path: Path, usual: np.ndarray) -> None:
    bundle = built(tmp_path, no_split_modulation=True)
    assert "modulate" not in read_bundle(bundle).manifest.components
    assert np.abs(restored(bundle, scale=1, steps=6).astype(int) - usual).max() <= 1


@pytest.mark.slow
def test_fixed_tiles_need_no_modulation_weights_and_give_the_same_picture(tmp_path: Path) -> None:
    fixed = built(tmp_path / "fixed", fixed_tile=[64, 128], steps=6)
    free = built(tmp_path / "free", steps=6)
    manifest, weights = read_bundle(fixed).manifest, read_bundle(fixed).weights
    assert "modulate" not in manifest.components
    assert not [name for name in weights.tensors["step"] if "norm1.linear" in name or "time_text_embed" in name]
    accounts = json.loads((fixed / "reports" / "weights.json").read_text())["transformer"]
    assert accounts["tensors"] == accounts["referenced"] + accounts["precomputed"] and accounts["precomputed"] > 0
    picture = sample_photo(160, 96, 1)
    with load(fixed) as ours, load(free) as theirs:
        for tile in (64, 128):
            one = ours(picture, seed=2, scale=1, tile=tile, overlap=16)
            other = theirs(picture, seed=2, scale=1, tile=tile, overlap=16)
            assert one.shape == other.shape == (96, 160, 3)
            if tile == 64:  # the larger tile is padded to, by those who have no smaller
                assert np.abs(one.astype(int) - other).max() <= 1
        with pytest.raises(UsageError, match=r"tile=32 is not one of the sizes"):
            ours(picture, tile=32)
        with pytest.raises(UsageError, match="6 rows for 7 steps"):
            ours(picture, steps=7)
        assert ours(sample_photo(20, 12, 1), scale=1, tile=64).shape == (12, 20, 3)  # padded up to a tile


def test_a_lora_on_the_modulation_is_in_the_table_of_fixed_tiles(tmp_path: Path, in_token_tiny: Path) -> None:
    random = np.random.Generator(np.random.Philox(key=8))
    pairs = {}
    for module, rows in (("transformer_blocks.0.norm1.linear", 192), ("single_transformer_blocks.1.proj_mlp", 128)):
        pairs[f"transformer.{module}.lora_A.weight"] = random.normal(0, 0.5, (3, 32)).astype(np.float32)
        pairs[f"transformer.{module}.lora_B.weight"] = random.normal(0, 0.5, (rows, 3)).astype(np.float32)
    save_file(pairs, tmp_path / "lora.safetensors")
    given = {"lora": f"{tmp_path / 'lora.safetensors'}:0.5", "steps": 6}
    free, fixed = built(tmp_path / "free", **given), built(tmp_path / "fixed", **given, fixed_tile=[64])
    assert "lora_scale" in read_bundle(free).program.inputs and "lora_scale" not in read_bundle(fixed).program.inputs
    options = {"scale": 2, "tile": 64, "overlap": 16}
    ours, theirs = (restored(bundle, **options) for bundle in (fixed, free))
    without = restored(in_token_tiny, **options, steps=6)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - without).mean() > 1


def test_embeddings_given_as_a_file_are_the_prompt(tmp_path: Path, in_token_tiny: Path, usual: np.ndarray) -> None:
    held = load_numpy(in_token_tiny / "constants.safetensors")
    named = {"prompt_embeds": held["context"], "pooled_prompt_embeds": held["pooled"]}
    save_file(named, tmp_path / "prompt.safetensors")
    bundle = built(tmp_path, prompt_embeds=str(tmp_path / "prompt.safetensors"))
    assert np.array_equal(restored(bundle, scale=1, steps=6), usual)
    save_file({name: array * 3 for name, array in named.items()}, tmp_path / "other.safetensors")
    other = built(tmp_path / "other", prompt_embeds=str(tmp_path / "other.safetensors"))
    assert not np.array_equal(restored(other, scale=1, steps=6), usual)


def test_other_words_give_other_constants(tmp_path: Path, in_token_tiny: Path) -> None:
    ours, theirs = built(tmp_path, prompt="an old map"), in_token_tiny
    one, other = (load_numpy(bundle / "constants.safetensors") for bundle in (ours, theirs))
    assert not np.array_equal(one["context"], other["context"])
    assert not np.array_equal(one["pooled"], other["pooled"])


def test_guidance_and_inexact_scalars_reach_the_picture(tmp_path: Path, in_token_tiny: Path, usual: np.ndarray) -> None:
    weaker = restored(in_token_tiny, scale=1, steps=6, guidance=2.0)
    assert not np.array_equal(weaker, usual)
    inexact = restored(built(tmp_path, exact_scalars="off"), scale=1, steps=6)
    assert not np.array_equal(inexact, usual)


def test_published_folders_are_read_as_they_lie(tmp_path: Path, in_token_tiny: Path, usual: np.ndarray) -> None:
    """The tiny weights in the published layout give the bytes of the bundle that random weights gave."""
    fill, redux = tmp_path / "FLUX.1-Fill-dev", tmp_path / "FLUX.1-Redux-dev"
    weights = in_token_tiny / "weights"
    for folder, name, file in [
        (fill, "transformer", "transformer/diffusion_pytorch_model.safetensors"),
        (fill, "vae", "vae/diffusion_pytorch_model.safetensors"),
        (redux, "image_encoder", "image_encoder/model.safetensors"),
        (redux, "image_embedder", "image_embedder/diffusion_pytorch_model.safetensors"),
    ]:
        (folder / file).parent.mkdir(parents=True)
        shutil.copyfile(weights / name / f"{name}.safetensors", folder / file)
    held = load_numpy(in_token_tiny / "constants.safetensors")
    save_file({"prompt_embeds": held["context"], "pooled_prompt_embeds": held["pooled"]}, tmp_path / "p.safetensors")
    given = {"redux": str(redux), "prompt_embeds": str(tmp_path / "p.safetensors")}
    build(Request("in-token", "tiny", tmp_path / "b", fill, verify="never", system_options=given))
    assert not list((tmp_path / "b").rglob("weights/*.safetensors"))
    assert np.array_equal(restored(tmp_path / "b", scale=1, steps=6), usual)
    build(Request("in-token", "tiny", tmp_path / "packed", fill, verify="never", system_options=given, pack=True))
    shutil.rmtree(fill)
    shutil.rmtree(redux)
    assert np.array_equal(restored(tmp_path / "packed", scale=1, steps=6), usual)
