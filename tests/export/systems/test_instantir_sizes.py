"""InstantIR of other sizes than any preset's: its networks are the libraries' of the same files, whatever those say."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from support.eager import eager_engines
from support.instantir_files import FILES, SDXL, write_folder
from support.instantir_reference import TINY, Reference, Sizes, make_files, make_scheduler
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.system import Preset, Settings, UserFiles
from tilewright.export.systems.instantir.sizes import PRESETS
from tilewright.export.systems.instantir.system import SYSTEM
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.schedules import ddim

pytestmark = pytest.mark.slow
TOWER = {"vocab_size": 64, "bos_token_id": 62, "max_position_embeddings": 12, "eos_token_id": 63}
LINEAR = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0005,
    "beta_end": 0.01,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 3,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
OTHER = Sizes(  # differs from the presets in all that the graphs can do
    unet={
        "sample_size": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (12, 24, 48),
        "layers_per_block": 2,
        "transformer_layers_per_block": (2, 1, 1),
        "attention_head_dim": (3, 2, 6),
        "norm_num_groups": 6,
        "norm_eps": 1e-4,
        "cross_attention_dim": 40,
        "use_linear_projection": False,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 48,
    },
    vae={
        "block_out_channels": (6, 12, 12),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 3,
        "act_fn": "gelu",
        "scaling_factor": 0.4,
        "shift_factor": 0.3,
    },
    text=TOWER
    | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    text_2=TOWER
    | {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"hidden_act": "quick_gelu", "projection_dim": 12},
    dino={
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "patch_size": 6,
        "image_size": 30,
        "qkv_bias": False,
    },
    dino_side=18,
    dino_resize=20,
    mean=(0.5, 0.4, 0.3),
    deviation=(0.2, 0.3, 0.4),
    resampler={
        "dim": 20,
        "depth": 1,
        "heads": 4,
        "head_width": 6,
        "queries": 3,
        "width_in": 24,
        "width_out": 40,
        "multiple": 3,
    },
    sft=10,
    rank=3,
    schedule=LINEAR,
)
SINGLE = replace(  # numbers in the place of lists, and DINOv2's gated layers
    OTHER,
    unet=OTHER.unet
    | {
        "block_out_channels": (12, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 3,
        "sample_size": None,
    },
    dino=OTHER.dino | {"use_swiglu_ffn": True, "qkv_bias": True},
)
MADE = {"other": OTHER, "single": SINGLE}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers spend their time waiting for a second thread, seconds at a time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


class Folder:
    """Files of some sizes, what a build makes of them, and the reference."""

    def __init__(self, root: Path, sizes: Sizes) -> None:
        self.root, self.sizes, self.files = root, sizes, make_files(sizes, 5)
        if sizes is SINGLE:  # which is traced, and branches take long; the networks of OTHER have all
            self.files["previewer"] = {k: pair for k, pair in self.files["previewer"].items() if "mid_block" in k}
        write_folder(root, sizes, self.files)
        request = Request(
            "instantir", None, root / "b", root, system_options={"resampler_heads": sizes.resampler["heads"]}
        )
        self.settings, self.tensors = request.settings, request.tensors
        self.engines = eager_engines(SYSTEM, self.settings, self.tensors)
        self.reference = Reference(self.files, sizes)
        self.constants = SYSTEM.constants(self.settings, self.run, {}, None)

    def run(self, component: str, **inputs: Any) -> dict[str, np.ndarray]:
        return self.engines[component].run(inputs, ())


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp(request.param), MADE[request.param])


class Whole(np.ndarray):
    """A canvas as it is."""

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self[:, top : top + height, left : left + width], np.float32).view(np.ndarray)


def canvas(width: int, height: int) -> np.ndarray:
    """A picture of that size, planes in [0.2, 0.8]: no resize overshoots, so Pillow's needs no clamp."""
    return (sample_photo(width, height, 1).transpose(2, 0, 1) / 255 * 0.6 + 0.2).astype(np.float32)


