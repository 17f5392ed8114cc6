"""What FLUX's files say of sizes is taken, what they do not say is named, and what cannot be is refused in one line."""

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.fill_authors import authors_transformer, authors_vae
from support.fill_files import Published, publish
from tilewright.export.build.request import Request
from tilewright.export.system import Preset, Settings, System, Tensors, UserFiles
from tilewright.export.systems.flux.in_token import SYSTEM as IN_TOKEN
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.systems.flux.vicr import SYSTEM as VICR
from tilewright.export.weights.files import find
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError, UsageError

FULL = PRESETS["full"]


def as_file(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """A file of bfloat16 tensors of which there is only the header."""
    end, tensors = 0, {}
    for key, shape in shapes.items():
        tensors[key] = Reference(name, "bfloat16", shape, end, 2 * math.prod(shape))
        end += 2 * math.prod(shape)
    return Tensors(Path("/nowhere"), tensors, {name: name})


@cache
def stand_in(system: str) -> dict[str, Any]:
    content = {"in-token": IN_TOKEN, "vicr": VICR}[system].stand_in
    assert content is not None
    return content()


def shapes_under(system: str, folder: str) -> dict[str, tuple[int, ...]]:
    """Of all files of a stand-in's folder."""
    files = (content for name, content in stand_in(system).items() if name.startswith(folder) and "{" not in content)
    return {key: tuple(spec.shape) for tensors in files if isinstance(tensors, dict) for key, spec in tensors.items()}


def without_files(system: System, **options: Any) -> Settings:
    return system.decide(Preset("full", FULL, explicit=False), options, UserFiles({}, {}))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [False, True], ids=["no preset", "preset full"])
@pytest.mark.parametrize("system", [IN_TOKEN, VICR], ids=lambda s: s.name)
def test_the_published_folders_are_the_full_preset_and_say_everything(
    system: System, asked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in stand_in(system.name).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
    origins = {
        "transformer": "FLUX.1-Fill-dev/transformer",
        "vae": "FLUX.1-Fill-dev/vae",
        "text_encoder": "FLUX.1-Fill-dev/text_encoder",
        "text_encoder_2": "FLUX.1-Fill-dev/text_encoder_2",
        "image_encoder": "FLUX.1-Redux-dev/image_encoder" if system is IN_TOKEN else "clip-vit-large-patch14",
        "image_embedder": "FLUX.1-Redux-dev/image_embedder",
        "lora": "vicr.safetensors",
    }
    shapes = {origin: shapes_under(system.name, place) for origin, place in origins.items()}
    tensors = {origin: as_file(f"{origin}.safetensors", of) for origin, of in shapes.items() if of}
    places = {origin: tmp_path / origins[origin] for origin in tensors}
    options = {}
    if system is IN_TOKEN:
        options["prompt_embeds"] = str(tmp_path / "prompt.safetensors")
        write_tensors(tmp_path / "prompt.safetensors", stand_in("in-token")["prompt.safetensors"], (), "zeros")
    with caplog.at_level(logging.WARNING, "tilewright"):
        settings = system.decide(Preset("full", FULL, asked), options, UserFiles(tensors, places))
    expected = without_files(system, **options)
    assert settings.sizes == expected.sizes and settings.choices == expected.choices
    assert not caplog.records


def test_the_authors_single_files_show_all_but_what_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"transformer": "flux1-fill-dev.safetensors", "vae": "ae.safetensors"}
    shapes = {"transformer": authors_transformer(3072, 19, 38), "vae": authors_vae()}
    tensors = {origin: as_file(names[origin], shapes[origin]) for origin in names}
    files = UserFiles(tensors, dict.fromkeys(names, tmp_path))
    with caplog.at_level(logging.WARNING, "tilewright"):
        settings = IN_TOKEN.decide(Preset("mid", PRESETS["mid"], explicit=False), {}, files)
    assert settings.sizes == without_files(IN_TOKEN).sizes
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and all("\n" not in line for line in lines)
    assert (
        "vae: weights ae.safetensors alone does not tell all sizes; using act_fn 'silu', norm_num_groups 32,"
        in lines[0]
    )
    assert "scaling_factor 0.3611, shift_factor 0.1159; give its config.json" in lines[0]
    assert "flux1-fill-dev.safetensors alone does not tell all sizes; using axes_dims_rope [16, 56, 56];" in lines[1]
    assert lines[2].startswith(f"scheduler: no {tmp_path / 'scheduler' / 'scheduler_config.json'}; using base_shift")


