"""HiTokSR of a size that no preset has: from files to sizes, networks and a picture; and what files may not say."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from support.eager import eager_engines
from support.hitoksr import Textbook, stem_by_name, tokens
from support.pages import assert_flags_exist, page, run_commands
from support.programs import assert_stored
from support.systems import decided, user_files
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.networks.hitoksr import Decode, Generate, HiTokConfig
from tilewright.export.system import Settings
from tilewright.export.systems import system
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.errors import InputError, UsageError

HITOKSR = system("hitoksr")
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_register_tokens": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-3,
    "rope_theta": 50.0,
    "key_bias": True,
    "use_gated_mlp": True,
}
SIZES = {
    "dim": 48,
    "heads": 3,
    "depth": 2,
    "mlp_dim": 40,
    "patch_px": 4,
    "groups": 3,
    "codes": 11,
    "code_dim": 5,
    "stem": [6, 9, 12],
    "stem_blocks": 2,
    "stem_norm_groups": 3,
    "class_layers": [1, 3],
    "tile_px": 40,
    "overlap_px": 8,
}
CONFIG = {"_class_name": "HiTokSR", **SIZES}
OUR_FILE, EYE = "hitoksr.safetensors", "dinov3-small"
TOLD = ("heads", "stem_norm_groups", "class_layers", "tile_px")  # sizes that no shape shows


def networks() -> tuple[Generate, Decode]:
    """Both halves with weights of order one."""
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if not name.endswith("_px") or name == "patch_px"}
    config = HiTokConfig(**sizes, vision=VISION)
    halves = Generate(config).eval(), Decode(config).eval()
    for parameter in (p for half in halves for p in half.parameters()):
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    return halves


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of HiTokSR's file and DINOv3's, each with its configuration; do not change it."""
    folder = tmp_path_factory.mktemp("hitoksr")
    generate, decode = networks()
    generate.vision.vfm.save_pretrained(folder / EYE)
    state = {**generate.state_dict(), **decode.state_dict()}
    save_file({name: t for name, t in state.items() if not name.startswith("vision.")}, folder / OUR_FILE)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def files(published: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    for file in (file for file in published.rglob("*") if file.is_file()):
        copy = tmp_path / file.relative_to(published)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path


def settings_of(folder: Path, preset: str | None = None, **options: object) -> Settings:
    return decided(HITOKSR, user_files({"hitoksr": folder}), preset, **options)


def rewrite(path: Path, **changes: object) -> None:
    """Change a configuration file; None takes a key out."""
    path.parent.mkdir(exist_ok=True)
    said = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


def test_the_stored_program_is_the_one_of_the_full_preset() -> None:
    assert_stored("hitoksr", HITOKSR, decided(HITOKSR, user_files({})))


def test_sizes_and_tiles_are_those_of_the_files(published: Path) -> None:
    settings = settings_of(published)
    assert {name: settings.sizes[name] for name in SIZES} == SIZES
    assert {name: settings.sizes["vision"][name] for name in VISION} == VISION
    (restore,) = HITOKSR.program(settings).passes
    assert restore.tiles is not None and (restore.tiles.px, restore.tiles.overlap_px) == (40, 8)
    assert HITOKSR.program(settings).multiple_px == 4
    assert Settings.from_json(settings.to_json()) == settings


def test_no_library_of_networks_is_loaded_for_sizes(published: Path) -> None:
    code = "import sys, pathlib; from tilewright.export.build.request import Request; place = pathlib.Path(sys.argv[1])"
    code += "; Request('hitoksr', None, place / 'b', place).settings; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(published)], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "diffusers", "tokenizers"} & set(done.stdout.split())


def test_the_eye_is_the_published_class_of_the_same_configuration(published: Path) -> None:
    files = user_files({"hitoksr": published})
    network = eager_engines(HITOKSR, decided(HITOKSR, files), files.tensors)["generate"].network
    bare = DINOv3ViTModel.from_pretrained(published / EYE).eval()
    assert {name: getattr(bare.config, name) for name in VISION} == VISION
    pixels = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bare(pixels, output_hidden_states=True)
        patches, class_tokens = network.vision(pixels)
        seen = torch.stack([bare.norm(expected.hidden_states[layer][:, 0]) for layer in (1, 3)], 1)
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(class_tokens, seen, rtol=0, atol=1e-5)


def textbook_picture(folder: Path, image: np.ndarray) -> np.ndarray:
    """The specification in float64 for pixels [3, H, W] in [0, 1], without one of our networks."""
    state = {name: t.double() for name, t in load_file(folder / OUR_FILE).items()}
    config = HiTokConfig(**{n: s for n, s in SIZES.items() if n not in ("tile_px", "overlap_px")}, vision=VISION)
    rows, columns = image.shape[1] // 4, image.shape[2] // 4
    torch.set_default_dtype(torch.float64)
    try:
        bare = DINOv3ViTModel(DINOv3ViTConfig(**VISION)).eval()
        bare.load_state_dict(
            {n: t.double() for n, t in DINOv3ViTModel.from_pretrained(folder / EYE).state_dict().items()}
        )
        pixels = torch.from_numpy(image[None])
        mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            seen = bare((pixels - mean) / deviation, output_hidden_states=True)
            classes = [bare.norm(seen.hidden_states[layer][:, :1]).numpy() for layer in (1, 3)]
            part = {n.removeprefix("generator."): t for n, t in state.items() if n.startswith("generator.")}
            features = tokens(stem_by_name(part, config, pixels * 2 - 1))
    finally:
        torch.set_default_dtype(torch.float32)
    book = Textbook(Holding(part), config)
    x = np.concatenate([*(book.linear(c, f"cls.{i}") for i, c in enumerate(classes)), features], 1)
    x = book.blocks(x, config.depth, columns, seen.last_hidden_state[:, 3:].numpy())
    best = book.linear(book.rms_norm(x[:, 2:], "norm"), "head").reshape(rows * columns, 3, 11).argmax(-1)
    codebook = state["quantizer.codebook"].numpy()
    codes = np.stack([np.concatenate([codebook[g, best[n, g]] for g in range(3)]) for n in range(rows * columns)])
    book = Textbook(
        Holding({n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}), config
    )
    values = book.linear(book.rms_norm(book.blocks(book.linear(codes[None], "embed"), 2, columns), "norm"), "out")
    picture = values.reshape(rows, columns, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(image.shape[1], image.shape[2], 3)
    return np.clip((picture + 1) / 2, 0, 1)


class Holding:
    """Tensors as a network's."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


@pytest.mark.slow
def test_a_bundle_of_such_files_restores_as_the_specification_does(
    cache: Path, published: Path, tmp_path: Path
) -> None:
    build(Request("hitoksr", None, tmp_path / "bundle", published, verify="never"))
    small = sample_photo(10, 9, 1)
    with load(tmp_path / "bundle", threads=1) as restorer:
        ours = restorer(small)
    large = np.asarray(Image.fromarray(small).resize((40, 36), Image.Resampling.BICUBIC))
    expected = textbook_picture(published, large.transpose(2, 0, 1) / 255)
    assert np.abs(ours - 255 * expected).max() <= 0.51
    assert expected.std() > 0.05


def test_shapes_decide_where_there_is_no_configuration(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    for config in files.rglob("config.json"):
        config.unlink()
    options = {"heads": 3, "vision_heads": 2, "stem_norm_groups": 3, "class_layers": [1, 3], "tile_px": 40}
    with caplog.at_level(logging.WARNING, "tilewright"):
        settings = settings_of(files, **options)
    silent = ("hidden_act", "layer_norm_eps", "rope_theta")
    expected = {**VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0}
    assert {name: settings.sizes["vision"][name] for name in VISION} == expected
    assert {name: settings.sizes[name] for name in SIZES} == SIZES | {"overlap_px": 4}  # an eighth, on whole patches
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all(f"{name} " in said[0] for name in silent) and "using overlap_px 4" in said[1]


def test_what_shapes_do_not_show_is_named_with_its_options(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    (files / "config.json").unlink()
    with caplog.at_level(logging.WARNING, "tilewright"), pytest.raises(InputError, match="32 do not divide"):
        settings_of(files)
    (line,) = (record.message for record in caplog.records)
    assert "heads 12, stem_norm_groups 32, class_layers [1, 3], tile_px 512, overlap_px 64" in line
    assert "give --heads, --stem-norm-groups, --class-layers, --tile-px, --overlap-px if they differ" in line


def test_a_configuration_may_leave_out_what_shapes_show_and_hold_the_eye(files: Path) -> None:
    before = settings_of(files)
    eye = json.loads((files / EYE / "config.json").read_text())
    (files / EYE / "config.json").unlink()
    inner = {name: value for name, value in eye.items() if name != "architectures"}
    said = {"_class_name": "HiTokSR", "vision": inner, **{name: SIZES[name] for name in TOLD}, "overlap_px": 8}
    (files / "config.json").write_text(json.dumps(said))
    assert settings_of(files) == before


def test_a_licence_that_the_configuration_names_is_the_bundles(files: Path) -> None:
    rewrite(files / "config.json", licence="MIT")
    assert Request("hitoksr", None, files / "b", files).licence == "MIT"


OURS, THEIRS = "config.json", f"{EYE}/config.json"
REFUSED = {  # file and what is changed in it, what is said
    "another width": (OURS, {"dim": 96}, "'dim' is 96, in weights", "it is 48; give files that belong together"),
    "another stem": (OURS, {"stem": [6, 9, 24]}, "'stem' is [6, 9, 24], in weights", "it is [6, 9, 12]"),
    "another eye": (THEIRS, {"hidden_size": 48}, f"{EYE}/config.json: 'hidden_size' is 48, in weights"),
    "silent on registers": (THEIRS, {"num_register_tokens": None}, "'num_register_tokens' is 0, in weights"),
    "no colours": (THEIRS, {"num_channels": 1}, "'num_channels' is 1, this graph does only 3"),
    "an unknown activation": (THEIRS, {"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
    "an unknown key": (OURS, {"window": 8}, "'window' is 8, which this graph cannot do"),
    "no number": (OURS, {"heads": "three"}, "'heads' is 'three', where one like 12 belongs"),
    "another class": (OURS, {"_class_name": "SwinIR"}, "is of class SwinIR, expected is HiTokSR or DINOv3ViTModel"),
    "two of ours": (
        "more/config.json",
        CONFIG,
        "config of HiTokSR: ",
        "config.json describe the same network; keep one",
    ),
    "two eyes": (OURS, {"vision": VISION}, "config of DINOv3: ", "describe the same network"),
    "heads that do not fit": (
        OURS,
        {"heads": 5},
        "5 heads do not cut a width of 48 into equal parts of a multiple of 4",
    ),
    "heads that turn badly": (
        OURS,
        {"heads": 8},
        "8 heads do not cut a width of 48 into equal parts of a multiple of 4",
    ),
    "norms that do not fit": (OURS, {"stem_norm_groups": 4}, "4 do not divide the stem's channels [6, 9, 12]"),
    "too many class tokens": (OURS, {"class_layers": [1, 2, 3]}, "[1, 2, 3] are 3, the generator reads 2"),
    "a layer that is not": (OURS, {"class_layers": [1, 4]}, "[1, 4] are not rising numbers from 1 to DINOv3's 3"),
    "layers in disorder": (OURS, {"class_layers": [3, 1]}, "[3, 1] are not rising numbers from 1 to DINOv3's 3"),
    "tiles off the grid": (OURS, {"tile_px": 42}, "tiles of 42 px with an overlap of 8 are no multiples of 4 px"),
    "tiles that share too much": (OURS, {"overlap_px": 24}, "tiles of 40 px with an overlap of 24"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_configurations_may_not_say_is_refused(files: Path, case: tuple[str, dict[str, object], str]) -> None:
    file, changes, *parts = case
    rewrite(files / file, **changes)
    with pytest.raises(InputError) as error:
        settings_of(files)
    assert all(part in str(error.value) for part in parts) and str(error.value).isprintable(), error.value


@pytest.mark.parametrize(
    ("preset", "options", "part"),
    [
        ("tiny", {}, "preset 'tiny' has patch_size 16, config"),
        (None, {"heads": 4}, "--heads 4: config"),
        (None, {"vision_heads": 3}, "--vision-heads 3: config"),
        (None, {"tile_px": 80}, "--tile-px 80: config"),
    ],
)
def test_what_arguments_say_against_the_files_is_refused(published, preset, options, part) -> None:
    with pytest.raises(UsageError) as error:
        settings_of(published, preset, **options)
    assert part in str(error.value) and "; leave --" in str(error.value)


def test_files_of_another_network_are_told_by_what_they_hold(files: Path) -> None:
    save_file({"layers.0.weight": torch.ones(2), "head.weight": torch.ones(3)}, files / OUR_FILE)
    with pytest.raises(InputError, match=r"lacks 'generator.*and holds .*; give HiTokSR's files; docs/hitoksr.md"):
        settings_of(files)


def test_a_list_of_layers_is_read_from_the_command() -> None:
    assert HITOKSR.options["class_layers"].kind("3,6,9") == [3, 6, 9]
    with pytest.raises(UsageError, match="'3;6' is not a list of layers; write 3,6,9,12"):
        HITOKSR.options["class_layers"].kind("3;6")


@pytest.mark.slow
def test_the_pages_commands_run_on_such_files(
    cache: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hitoksr").symlink_to(published)
    Image.fromarray(sample_photo(10, 9, 1)).save("in.png")
    assert run_commands(page("hitoksr"), {"build": ("--verify", "never")}) == 3
    assert Image.open("out.png").size == (40, 36)


def test_the_page_names_options_that_exist_all_keys_and_the_tensors(published: Path) -> None:
    text = page("hitoksr")
    assert_flags_exist(text, HITOKSR.program(settings_of(published)))
    assert all(f"`{key}`" in text for key in (*CONFIG, "vision", "licence"))
    parts = {name.split(".")[0] for name in load_file(published / OUR_FILE)}
    leaves = {name.split(".")[-2] for name in load_file(published / OUR_FILE)} - {"quantizer"}
    assert all(f"`{part}." in text for part in parts)
    assert not [leaf for leaf in leaves if not leaf.isdigit() and not re.search(rf"[.`]{leaf}[.`]", text)]