def apart(ours: Any, theirs: Any) -> float:
    """How far ours is off, relative to theirs."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def pixels(sizes: Sizes, image: np.ndarray) -> Tensor:
    """What DINOv2's processor makes of an image, by Pillow in floating point."""
    height, width = (sizes.dino_resize * length // min(image.shape[1:]) for length in image.shape[1:])
    planes = [np.asarray(Image.fromarray(p.copy()).resize((width, height), Image.Resampling.BICUBIC)) for p in image]
    top, left = (height - sizes.dino_side) // 2, (width - sizes.dino_side) // 2
    square = torch.from_numpy(np.stack(planes)[:, top : top + sizes.dino_side, left : left + sizes.dino_side])
    mean, deviation = torch.tensor(sizes.mean), torch.tensor(sizes.deviation)
    return ((square - mean[:, None, None]) / deviation[:, None, None])[None]


@pytest.mark.slow
def test_every_size_is_the_files(folder: Folder) -> None:
    sizes, theirs = folder.settings.sizes, folder.sizes
    for name in ("unet", "vae", "text", "text_2", "dino"):
        for key, value in getattr(theirs, name).items():
            if key in sizes[name]:
                lists = key in ("attention_head_dim", "transformer_layers_per_block") and isinstance(value, int)
                expected = [value] * len(theirs.unet["block_out_channels"]) if lists else value
                assert sizes[name][key] == (list(expected) if isinstance(expected, tuple) else expected), key
    assert sizes["resampler"] == theirs.resampler and sizes["hidden"] == 10 and sizes["words"] == 12
    assert sizes["pixels"] == {"side": 18, "short": 20, "mean": [0.5, 0.4, 0.3], "deviation": [0.2, 0.3, 0.4]}
    assert Settings.from_json(folder.settings.to_json()) == folder.settings
    tiles = SYSTEM.program(folder.settings).passes[-1].tiles
    assert tiles is not None
    expected = (96, 32) if theirs is OTHER else (1024, 256)  # a UNet that does not say what it was trained on
    assert (tiles.px, tiles.overlap_px) == expected


@pytest.mark.slow
def test_the_schedule_is_the_schedulers(folder: Folder) -> None:
    """Noise levels and times, and what the last step leads to."""
    steps = SYSTEM.program(folder.settings).passes[-2].steps
    assert steps is not None
    for count in (30, 7):
        scheduler = make_scheduler("ddim", count, LINEAR)
        tables = ddim(count, 1, **steps.options)
        assert tables["t"].tolist() == scheduler.timesteps.tolist() and tables["t"][-1] == 3
        levels = scheduler.alphas_cumprod[scheduler.timesteps]
        assert apart(tables["alpha"] ** 2, levels) <= 1e-6 and apart(tables["beta"] ** 2, 1 - levels) <= 1e-5
        assert tables["alpha_next"][-1] == 1.0 == scheduler.final_alpha_cumprod


def test_networks_are_the_libraries(folder: Folder) -> None:
    """Text encoders, DINOv2 with its colours, the halves of the VAE, the resampler and the aggregator."""
    reference, sizes, image = folder.reference, folder.sizes, canvas(64, 32)
    ids = torch.tensor([[62, 5, 9, 11, 63, 0, 0, 0, 0, 0, 0, 0]])
    text = folder.run("text", ids=ids, ids_2=ids)
    for ours, theirs in zip((text["context"], text["pooled"]), reference.text(ids, ids), strict=True):
        assert apart(ours, theirs) <= 1e-5
    features = folder.run("see", image=image[None], positions=folder.constants["positions"])["features"]
    assert apart(features, reference.features(pixels(sizes, image))) <= 1e-5
    nothing = reference.features(torch.zeros(1, 3, sizes.dino_side, sizes.dino_side))
    assert apart(folder.constants["nothing"], nothing) <= 1e-5
    latent = folder.run("encode", image=image[None])["latent"]
    assert apart(latent, reference.encode(torch.from_numpy(image)[None])) <= 1e-5
    assert apart(folder.run("decode", latent=latent)["image"], reference.decode(torch.from_numpy(latent))) <= 1e-5
    assert 0.05 < latent.std() < 20


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_whole_restoration_is_the_references(folder: Folder, sampler: str) -> None:
    """The program over the networks."""
    restore(folder, SYSTEM.program(folder.settings), folder.engines, folder.constants, sampler)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["single"], indirect=True)
def test_a_bundle_of_these_files_restores_as_the_reference(folder: Folder) -> None:
    """Traced, attached and sealed, with ONNX Runtime's engines."""
    heads = {"resampler_heads": folder.sizes.resampler["heads"]}
    build(Request("instantir", None, folder.root / "bundle", folder.root, verify="never", system_options=heads))
    with load(folder.root / "bundle", threads=1) as restorer:
        for sampler in ("ddim", "ddpm"):
            restore(folder, restorer.bundle.program, restorer.engines, restorer.constants, sampler)