def test_a_vae_of_three_blocks_is_read_from_the_authors_layout(tmp_path: Path) -> None:
    shapes = {"transformer": authors_transformer(128, 1, 1), "vae": authors_vae((32, 32, 64))}
    tensors = {origin: as_file("it.safetensors", of) for origin, of in shapes.items()}
    files = UserFiles(tensors, dict.fromkeys(tensors, tmp_path))
    with pytest.raises(InputError, match=r"has in_channels 384, vae .* needs 192; give files of one model$"):
        IN_TOKEN.decide(Preset("full", FULL, explicit=False), {}, files)


# files of another size, spoilt


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(published: Published, tmp_path: Path) -> Path:
    return shutil.copytree(published.folder, tmp_path / "files")


def settings(
    folder: Path | None, system: str, preset: str | None = None, seed: int | None = None, **options: Any
) -> Settings:
    return Request(system, preset, Path("nowhere"), folder, seed, system_options=options).settings


def change(file: Path, **values: Any) -> None:
    said = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (said | values).items() if value != "GONE"}))


FILL, REDUX, CLIP = "FLUX.1-Fill-dev", "FLUX.1-Redux-dev", "clip-vit-large-patch14"
TRANSFORMER, VAE, SCHEDULER = (
    f"{FILL}/{name}" for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
)
PROCESSOR = f"{REDUX}/feature_extractor/preprocessor_config.json"
# system, file, changes, what the refusal says
SPOILT: list[tuple[str, str, dict[str, Any], str]] = [
    ("in-token", TRANSFORMER, {"in_channels": 12}, r"'in_channels' 12 leave no room .* this is another FLUX"),
    ("in-token", TRANSFORMER, {"num_layers": 2}, r"config .*'num_layers' is 2, in weights .*safetensors it is 1; "),
    ("in-token", TRANSFORMER, {"guidance_embeds": False}, "'guidance_embeds' is False, this graph does only True"),
    ("in-token", TRANSFORMER, {"patch_size": 2}, "'patch_size' is 2, this graph does only 1"),
    ("in-token", TRANSFORMER, {"axes_dims_rope": [4, 4, 6]}, r"'axes_dims_rope' \[4, 4, 6\] are no three even parts"),
    (
        "vicr",
        TRANSFORMER,
        {"_class_name": "SD3Transformer2DModel"},
        "is of class SD3Transformer2DModel, expected is Flux",
    ),
    ("vicr", VAE, {"latent_channels": 4}, r"config .*'latent_channels' is 4, in weights .* it is 3"),
    ("in-token", VAE, {"norm_num_groups": 5}, "'block_out_channels' 6 do not divide into 'norm_num_groups' 5"),
    ("in-token", VAE, {"use_quant_conv": False}, r"'use_quant_conv' is false, in weights .* it is true"),
    ("in-token", VAE, {"latents_mean": [0.1]}, r"'latents_mean' is \[0.1\], this graph does only None"),
    (
        "in-token",
        SCHEDULER,
        {"use_dynamic_shifting": False},
        "'use_dynamic_shifting' is False, this graph does only True",
    ),
    ("in-token", SCHEDULER, {"shift_terminal": 0.1}, "'shift_terminal' is 0.1, this graph does only None"),
    ("vicr", SCHEDULER, {"use_karras_sigmas": True}, "'use_karras_sigmas' is True, this graph does only False"),
    ("vicr", SCHEDULER, {"invert_sigmas": True}, "'invert_sigmas' is True, this graph does only False"),
    ("vicr", SCHEDULER, {"max_image_seq_len": 3}, "'base_image_seq_len' 4 is not below 'max_image_seq_len' 3"),
    (
        "in-token",
        f"{REDUX}/image_encoder/config.json",
        {"num_attention_heads": 7},
        "30 is no multiple of 'num_attention",
    ),
    ("in-token", f"{REDUX}/image_encoder/config.json", {"patch_size": 8}, r"'patch_size' is 8, in weights .* it is 9"),
    (
        "in-token",
        f"{REDUX}/image_encoder/config.json",
        {"image_size": 36},
        r"'image_size' is 36, in weights .* it is 27",
    ),
    (
        "in-token",
        f"{REDUX}/image_embedder/config.json",
        {"redux_dim": 31},
        r"'redux_dim' is 31, in weights .* it is 30",
    ),
    (
        "in-token",
        PROCESSOR,
        {"size": {"height": 36, "width": 36}},
        "makes images of 36, image_encoder .* takes images of 29",
    ),
    ("in-token", PROCESSOR, {"resample": 2}, "'resample' is 2, this graph does only 3"),
    (
        "in-token",
        PROCESSOR,
        {"image_processor_type": "ViTImageProcessor"},
        "is of class ViTImageProcessor, expected is Sig",
    ),
    ("in-token", f"{FILL}/text_encoder_2/config.json", {"d_model": 24}, r"'d_model' is 24, in weights .* it is 20"),
    (
        "in-token",
        f"{FILL}/text_encoder_2/config.json",
        {"feed_forward_proj": "gated-gelu", "is_gated_act": "GONE", "dense_act_fn": "GONE"},
        "in weights .* it is 'relu'",
    ),
    (
        "vicr",
        f"{FILL}/text_encoder/config.json",
        {"eos_token_id": 5},
        "'eos_token_id' is 5, where texts end with the last",
    ),
    ("vicr", f"{CLIP}/config.json", {"projection_dim": 15}, r"'projection_dim' is 15, in weights .* it is 14"),
    ("vicr", f"{CLIP}/preprocessor_config.json", {"crop_size": 25}, "makes images of 25, image_encoder .* of 26"),
    (
        "vicr",
        f"{CLIP}/preprocessor_config.json",
        {"do_center_crop": False},
        "'do_center_crop' is False, this graph does only",
    ),
]


