"""Configuration files: what libraries write is read back, their defaults are ours, and what we cannot do is refused."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

from tilewright.export.networks import configs
from tilewright.export.systems.flux.sizes import PRESETS as FLUX_PRESETS
from tilewright.export.systems.instantir.sizes import PRESETS as INSTANTIR_PRESETS
from tilewright.export.systems.toksr.sizes import PRESETS as TOKSR_PRESETS
from tilewright.export.weights.config import HARMLESS, Config, read_config, read_one_of
from tilewright.runtime.errors import InputError

BY_NAME = {name: getattr(configs, name) for name in configs.__all__ if name != "NOISE_SCHEDULERS"}
DIFFUSERS: dict[str, Any] = {
    "FLUX": diffusers.FluxTransformer2DModel,
    "VAE": diffusers.AutoencoderKL,
    "UNET": diffusers.UNet2DConditionModel,
    "REDUX": ReduxImageEncoder,
    "FLOW": diffusers.FlowMatchEulerDiscreteScheduler,
    "EULER": diffusers.EulerDiscreteScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "DDIM": diffusers.DDIMScheduler,
}
TRANSFORMERS: dict[str, Any] = {
    "T5": transformers.T5Config,
    "CLIP_TEXT": transformers.CLIPTextConfig,
    "CLIP_TEXT_PROJECTED": transformers.CLIPTextConfig,
    "CLIP_VISION": transformers.CLIPVisionConfig,
    "SIGLIP": transformers.SiglipVisionConfig,
    "DINOV2": transformers.Dinov2Config,
    "DINOV3": transformers.DINOv3ViTConfig,
}
PROCESSORS: dict[str, Any] = {
    "SIGLIP_PROCESSOR": transformers.SiglipImageProcessor,
    "CLIP_PROCESSOR": transformers.CLIPImageProcessor,
    "BIT_PROCESSOR": transformers.BitImageProcessor,
}
IMPLIED = {"is_decoder", "is_encoder_decoder", "tie_word_embeddings"}  # which every file of transformers may have


def upstream(name: str) -> dict[str, Any]:
    """What the class takes where nothing is said."""
    if name in DIFFUSERS:
        parameters = inspect.signature(DIFFUSERS[name].__init__).parameters
        return {key: p.default for key, p in parameters.items() if key != "self"}
    made: dict[str, Any] = (TRANSFORMERS | PROCESSORS)[name]().to_dict()
    return dict.fromkeys(IMPLIED, False) | made


def plain(value: Any) -> Any:
    return tuple(plain(inner) for inner in value) if isinstance(value, list) else value


def written(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """The file that the library writes."""
    if name in TRANSFORMERS:
        config = TRANSFORMERS[name](**values, architectures=[BY_NAME[name].classes[0]])
        config.save_pretrained(folder)
    elif name in PROCESSORS:
        PROCESSORS[name](**values).save_pretrained(folder)
    elif "SCHEDULER" in name or name in ("FLOW", "EULER", "DDPM", "DDIM"):
        DIFFUSERS[name](**values).save_config(folder)
    else:
        import torch

        with torch.device("meta"):
            DIFFUSERS[name](**values).save_config(folder)
    return folder / BY_NAME[name].file


def ended(text: dict[str, Any]) -> dict[str, Any]:
    return text | {"eos_token_id": text.get("vocab_size", 49408) - 1}


FLOWING = {"shift": 3.0, "use_dynamic_shifting": True}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    *(("FLUX", sizes.transformer) for sizes in FLUX_PRESETS.values()),
    *(("VAE", sizes.vae) for sizes in FLUX_PRESETS.values()),
    *(("T5", sizes.t5) for sizes in FLUX_PRESETS.values()),
    *(("CLIP_TEXT", ended(sizes.clip_text)) for sizes in FLUX_PRESETS.values()),
    *(("CLIP_VISION", sizes.clip_vision) for sizes in FLUX_PRESETS.values()),
    *(("SIGLIP", sizes.siglip) for sizes in FLUX_PRESETS.values()),
    ("REDUX", {}),
    ("REDUX", {"redux_dim": 32, "txt_in_features": 16}),
    *(("UNET", sizes.unet) for sizes in INSTANTIR_PRESETS.values()),
    *(("VAE", sizes.vae) for sizes in INSTANTIR_PRESETS.values()),
    *(("CLIP_TEXT_PROJECTED", ended(sizes.text_2)) for sizes in INSTANTIR_PRESETS.values()),
    *(("DINOV2", sizes.dino) for sizes in INSTANTIR_PRESETS.values()),
    ("DINOV2", {"use_swiglu_ffn": True, "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}),
    *(("CLIP_TEXT", sizes["clip"] | {"eos_token_id": 2}) for sizes in TOKSR_PRESETS.values()),
    ("DINOV3", {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_register_tokens": 4}),
    ("FLOW", FLOWING),
    ("FLOW", FLOWING | {"base_shift": 5.0, "max_shift": 4.5, "base_image_seq_len": 9, "max_image_seq_len": 99}),
    ("EULER", NOISE | {"timestep_spacing": "leading"}),
    ("DDPM", NOISE | {"clip_sample": False}),
    ("DDIM", NOISE | {"clip_sample": False, "set_alpha_to_one": False}),
    ("SIGLIP_PROCESSOR", {"size": {"height": 384, "width": 384}}),
    ("SIGLIP_PROCESSOR", IMAGENET),
    ("CLIP_PROCESSOR", IMAGENET | {"size": {"shortest_edge": 256}}),
    ("CLIP_PROCESSOR", {}),
    ("BIT_PROCESSOR", {"size": {"shortest_edge": 256}} | IMAGENET),
]


@pytest.mark.parametrize("name", BY_NAME)
def test_our_defaults_are_the_librarys(name):
    config, theirs = BY_NAME[name], {key: plain(value) for key, value in upstream(name).items()}
    aliens = {"EULER": {"clip_sample", "set_alpha_to_one", "thresholding"}, "DDPM": {"set_alpha_to_one"}}
    passed_on = upstream("DDIM")  # to which the system hands any scheduler's file
    for key, value in config.defaults.items():
        assert (passed_on if key in aliens.get(name, ()) else theirs)[key] == value, key
    for key, only in config.must.items():
        if key == "do_center_crop" and key not in theirs:
            continue
        default = (passed_on if key in aliens.get(name, ()) else theirs)[key]
        assert (default or None) == (config.silent.get(key, only) or None), key
    assert config.silent.keys() <= config.must.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_every_key_of_the_library_is_accounted_for(name):
    config = BY_NAME[name]
    assert upstream(name).keys() - {*config.defaults, *config.must, *config.moot} - HARMLESS - IMPLIED == set()


@pytest.mark.parametrize("name, values", WRITTEN, ids=lambda v: v if isinstance(v, str) else "")
def test_what_the_library_writes_is_read_back(tmp_path, name, values):
    file = written(tmp_path, name, values)
    if name == "EULER":  # as SDXL's file has it, for the samplers that clip
        file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": False}))
    read = BY_NAME[name].read(tmp_path)
    assert read is not None and read == BY_NAME[name].read(file)
    expected = upstream("DDIM") | upstream(name) | values
    assert read == {key: plain(expected[key]) for key in BY_NAME[name].defaults}


def example(name: str) -> dict[str, Any]:
    """The least that is read: a class, and what must not be silent."""
    config = BY_NAME[name]
    values = {key: config.must[key] for key in config.silent}
    key = "image_processor_type" if "PROCESSOR" in name else "_class_name" if name in DIFFUSERS else "architectures"
    if name == "FLUX":
        values |= {"in_channels": 384, "out_channels": 64}
    if name == "UNET":
        values |= dict(next(sizes for preset, sizes in INSTANTIR_PRESETS.items() if preset == "full").unet)
    if name == "VAE":
        values |= {"shift_factor": None}
    first = config.classes[0]
    return values | {key: [first] if key == "architectures" else first}


def put(folder: Path, name: str, said: Any) -> Path:
    file = folder / BY_NAME[name].file
    file.write_text(said if isinstance(said, str) else json.dumps(said))
    return file


def refusal(folder: Path, name: str, said: Any) -> str:
    file = put(folder, name, said)
    with pytest.raises(InputError) as caught:
        BY_NAME[name].read(folder)
    text = str(caught.value)
    assert text.startswith(f"config {file}: ") and "\n" not in text
    return text.removeprefix(f"config {file}: ")


EACH = [(name, key) for name, config in BY_NAME.items() for key in config.must]


@pytest.mark.parametrize("name, key", EACH)
def test_another_value_of_what_a_graph_assumes_is_refused(tmp_path, name, key):
    put(tmp_path, name, example(name))
    assert BY_NAME[name].read(tmp_path) is not None
    text = refusal(tmp_path, name, example(name) | {key: 7})
    assert text.startswith(f"{key!r} is 7, ")
    if key in BY_NAME[name].silent:
        without = {k: v for k, v in example(name).items() if k != key}
        assert " by default, this graph does only " in refusal(tmp_path, name, without)


@pytest.mark.parametrize("name", BY_NAME)
def test_an_unknown_key_is_refused_unless_it_is_empty(tmp_path, name):
    for value in (None, False, "", [], {}):
        put(tmp_path, name, example(name) | {"some_new_thing": value})
        assert BY_NAME[name].read(tmp_path) is not None
    for value in (True, 1, "projection", [0], {"a": 0}, 0.5):
        text = refusal(tmp_path, name, example(name) | {"some_new_thing": value})
        assert text.startswith(f"'some_new_thing' is {value!r}, which this graph cannot do; give ")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("FLUX", {"num_layers": "19"}, "'num_layers' is '19', where one like 19 belongs; "),
    ("FLUX", {"num_layers": 0}, "'num_layers' is 0, "),
    ("FLUX", {"num_layers": True}, "'num_layers' is True, "),
    ("FLUX", {"num_layers": 1 << 40}, "'num_layers' is 1099511627776, "),
    ("FLUX", {"axes_dims_rope": [16, 56]}, "'axes_dims_rope' [16, 56] are no three even parts of "),
    (
        "FLUX",
        {"in_channels": 64},
        "'in_channels' 64 leave no room for an image and its mask beside 'out_channels' 64: ",
    ),
    ("FLUX", {"in_channels": 128}, "'in_channels' 128 leave no room for an image and its mask beside 'out_channels' "),
    ("VAE", {"scaling_factor": 0.0}, "'scaling_factor' is 0.0, where "),
    ("FLOW", {"max_image_seq_len": 256}, "'base_image_seq_len' 256 is not below 'max_image_seq_len' 256; "),
    ("FLOW", {"base_shift": None}, "'base_shift' is None, where one like 0.5 belongs; "),
    ("FLUX", {"pruned_heads": {"0": [1]}}, "'pruned_heads' is {'0': [1]}, which this graph cannot do; "),
    ("VAE", {"scaling_factor": 0}, "'scaling_factor' is 0, where "),
    ("VAE", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "'down_block_types' is ['AttnDownEncoderBlock2D'], "),
    ("VAE", {"block_out_channels": [32, 64]}, "'block_out_channels' has 2, 'down_block_types' has 1, "),
    ("VAE", {"block_out_channels": []}, "'block_out_channels' is [], "),
    ("VAE", {"block_out_channels": [40]}, "'block_out_channels' 40 do not divide into 'norm_num_groups' 32; "),
    ("T5", {"feed_forward_proj": "gated-tanh"}, "'feed_forward_proj' is 'gated-tanh', this graph can do only relu, "),
    ("T5", {"dense_act_fn": "silu"}, "'dense_act_fn' is 'silu', which 'feed_forward_proj' 'relu' does not mean; "),
    ("CLIP_TEXT", {"eos_token_id": 5}, "'eos_token_id' is 5, where texts end with the last id, 49407; "),
    ("CLIP_TEXT", {"hidden_act": "tanh"}, "'hidden_act' is 'tanh', this graph can do only gelu, "),
    ("CLIP_VISION", {"num_attention_heads": 5}, "'hidden_size' 768 is no multiple of 'num_attention_heads' 5; "),
    ("DINOV2", {"patch_size": 300}, "'image_size' 224 is less than a 'patch_size' 300; "),
    ("UNET", {"class_embed_type": "projection"}, "'class_embed_type' is 'projection', this graph does only None; "),
    (
        "UNET",
        {"transformer_layers_per_block": [2, 1]},
        "'transformer_layers_per_block' is neither a number nor a list ",
    ),
    ("UNET", {"attention_head_dim": 7}, "'block_out_channels' 320 do not divide into 'attention_head_dim' 7; "),
    ("UNET", {"up_block_types": 3 * ["AttnUpBlock2D"]}, "'up_block_types' is ['AttnUpBlock2D', "),
    ("CLIP_PROCESSOR", {"size": {"height": 9, "width": 9}}, "'size' {'height': 9, 'width': 9} and 'crop_size' "),
    ("CLIP_PROCESSOR", {"crop_size": 256}, "'crop_size' {'height': 256, 'width': 256} is larger than 'size' "),
    ("SIGLIP_PROCESSOR", {"image_mean": [0.5]}, "'image_mean' [0.5] does not fit three channels; "),
    ("CLIP_PROCESSOR", {"image_std": [0.5, 0.5, 0]}, "'image_std' "),
    ("BIT_PROCESSOR", {"image_std": [0.2, 0.2]}, "'image_std' [0.2, 0.2] does not fit three channels; "),
    ("SIGLIP_PROCESSOR", {"size": {"height": 9, "width": 8}}, "'size' {'height': 9, 'width': 8} and "),
]


@pytest.mark.parametrize("name, change, complaint", WRONG)
def test_values_that_cannot_be_meant_are_refused_by_name(tmp_path, name, change, complaint):
    assert refusal(tmp_path, name, example(name) | change).startswith(complaint)


def test_the_file_itself_must_be_json_and_of_the_class(tmp_path):
    assert configs.VAE.read(tmp_path) is None and configs.VAE.read(tmp_path / "config.json") is None
    assert refusal(tmp_path, "VAE", "{").startswith("not valid JSON (")
    assert refusal(tmp_path, "VAE", '{"a": NaN}').startswith("not valid JSON (NaN is no number); copy it again")
    assert refusal(tmp_path, "VAE", "[" * 100_000).startswith("not valid JSON (")
    assert refusal(tmp_path, "VAE", [1]) == "holds [1], not an object; copy it again"
    other = "is of class UNet2DConditionModel, expected is AutoencoderKL; is this the right folder?"
    assert refusal(tmp_path, "VAE", example("UNET")) == other
    assert refusal(tmp_path, "T5", {"architectures": ["BertModel"]}).startswith("is of class BertModel, expected is T5")
    assert refusal(tmp_path, "T5", {"d_model": 1}).startswith("names no class, expected is T5EncoderModel or ")
    assert refusal(tmp_path, "T5", {"architectures": 3, "model_type": "t5"}).startswith("names no class, ")
    put(tmp_path, "T5", {"model_type": "t5", "architectures": None})
    assert configs.T5.read(tmp_path) == configs.T5.defaults
    assert read_config(tmp_path / "config.json", ("t5",))["model_type"] == "t5"
    huge = example("VAE") | {"scaling_factor": "X"}
    assert refusal(tmp_path, "VAE", json.dumps(huge).replace('"X"', "1e999")).startswith("'scaling_factor' is inf, ")


@pytest.mark.parametrize("name", ["CLIP_TEXT", "CLIP_VISION", "SIGLIP"])
def test_a_tower_is_read_out_of_the_model_around_it(tmp_path, name):
    config: Config = BY_NAME[name]
    whole: Any = transformers.SiglipConfig if name == "SIGLIP" else transformers.CLIPConfig
    tower = {"hidden_size": 36, "num_attention_heads": 3}
    made = whole(**{config.inner: tower}, architectures=[config.wrappers[0]])
    made.save_pretrained(tmp_path)
    assert config.read(tmp_path) == config.defaults | tower
    said = json.loads((tmp_path / "config.json").read_text())
    said[config.inner] |= {"rotary": True}
    assert refusal(tmp_path, name, said).startswith("'rotary' is True, which this graph cannot do; ")
    assert refusal(tmp_path, name, {"architectures": [config.wrappers[0]]}).startswith(f"holds no {config.inner!r}; ")


# text_config of openai/clip-vit-large-patch14-336, as an old library wrote it
OLD: dict[str, Any] = {
    **dict.fromkeys(("_name_or_path",), ""),
    **dict.fromkeys(("add_cross_attention", "do_sample", "early_stopping", "is_decoder", "is_encoder_decoder"), False),
    **dict.fromkeys(("architectures", "bad_words_ids", "cross_attention_hidden_size", "decoder_start_token_id"), None),
    **dict.fromkeys(("finetuning_task", "forced_bos_token_id", "prefix", "problem_type", "torch_dtype"), None),
    **{"attention_dropout": 0.0, "bos_token_id": 0, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0},
    **{"dropout": 0.0, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "hidden_act": "quick_gelu"},
    **{"hidden_size": 768, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0},
    **{"initializer_range": 0.02, "intermediate_size": 3072, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20, "max_position_embeddings": 77},
    **{"min_length": 0, "model_type": "clip_text_model", "no_repeat_ngram_size": 0, "num_attention_heads": 12},
    **{"num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 12, "num_return_sequences": 1, "pad_token_id": 1},
    **{"projection_dim": 768, "pruned_heads": {}, "repetition_penalty": 1.0, "return_dict": True},
    **{"temperature": 1.0, "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0, "torchscript": False},
    **{"transformers_version": "4.16.0.dev0", "typical_p": 1.0, "vocab_size": 49408},
}


def test_files_of_old_libraries_are_read(tmp_path):
    put(tmp_path, "CLIP_TEXT", {"model_type": "clip", "text_config": OLD, "projection_dim": 768})
    read = configs.CLIP_TEXT.read(tmp_path)
    assert read == {key: OLD[key] for key in configs.CLIP_TEXT.defaults}
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    pixels |= {"image_mean": mean, "image_std": deviation, "feature_extractor_type": "CLIPFeatureExtractor"}
    put(tmp_path, "CLIP_PROCESSOR", pixels | {"size": 224, "crop_size": 224})
    assert configs.CLIP_PROCESSOR.read(tmp_path) == configs.CLIP_PROCESSOR.defaults


def test_a_schedulers_file_is_read_as_the_class_that_it_names(tmp_path):
    assert read_one_of(configs.NOISE_SCHEDULERS, tmp_path) is None
    sdxl = NOISE | {"clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000}
    sdxl |= {"prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
    sdxl |= {"timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}
    put(tmp_path, "EULER", {"_class_name": "EulerDiscreteScheduler"} | sdxl)
    assert read_one_of(configs.NOISE_SCHEDULERS, tmp_path) == NOISE | {"set_alpha_to_one": False}
    put(tmp_path, "EULER", {"_class_name": "LCMScheduler"} | sdxl)
    with pytest.raises(InputError, match="of class LCMScheduler, expected is EulerDiscreteScheduler or DDPMScheduler"):
        read_one_of(configs.NOISE_SCHEDULERS, tmp_path)


def test_reading_loads_no_library():
    code = "import sys, tilewright.export.networks.configs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers"} & set(loaded)
