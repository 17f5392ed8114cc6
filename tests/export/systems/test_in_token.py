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
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.systems.flux import in_token
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.verify.engines import sample_photo
from tilewright.runtime import load
from tilewright.runtime.bundle import read
from tilewright.runtime.errors import UsageError
from tilewright.runtime.noise import normal
from tilewright.runtime.scheduler import Job, run

SIZES = PRESETS["tiny"]
MULTIPLE, SPATIAL, CHANNELS = SIZES.multiple, SIZES.spatial, SIZES.channels


class Recording:
    """An engine that keeps the latents it gives."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.made = engine, []

    def run(self, inputs: Any, wanted: Any) -> Any:
        outputs = self.engine.run(inputs, wanted)
        self.made.append(outputs["z_next"])
        return outputs


def packed(latent: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def squeezed(image: np.ndarray, side: int) -> torch.Tensor:
    """SigLIP's picture by Pillow in floating point: the published processor without its rounding to 8 bits."""
    planes = [Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in image]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 1)[None] * 2 - 1


def sigmas(tokens: int, steps: int) -> torch.Tensor:
    """By diffusers' scheduler, as FluxFillPipeline sets it."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


class Eager:
    """The system written from upstream parts, one image region at a time."""

    def __init__(self, bundle: Path, parts: tuple[Any, Any]) -> None:
        self.transformer, self.vae = parts
        self.siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES.siglip, vision_use_head=False)).eval()
        held = load_file(bundle / "weights" / "image_encoder" / "image_encoder.safetensors")
        self.siglip.load_state_dict({k.removeprefix("vision_model."): t for k, t in held.items()}, strict=True)
        self.redux = ReduxImageEncoder(SIZES.siglip["hidden_size"], SIZES.t5["d_model"]).eval()
        held = load_file(bundle / "weights" / "image_embedder" / "image_embedder.safetensors")
        self.redux.load_state_dict(held, strict=True)
        constants = load_numpy(bundle / "constants.safetensors")
        self.context, self.pooled = (torch.from_numpy(constants[name]) for name in ("context", "pooled"))

    def encode(self, image: np.ndarray) -> torch.Tensor:
        mean = self.vae.encode(torch.from_numpy(image)[None] * 2 - 1).latent_dist.mean
        return (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def see(self, image: np.ndarray) -> torch.Tensor:
        pixels = squeezed(image, SIZES.siglip["image_size"])
        return self.redux(self.siglip(pixels).last_hidden_state).image_embeds

    def velocity(self, z: torch.Tensor, y: torch.Tensor, seen: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        rows, columns = z.shape[2] // 2, z.shape[3] // 2
        mask = torch.zeros(1, rows * columns, 4 * SPATIAL**2)
        ids = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        words = torch.cat((self.context, seen), 1)
        v = self.transformer(
            hidden_states=torch.cat((packed(z), packed(y), mask), 2),
            encoder_hidden_states=words,
            pooled_projections=self.pooled,
            timestep=sigma[None],
            guidance=torch.tensor([30.0]),
            img_ids=torch.cat((torch.zeros(len(ids), 1), ids.float()), 1),
            txt_ids=torch.zeros(words.shape[1], 3),
        ).sample
        return torch.nn.functional.pixel_shuffle(v.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def decode(self, z: torch.Tensor) -> np.ndarray:
        config = self.vae.config
        image = self.vae.decode(z / config.scaling_factor + config.shift_factor).sample
        return ((image.clamp(-1, 1) + 1) / 2)[0].numpy()


@pytest.fixture(scope="module")
def eager(in_token_tiny: Path, upstream: Callable[[Path], tuple[Any, Any]]) -> Eager:
    with torch.no_grad():
        return Eager(in_token_tiny, upstream(in_token_tiny))


def canvas(width: int, height: int) -> np.ndarray:
    """A picture of that size, planes in [0, 1]."""
    return sample_photo(width, height, 1).transpose(2, 0, 1).astype(np.float32) / 255


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(1 / np.mean((one.astype(np.float64) - other) ** 2))


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


class Whole:
    """A canvas as it is."""

    def __init__(self, planes: np.ndarray) -> None:
        self.planes, self.shape = planes, planes.shape

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self.planes[:, top : top + height, left : left + width])


@pytest.mark.parametrize(("width", "height"), [(48, 32), (36, 60)])
@torch.no_grad()
def test_the_whole_trajectory_and_the_picture_are_those_of_upstream_parts(
    in_token_tiny: Path, eager: Eager, width: int, height: int
) -> None:
    image, steps = canvas(width, height), 28
    rows, columns = height // SPATIAL, width // SPATIAL
    z = normal(7, region=0, stream=0, channels=CHANNELS, top=0, left=0, height=rows, width=columns)
    z, y, seen = torch.from_numpy(z)[None], eager.encode(image), eager.see(image)
    path, schedule = [], sigmas(rows * columns // 4, steps)
    for i in range(steps):
        z = z + (schedule[i + 1] - schedule[i]) * eager.velocity(z, y, seen, schedule[i])
        path.append(z.numpy())
    with load(in_token_tiny) as restorer:
        step = Recording(restorer.engines["step"])
        engines = {name: restorer.engines[name] for name in restorer.engines} | {"step": step}
        ours = run(restorer.bundle.program, engines, restorer.constants, Job(Whole(image), seed=7))
    assert len(step.made) == steps
    for latent, expected in zip(step.made, path, strict=True):
        assert relative(latent, expected) <= 1e-4
    assert psnr(ours, eager.decode(z)) >= 60
    assert ours.std() > 0.05


@torch.no_grad()
def test_tiles_are_joined_on_one_latent_every_step(in_token_tiny: Path, eager: Eager) -> None:
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
    y = joined([eager.encode(np.ascontiguousarray(crop)) for crop in crops])
    seen = [eager.see(np.ascontiguousarray(crop)) for crop in crops]
    schedule = sigmas(cells * cells // 4, steps)
    for i in range(steps):
        at = [slice(left, left + cells) for left in lefts]
        z = joined(
            [
                z[..., s] + (schedule[i + 1] - schedule[i]) * eager.velocity(z[..., s], y[..., s], e, schedule[i])
                for s, e in zip(at, seen, strict=True)
            ]
        )
    theirs = joined([torch.from_numpy(eager.decode(z[..., left : left + cells]))[None] for left in lefts], SPATIAL)
    with load(in_token_tiny) as restorer:
        job = Job(Whole(image), seed=3, tile_px=tile, overlap_px=overlap, steps=steps)
        ours = run(restorer.bundle.program, restorer.engines, restorer.constants, job)
    assert psnr(ours, theirs[0].numpy()) >= 60


def test_a_network_that_looks_at_one_cell_gives_the_same_tiled_and_whole() -> None:
    """The system's program on pointwise engines; the schedule's bound makes it the same for all sizes."""
    settings = in_token.settings("tiny", {"prompt_embeds": "given", "max_mu": 0.3}, {})
    program = in_token.program("tiny", **settings)

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
            rows = np.ones((len(inputs["sigmas"]), SIZES.rows, SIZES.dim), np.float32)
            return {"modulation": rows * inputs["sigmas"][:, None, None]}

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
    image = Whole(canvas(200, 120))
    whole = run(program, engines, constants, Job(image, seed=1))
    tiled = run(program, engines, constants, Job(image, seed=1, tile_px=64, overlap_px=16))
    assert np.abs(whole - tiled).max() <= 1e-5 and whole.std() > 0.1


def test_graphs_hold_no_sequences_which_tensorrt_has_none_of(in_token_tiny: Path) -> None:
    ops = {
        node.op_type
        for path in in_token_tiny.glob("*/*.onnx")
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


def built(tmp_path: Path, **given: Any) -> Path:
    build(Request("in-token", "tiny", tmp_path / "b", seed=0, verify="never", given=given))
    return tmp_path / "b"


def test_the_whole_modulation_in_the_step_gives_the_same_picture(tmp_path: Path, usual: np.ndarray) -> None:
    bundle = built(tmp_path, no_split_modulation=True)
    assert "modulate" not in read(bundle).manifest.components
    assert np.abs(restored(bundle, scale=1, steps=6).astype(int) - usual).max() <= 1


def test_fixed_tiles_need_no_modulation_weights_and_give_the_same_picture(tmp_path: Path) -> None:
    fixed = built(tmp_path / "fixed", fixed_tile=[64, 128], steps=6)
    free = built(tmp_path / "free", steps=6)
    manifest, weights = read(fixed).manifest, read(fixed).weights
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
    assert "lora_scale" in read(free).program.inputs and "lora_scale" not in read(fixed).program.inputs
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
    weaker = restored(in_token_tiny, scale=1, steps=6, inputs={"guidance": 2.0})
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
    build(Request("in-token", "tiny", tmp_path / "b", fill, verify="never", given=given))
    assert not list((tmp_path / "b").rglob("weights/*.safetensors"))
    assert np.array_equal(restored(tmp_path / "b", scale=1, steps=6), usual)
    build(Request("in-token", "tiny", tmp_path / "packed", fill, verify="never", given=given, pack=True))
    shutil.rmtree(fill)
    shutil.rmtree(redux)
    assert np.array_equal(restored(tmp_path / "packed", scale=1, steps=6), usual)