def restore(folder: Folder, program: Program, engines: Any, constants: Any, sampler: str) -> None:
    """Hold every step and the picture against the libraries' classes and schedulers."""
    image, reference, seed, count = canvas(64, 32), folder.reference, 3, 4
    ids = {f"{p}{n}": np.array([row]) for p, row in IDS.items() for n in ("ids", "ids_2")}
    kept: dict[str, Any] = {name: Kept(engines[name]) for name in engines}
    job = Job(image.view(Whole), seed, steps=count, inputs=ids | {"sampler": sampler})
    picture = run(program, kept, constants, job)
    texts = [reference.text(*(torch.from_numpy(ids[f"{p}{n}"]) for n in ("ids", "ids_2"))) for p in ("negative_", "")]
    square = pixels(folder.sizes, image)
    features = [reference.features(p) for p in (torch.zeros_like(square), square)]

    def noise(stream: int) -> Tensor:
        place = {"top": 0, "left": 0, "height": latent.shape[2], "width": latent.shape[3]}
        return torch.from_numpy(normal(seed, region=0, stream=stream, channels=4, **place))[None]

    latent = reference.encode(torch.from_numpy(image)[None])
    records = reference.trajectory(
        latent,
        noise,
        context2=torch.cat([context for context, _ in texts]),
        pooled2=torch.cat([pooled for _, pooled in texts]),
        tokens2=torch.cat([reference.tokens(f, False) for f in features]),
        preview_tokens2=torch.cat([reference.tokens(f, True) for f in features]),
        steps=count,
        guidance=7.0,
        sampler=sampler,
        adares="off",
    )
    for step, record in zip(kept["step"].outputs, records, strict=True):
        assert apart(step["z_next"], record["z"]) <= 1e-4
    expected = reference.decode(records[-1]["z"])[0].numpy()
    assert np.abs(picture - expected).max() <= 1e-3 and expected.std() > 0.05


IDS = {"": [62, 5, 9, 11, 63, 0, 0, 0, 0, 0, 0, 0], "negative_": [62, 7, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0]}


class Kept:
    """An engine that keeps what it gives."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.outputs = engine, list[dict[str, np.ndarray]]()

    def run(self, inputs: Any, wanted: Any) -> dict[str, np.ndarray]:
        self.outputs.append(self.engine.run(inputs, wanted))
        return self.outputs[-1]


SINGLE_FILES = make_files(SINGLE, 6)
UNET, TEXT, DINO = f"{SDXL}/unet/config.json", f"{SDXL}/text_encoder/config.json", "dinov2-large/config.json"
SCHEDULER, PROCESSOR = f"{SDXL}/scheduler/scheduler_config.json", "dinov2-large/preprocessor_config.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of SINGLE; do not change them."""
    return write_folder(tmp_path_factory.mktemp("published"), SINGLE, SINGLE_FILES)