@pytest.mark.parametrize(("system", "file", "changes", "said"), SPOILT, ids=lambda v: str(v)[:40])
def test_configurations_that_cannot_be_are_refused_in_one_line(
    folder: Path, system: str, file: str, changes: dict[str, Any], said: str
) -> None:
    change(folder / file, **changes)
    with pytest.raises(InputError, match=said) as caught:
        settings(folder, system, **({"prompt": "a bridge"} if system == "in-token" else {}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("file", [TRANSFORMER, SCHEDULER, PROCESSOR, f"{FILL}/tokenizer_2/tokenizer_config.json"])
def test_a_file_that_is_no_json_is_refused(folder: Path, file: str) -> None:
    (folder / file).write_text("{")
    with pytest.raises(InputError, match=r"config .*: not valid JSON \(.*\); copy it again"):
        settings(folder, "in-token")


def test_a_preset_that_the_files_contradict_is_refused_by_both_names(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^preset 'tiny' has \w+ .*, config .* says .*; leave --preset out$"):
        settings(folder, "in-token", "tiny")
    embeds = {"prompt_embeds": np.zeros((1, 9, 32), np.float32), "pooled_prompt_embeds": np.zeros((1, 16), np.float32)}
    save_file(embeds, folder / "p.safetensors")
    with pytest.raises(UsageError, match=r"preset 'tiny' has words 64, embeddings .*p.safetensors says 9; leave"):
        settings(None, "in-token", "tiny", seed=0, prompt_embeds=str(folder / "p.safetensors"))


@pytest.mark.parametrize(
    ("system", "changes", "said"),
    [
        (
            "in-token",
            {"vae": {"latent_channels": 4}},
            r"transformer .* has out_channels 12, vae .* needs 16; give files of",
        ),
        (
            "in-token",
            {"vae": {"block_out_channels": (6, 8)}},
            r"transformer .* has in_channels 88, vae .* needs 40; give",
        ),
        (
            "in-token",
            {"t5": {"d_model": 25}},
            r"text_encoder_2 .* has d_model 25, transformer .* joint_attention_dim 20; ",
        ),
        (
            "vicr",
            {"clip_text": {"hidden_size": 27}},
            r"text_encoder .* has hidden_size 27, .* pooled_projection_dim 24; ",
        ),
        (
            "in-token",
            {"siglip": {"hidden_size": 35}},
            r"image_embedder .* has redux_dim 30, image_encoder .*hidden_size 35",
        ),
        (
            "vicr",
            {"clip_vision": {"projection_dim": 9}},
            "the bridge takes 14, image_encoder .* has projection_dim 9; ",
        ),
    ],
)
def test_networks_of_two_models_are_refused_by_both_names(
    folder: Path, tmp_path: Path, system: str, changes: dict[str, dict[str, Any]], said: str
) -> None:
    (part,) = changes
    if part == "vae" and "block_out_channels" in changes[part]:
        changes = {
            part: changes[part]
            | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        }
    other = publish(tmp_path / "other", **changes).folder
    places = {
        "vae": f"{FILL}/vae",
        "t5": f"{FILL}/text_encoder_2",
        "clip_text": f"{FILL}/text_encoder",
        "clip_vision": CLIP,
    }
    place = places.get(part, f"{REDUX}/image_encoder")
    shutil.rmtree(folder / place)
    shutil.copytree(other / place, folder / place)
    with pytest.raises(InputError, match=said):
        settings(folder, system)


def test_a_lora_without_the_bridge_is_refused(folder: Path) -> None:
    file = folder / "vicr.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lora" in key}, file)
    with pytest.raises(
        InputError, match=r"vicr.safetensors: holds .*, but no bridge \(vcb.fc1.weight, .*; give VICR's file"
    ):
        settings(folder, "vicr")


def spoil(file: Path, act: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(file)
    act(tensors)
    save_file(tensors, file)


def settings_of_transformer(folder: Path, preset: str | None) -> Settings:
    """With random weights for everything else."""
    place = folder / FILL / "transformer"
    files = UserFiles({"transformer": find(place)}, {"transformer": place})
    name = preset or "full"
    return IN_TOKEN.decide(Preset(name, PRESETS[name], explicit=preset is not None), {}, files)


def test_a_flux_without_mask_channels_is_told_and_a_wrong_preset_is_not_called_that(folder: Path) -> None:
    weights = folder / FILL / "transformer/diffusion_pytorch_model.safetensors"
    (folder / TRANSFORMER).unlink()
    with pytest.raises(InputError, match=r"'axes_dims_rope' \[16, 56, 56\] are no .*; put its config.json beside it"):
        settings(folder, "in-token")
    with pytest.raises(UsageError, match=r"preset 'tiny' has in_channels 48, weights .* says 88; leave --preset out"):
        settings_of_transformer(folder, "tiny")
    spoil(weights, lambda t: t.update({"x_embedder.weight": t["x_embedder.weight"][:, :24].copy()}))
    with pytest.raises(
        InputError, match=r"takes 24 channels and gives 12: this is another FLUX, without mask channels; "
    ):
        settings_of_transformer(folder, None)


def test_heads_that_no_file_tells_are_the_presets_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / FILL / "text_encoder/config.json").unlink()
    with caplog.at_level(logging.WARNING, "tilewright"):
        sizes = settings(folder, "vicr").sizes
    (line,) = (record.getMessage() for record in caplog.records)
    assert "text_encoder: weights " in line and "num_attention_heads 12, hidden_act 'quick_gelu'" in line
    assert sizes["clip_text"]["hidden_size"] == 24 and sizes["clip_text"]["num_attention_heads"] == 12
    (folder / REDUX / "image_encoder/config.json").unlink()
    with pytest.raises(
        InputError, match=r"30 is no multiple of 'num_attention_heads' 16; put its config.json beside it"
    ):
        settings(folder, "in-token")


def test_tokenizers_say_how_many_words_and_the_embeddings_file_does(folder: Path) -> None:
    assert [settings(folder, "vicr").sizes[name] for name in ("words", "clip_words")] == [40, 18]
    change(folder / FILL / "tokenizer/tokenizer_config.json", model_max_length=77)  # more than there are positions
    change(folder / FILL / "tokenizer_2/tokenizer_config.json", model_max_length=int(1e30))
    assert [settings(folder, "vicr").sizes[name] for name in ("words", "clip_words")] == [512, 20]
    embeds = {"prompt_embeds": np.zeros((1, 9, 20), np.float32), "pooled_prompt_embeds": np.zeros((1, 24), np.float32)}
    save_file(embeds, folder / "prompt.safetensors")
    sizes = settings(folder, "in-token").sizes
    assert sizes["words"] == 9 and not sizes["t5"] and not sizes["clip_text"]


@pytest.mark.parametrize(("said", "tile"), [(50, 48), (8, 8), (3, 8), ("GONE", 1024), (None, 1024)])
def test_tiles_are_as_large_as_the_vaes_pictures_were(folder: Path, said: Any, tile: int) -> None:
    change(folder / VAE, sample_size=said)
    sizes = settings(folder, "in-token").sizes
    assert sizes["tile_px"] == tile
    assert sizes["overlap_px"] == {48: 8, 8: 0, 1024: 256}[tile]
    assert sizes["whole_px"] == ([2560, 1440] if tile == 1024 else [tile, tile])


def test_redux_is_found_beside_the_base_model_too(folder: Path) -> None:
    for name in ("image_encoder", "image_embedder", "feature_extractor"):
        shutil.move(folder / REDUX / name, folder / FILL / name)
    (folder / REDUX).rmdir()
    assert settings(folder, "in-token").sizes["siglip"]["hidden_size"] == 30
    assert settings(folder / FILL, "in-token").sizes["siglip_processor"]["image_std"] == [0.3, 0.5, 0.8]


def test_deciding_loads_no_library(published: Published) -> None:
    code = (
        "import sys; from pathlib import Path; from tilewright.export.build.request import Request;"
        f"[Request(name, None, Path('b'), Path({str(published.folder)!r})).settings for name in ('in-token', 'vicr')];"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "tokenizers", "onnx"} & set(loaded)