@pytest.fixture
def mine(published: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(published, tmp_path / "files")


def settings(root: Path, preset: str | None = None, **options: Any) -> Settings:
    return Request("instantir", preset, root / "b", root, system_options=options).settings


def test_heads_and_whatever_else_no_file_tells_are_named(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without configurations shapes decide as far as they can; the preset's head width gives the number of heads."""
    expected = settings(mine, resampler_heads=4).sizes
    for file in (*mine.rglob("config.json"), mine / SCHEDULER, mine / PROCESSOR):
        file.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tilewright"), pytest.raises(InputError, match="'norm_num_groups' 32"):
        settings(mine)  # of the full preset, which does not fit these widths
    caplog.clear()
    tiny, request = PRESETS["tiny"], Request("instantir", None, mine / "b", mine)
    fitting = replace(tiny, unet=tiny.unet | {"norm_num_groups": 6}, vae=tiny.vae | {"norm_num_groups": 3})
    files = UserFiles(request.tensors, request.places, request.lora)
    sizes = SYSTEM.decide(Preset("fitting", fitting, explicit=False), {}, files).sizes
    for name, left in GUESSED.items():
        differing = {key for key, value in sizes[name].items() if value != expected[name][key]}
        assert differing == left, name
    assert sizes["unet"]["attention_head_dim"] == [1, 3] and sizes["text"]["num_attention_heads"] == 2
    said = [record.getMessage() for record in caplog.records]
    starts = [f"{name}: weights {mine / FILES[name]} alone does not tell all sizes; using " for name in GUESSED_OF]
    starts += [
        f"dino: {mine / PROCESSOR} is missing; using side 28, ",
        f"scheduler: {mine / SCHEDULER} is missing; ",
    ]
    starts += ["adapter "]
    assert all(any(line.startswith(start) for line in said) for start in starts) and len(said) == len(starts)
    unet = next(line for line in said if line.startswith("unet"))
    assert "attention_head_dim [1, 3]" in unet and "block_out_channels" not in unet
    assert "using 1 of width 24; set them with --resampler-heads" in said[-1]


GUESSED_OF = ("unet", "vae", "text_encoder", "text_encoder_2", "dino")
GUESSED = {  # network -> what no shape tells, where the files differ from the preset
    "unet": {"attention_head_dim", "sample_size", "norm_eps"},
    "vae": {"act_fn", "scaling_factor", "shift_factor"},
    "text": {"hidden_act", "layer_norm_eps", "num_attention_heads"},
    "text_2": {"hidden_act"},
    "dino": {"hidden_act", "layer_norm_eps", "num_attention_heads", "mlp_ratio"},
}


def test_the_resamplers_heads_are_an_option(published: Path) -> None:
    sizes = settings(published, resampler_heads=2).sizes["resampler"]
    assert (sizes["heads"], sizes["head_width"]) == (2, 12)
    for heads in (0, 5, -2):
        with pytest.raises(UsageError, match=f"--resampler-heads {heads} does not divide the resampler's 24 channels"):
            settings(published, resampler_heads=heads)


def edited(file: str, **change: Any) -> Callable[[Path], None]:
    """Change what a configuration says."""

    def edit(root: Path) -> None:
        said = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps(said | change))

    return edit


def spoilt(origin: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """Change a file of weights."""
    return lambda root: save_file(change(SINGLE_FILES[origin]), root / FILES[origin])


def without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


WIDE = {"conv_in.weight": torch.zeros(12, 9, 3, 3)}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another class": (edited(UNET, _class_name="FluxTransformer2DModel"), "is of class FluxTransformer2DModel, "),
    "no JSON": (lambda root: (root / UNET).write_text("{"), f"{UNET}: not valid JSON"),
    "class embeddings": (edited(UNET, class_embed_type="timestep"), "'class_embed_type' is 'timestep'"),
    "image embeddings": (edited(UNET, encoder_hid_dim=8), "'encoder_hid_dim' is 8"),
    "dual cross attention": (edited(UNET, dual_cross_attention=True), "'dual_cross_attention' is True"),
    "scaled norms": (edited(UNET, resnet_time_scale_shift="scale_shift"), "'resnet_time_scale_shift' is 'scale_shift'"),
    "time condition": (edited(UNET, time_cond_proj_dim=8), "'time_cond_proj_dim' is 8"),
    "kernels": (edited(UNET, conv_in_kernel=5), "'conv_in_kernel' is 5"),
    "middle": (edited(UNET, mid_block_type="UNetMidBlock2D"), "'mid_block_type' is 'UNetMidBlock2D'"),
    "only cross attention": (edited(UNET, only_cross_attention=True), "'only_cross_attention' is True"),
    "named heads": (edited(UNET, num_attention_heads=3), "'num_attention_heads' is 3"),
    "SD 1.5": (
        edited(UNET, addition_embed_type=None),
        "'addition_embed_type' is None, this graph does only 'text_time'",
    ),
    "UNet's widths": (
        edited(UNET, block_out_channels=[12, 48]),
        f"{UNET}: 'block_out_channels' is [12, 48], in weights ",
    ),
    "widths of the weights": (
        edited(UNET, block_out_channels=[12, 48]),
        "it is [12, 24]; give files that belong together",
    ),
    "UNet for inpainting": (spoilt("unet", lambda t: t | WIDE), "has in_channels 9, this graph does only 4; "),
    "UNet of SD 1.5": (spoilt("unet", without("add_embedding.")), "holds no 'add_embedding.linear_1.weight'; "),
    "no UNet": (spoilt("unet", lambda _: SINGLE_FILES["vae"]), "holds no 'conv_in.weight'; give UNet2DConditionModel"),
    "VAE's block": (edited(f"{SDXL}/vae/config.json", mid_block_add_attention=False), "'mid_block_add_attention' is"),
    "VAE's mean": (edited(f"{SDXL}/vae/config.json", latents_mean=[0.1] * 4), "'latents_mean' is [0.1, "),
    "text's end": (edited(TEXT, eos_token_id=7), "'eos_token_id' is 7"),
    "text's length": (edited(TEXT, max_position_embeddings=16), "'max_position_embeddings' is 16, in weights "),
    "heads of no width": (edited(TEXT, num_attention_heads=5), "'hidden_size' 16 is no multiple of "),
    "betas of training": (edited(SCHEDULER, trained_betas=[0.1]), "'trained_betas' is [0.1], "),
    "betas that fall": (edited(SCHEDULER, beta_start=0.02), f"{SCHEDULER}: beta_start=0.02, beta_end=0.01 is no noise"),
    "cosine betas": (edited(SCHEDULER, beta_schedule="squaredcos_cap_v2"), "'beta_schedule' is 'squaredcos_cap_v2'"),
    "velocity": (edited(SCHEDULER, prediction_type="v_prediction"), "'prediction_type' is 'v_prediction'"),
    "spacing": (edited(SCHEDULER, timestep_spacing="trailing"), "'timestep_spacing' is 'trailing'"),
    "training steps": (edited(SCHEDULER, num_train_timesteps=500), "'num_train_timesteps' is 500"),
    "zero signal": (edited(SCHEDULER, rescale_betas_zero_snr=True), "'rescale_betas_zero_snr' is True"),
    "thresholding": (edited(SCHEDULER, thresholding=True), "'thresholding' is True"),
    "clipping": (edited(SCHEDULER, clip_sample=True), "'clip_sample' is True"),
    "bilinear": (edited(PROCESSOR, resample=2), "'resample' is 2, this graph does only 3"),
    "no crop": (edited(PROCESSOR, do_center_crop=False), "'do_center_crop' is False"),
    "crop": (edited(PROCESSOR, crop_size={"height": 18, "width": 12}), "make no square"),
    "crop of less than a patch": (edited(PROCESSOR, crop_size=5, size=5), "'patch_size' is 6, "),
    "DINOv2's patches": (edited(DINO, patch_size=5), "'patch_size' is 5, in weights "),
    "another encoder": (edited(DINO, architectures=["SiglipVisionModel"], model_type="siglip"), "SiglipVisionModel"),
    "aggregator of another width": (
        lambda root: torch.save(make_files(OTHER, 1)["aggregator"], root / "aggregator.pt"),
        "it is of another base model; give aggregator.pt of InstantX/InstantIR",
    ),
    "adapter of another width": (
        lambda root: torch.save(make_files(TINY, 1)["adapter"], root / "adapter.pt"),
        "its image keys read 32 numbers, SDXL's context has 40: it is of another base model",
    ),
}


@pytest.mark.parametrize(("spoil", "part"), REFUSED.values(), ids=REFUSED)
def test_what_the_graphs_cannot_do_is_refused(mine: Path, spoil: Callable[[Path], None], part: str) -> None:
    spoil(mine)
    with pytest.raises(InputError) as caught:
        settings(mine, resampler_heads=4)
    said = str(caught.value)
    assert part in said and "\n" not in said and str(mine) in said, said


FITTING = {  # networks that do not fit each other: the files tell the same as their weights
    "text": (replace(SINGLE, text=SINGLE.text | {"hidden_size": 20}), "'cross_attention_dim' is 40, "),
    "pooled": (replace(SINGLE, text_2=SINGLE.text_2 | {"projection_dim": 10}), "'projection_dim' is 10, "),
    "words": (replace(SINGLE, text=SINGLE.text | {"max_position_embeddings": 14}), "'max_position_embeddings' is 14, "),
    "latents": (replace(SINGLE, vae=SINGLE.vae | {"latent_channels": 8}), "'latent_channels' is 8, "),
    "skips": (
        replace(SINGLE, unet=OTHER.unet | {"layers_per_block": 3}),
        "3 blocks of 3 layers have 12 skips, the graph takes 9; give SDXL's UNet",
    ),
}


@pytest.mark.parametrize(("sizes", "part"), FITTING.values(), ids=FITTING)
def test_networks_that_do_not_fit_each_other_are_refused(tmp_path: Path, sizes: Sizes, part: str) -> None:
    write_folder(tmp_path, sizes, make_files(sizes, 1))
    with pytest.raises(InputError) as caught:
        settings(tmp_path, resampler_heads=4)
    assert part in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_preset_that_was_asked_for_must_be_that_of_the_files(published: Path) -> None:
    said = f"preset 'tiny' has intermediate_size 32, config {published / TEXT} says 24; leave --preset out"
    with pytest.raises(UsageError, match=re.escape(said)):
        settings(published, "tiny")
