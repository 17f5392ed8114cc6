"""TokSR end to end from files as published, against PyTorch's own blocks and diffusers' scheduler, tile by tile."""

import importlib.util
import math
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.cli import main
from tilewright.export.graph.trace import parameter_specs
from tilewright.export.systems import toksr
from tilewright.export.tokenizers import put, stand_in_clip
from tilewright.export.verify.engines import sample_photo
from tilewright.runtime import load
from tilewright.runtime.check import check
from tilewright.runtime.noise import normal
from tilewright.runtime.program import Signature
from tilewright.runtime.scheduler import Job, run
from tilewright.runtime.text import encode
from tilewright.runtime.tiles import plan, weights

SMALL = {"width": 32, "layers": 2, "heads": 2}
TINY = {"image": 32, "patch": 8, "latents": 4, "token": 4, "words": 8, "text_width": 16, "scale": 0.7525, "without": ()}
TINY |= {"encoder": SMALL | {"text": True}, "decoder": SMALL, "dit": SMALL}
TA_TITOK = TINY | {"encoder": SMALL | {"text": False}, "without": ("encoder.text_guidance",)}
OTHER = TINY | {"image": 24, "patch": 4, "latents": 5, "token": 3, "dit": {"width": 128, "layers": 1, "heads": 2}}
OTHER |= {"encoder": SMALL | {"layers": 3, "text": False}, "decoder": {"width": 64, "layers": 1, "heads": 1}}
OTHER |= {"without": ("encoder.text_guidance", "attn.out.", "cross.out.")}
FULL = TA_TITOK | {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768}
FULL |= {"encoder": {"width": 768, "layers": 12}, "decoder": {"width": 1024, "layers": 24}}
FULL |= {"dit": {"width": 768, "layers": 12}}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_TEXT = CLIP | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 62, "eos_token_id": 2}
WORDS, BOS, EOS, SEED, GUIDANCE = "a cab", 62, 63, 5, 3.0
# name -> the files' sizes and the options of the build; any two choices of a step in every combination
BUNDLES = {
    "default": (TINY, {}),
    "all77": (TA_TITOK, {"text_mode": "all77", "guidance": GUIDANCE}),
    "x0": (TA_TITOK, {"prediction": "x0", "guidance": GUIDANCE, "prompt": WORDS}),
    "all77 x0": (TINY, {"text_mode": "all77", "prediction": "x0"}),
    "other": (OTHER, {"guidance": GUIDANCE}),
    "one": (TINY, {"batch": 1}),
    "three": (TINY, {"batch": 3}),
}
# Name and shape of every tensor of the files; + is a weight and its bias, w a part's width
HALF = "class_embedding 1 w, positional_embedding cells w, latent_token_positional_embedding latents w, ln_pre+ w"
HALF += ", ln_post+ w, text_guidance_proj+ w text_width, text_guidance_positional_embedding words w, "
MLP = "ln_1+ w, ln_2+ w, mlp.c_fc+ 4w w, mlp.c_proj+ w 4w, "
BLOCK = f"{MLP}attn.in_proj_weight 3w w, attn.in_proj_bias 3w, attn.out_proj+ w w"
DIT = "embed+ w token, positions.weight latents w, time.0+ w 256, time.2+ w w, label+ w text_width, condition_norm+ w"
DIT_BLOCK = "ln_3+ w, attn.qkv.weight 3w w, attn.out+ w w, cross.q.weight w w, cross.kv.weight 2w w, cross.out+ w w"
PARTS = {
    "encoder": (f"{HALF}patch_embed+ w 3 patch patch, conv_out+ moments w 1 1", "transformer", BLOCK),
    "decoder": (
        f"{HALF}decoder_embed+ w token, mask_token 1 1 w, ffn.0+ pixels w 1 1, conv_out+ 3 3 3 3",
        "transformer",
        BLOCK,
    ),
    "dit": (f"{DIT}, out+ token w", "blocks", f"{MLP}{DIT_BLOCK}"),
}


def shapes_of(sizes, *parts):
    shapes = {"latent_tokens": (sizes["latents"], sizes["encoder"]["width"])} if "encoder" in parts else {}
    for part in parts:
        w, (table, name, block) = sizes[part]["width"], PARTS[part]
        known = sizes | {"w": w, "2w": 2 * w, "3w": 3 * w, "4w": 4 * w, "moments": 2 * sizes["token"]}
        known |= {"cells": (sizes["image"] // sizes["patch"]) ** 2 + 1, "pixels": 3 * sizes["patch"] ** 2}
        rows = [f"{name}.{i}.{row}" for i in range(sizes[part]["layers"]) for row in block.split(", ")]
        for tensor, *row in map(str.split, [*table.split(", "), *rows]):
            shape = tuple(known[size] if size in known else int(size) for size in row)
            pair = {f"{tensor[:-1]}.weight": shape, f"{tensor[:-1]}.bias": shape[:1]}
            shapes |= {f"{part}.{n}": s for n, s in (pair if tensor[-1] == "+" else {tensor: shape}).items()}
    return {n: s for n, s in shapes.items() if not any(absent in n for absent in sizes["without"])}


def tensors(shapes):
    """Of order one behind every layer, norms and biases beside what they start as."""
    made = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        made[name] = drawn / (drawn[0].numel() ** 0.5 if len(shape) in (2, 4) else 1)
        made[name] = 0.1 * drawn + (not name.endswith("bias")) if len(shape) == 1 else made[name]
    return made


@cache
def clip():
    """Both towers of a CLIP, as transformers holds them."""
    vision = CLIP | {"image_size": 28, "patch_size": 14}
    made = CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=16)).eval()
    shapes = {name: tuple(t.shape) for name, t in made.state_dict().items() if t.is_floating_point()}
    made.load_state_dict(tensors(shapes), strict=False)
    return made


def written(folder, sizes):
    """The three things a user gives."""
    put(folder / "clip", stand_in_clip(64))
    torch.save(tensors(shapes_of(sizes, "encoder", "decoder")), folder / "tatitok_bl32_vae.bin")
    towers = {name: t.contiguous() for name, t in clip().state_dict().items()}
    assert {"text_model.final_layer_norm.bias", "vision_model.post_layernorm.bias", "logit_scale"} <= towers.keys()
    positions = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    save_file(towers | positions, folder / "clip" / "model.safetensors")
    save_file(tensors(shapes_of(sizes, "dit")), folder / "dit.safetensors")
    given = {"tokenizer": "tatitok_bl32_vae.bin", "clip": "clip", "dit": "dit.safetensors"}
    return {name: str(folder / file) for name, file in given.items()}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """No gradients, and one thread: for tensors as small as these, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundles(cache, tmp_path_factory):
    """A bundle of those above, built when it is first asked for; do not change it."""
    root, given, made = tmp_path_factory.mktemp("toksr"), {}, {}

    def built(name):
        sizes, options = BUNDLES[name]
        kind = f"{sizes['image']} {sizes['encoder']['text']}"
        given[kind] = given.get(kind) or written(root / kind, sizes)
        if name not in made:
            build(Request("toksr", "tiny", root / name, verify="never", given=given[kind] | options))
            made[name] = root / name
        return made[name]

    return built


# The reference: PyTorch's own blocks in float64, which lie beside another test

SPEC = importlib.util.spec_from_file_location("blocks", Path(__file__).parents[1] / "networks" / "test_toksr.py")
blocks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(blocks)


class Canvas:
    """An image as it is."""

    def __init__(self, photo):
        self.planes = photo.transpose(2, 0, 1).astype(np.float32) / 255
        self.shape = self.planes.shape

    def crop(self, top, left, height, width):
        return np.ascontiguousarray(self.planes[:, top : top + height, left : left + width])


def ids_of(words):
    """Letters are the ids 0 to 25, and at the end of a word 26 more."""
    inner = [ord(letter) - 97 + 26 * (i == len(word) - 1) for word in words.split() for i, letter in enumerate(word)]
    return [BOS, *inner, EOS, *[0] * 8][:8]


def network(sizes, part):
    held = tensors(shapes_of(sizes, part))
    return SimpleNamespace(state_dict=lambda: held, latent_tokens=held.get("latent_tokens"))


def eager(name, image):
    """Every step's tokens, all tiles of a step together, and the picture."""
    sizes, options = BUNDLES[name]
    text = clip().text_model(torch.tensor([ids_of(WORDS)])).last_hidden_state
    label = (text[0] if options.get("text_mode") == "all77" else text[:, ids_of(WORDS).index(EOS)]).double()
    tiling = plan(*image.shape[:0:-1], sizes["image"], 8, sizes["patch"])
    tiles = torch.from_numpy(np.stack([image.crop(t.top, t.left, t.height, t.width) for t in tiling.tiles]))
    told = text if sizes["encoder"]["text"] else None
    condition = blocks.tokens_of(network(sizes, "encoder"), sizes, tiles, told)
    kind = {"eps": "epsilon", "x0": "sample"}[options.get("prediction", "eps")]
    scheduler = DDIMScheduler(1000, 1e-4, 2e-2, "linear", None, False, True, 0, kind)  # no clipping, alpha 1, offset 0
    scheduler.set_timesteps(25)
    draw = partial(normal, SEED, stream=0, channels=sizes["token"], top=0, left=0, height=1, width=sizes["latents"])
    z = torch.from_numpy(np.stack([draw(region=1 + tile.index) for tile in tiling.tiles])).double()
    blocks.SMALL = sizes["dit"]  # where its denoiser looks for the number of blocks
    denoiser = blocks.Denoiser(network(sizes, "dit"), sizes["dit"]["heads"])
    guidance, path = options.get("guidance", 1.0), []
    for t in scheduler.timesteps.tolist():
        without, answer = (
            torch.stack([denoiser(*pair, t, given) for pair in zip(z, condition, strict=True)])
            for given in (torch.zeros_like(label), label)
        )
        z = scheduler.step(without + guidance * (answer - without), t, z).prev_sample
        path.append(z.numpy())
    parts = blocks.picture_of(network(sizes, "decoder"), sizes, z, text).numpy()
    (rows, columns), whole = weights(tiling, 1), np.zeros(image.shape)
    for tile, part in zip(tiling.tiles, parts, strict=True):
        row, column = divmod(tile.index, len(tiling.lefts))
        rectangle = (slice(None), slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width))
        whole[rectangle] += part * rows[row][:, None] * columns[column]
    return path, whole


# Ours


class Counting:
    """An engine that keeps what it is given and what it gives."""

    def __init__(self, engine):
        self.engine, self.fed, self.made = engine, [], []

    def run(self, inputs, wanted):
        outputs = self.engine.run(inputs, wanted)
        self.fed.append(inputs)
        self.made.append(outputs)
        return outputs


@contextmanager
def counted(bundle):
    with load(bundle, threads=1) as restorer:
        yield restorer, {name: Counting(restorer.engines[name]) for name in restorer.engines}


def walked(bundle, image, workers=1):
    with counted(bundle) as (restorer, engines):
        ids = encode(bundle / "tokenizers" / "clip.json", WORDS, 8)
        job = Job(image, seed=SEED, inputs={"ids": ids}, workers=workers)
        return run(restorer.bundle.program, engines, restorer.constants, job), engines


def rounds(bundle, *asked):
    """A picture restored with these inputs, one after another; the ids, the text's outputs and the results."""
    with counted(bundle) as (restorer, engines):
        sitting = restorer.sitting(sample_photo(8, 8, 1), seed=SEED, steps=1)
        sitting.walk.engines = engines
        made = [sitting(**inputs) for inputs in asked]
    return [feed["ids"][0].tolist() for feed in engines["text"].fed], engines["text"].made, made


def distance(ours, expected):
    assert ours.shape == expected.shape
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("name", ["default", "all77", "x0", "all77 x0", "other"])
def test_the_whole_trajectory_and_the_picture_are_those_of_pytorchs_blocks(bundles, name, tiles):
    side = BUNDLES[name][0]["image"]
    image = Canvas(sample_photo(*((side, side) if tiles == 1 else (2 * side - 8, side + 8)), 1))  # a row is shifted
    path, expected = eager(name, image)
    ours, engines = walked(bundles(name), image)
    assert {n: len(e.made) for n, e in engines.items()} == {"text": 1, "tokenise": 1, "step": 25, "detokenise": 1}
    for outputs, tokens in zip(engines["step"].made, path, strict=True):
        assert len(tokens) == tiles
        assert distance(outputs["tokens_next"], tokens) <= 1e-4
    assert 10 * math.log10(1 / np.mean((ours - expected) ** 2)) >= 80
    assert expected.std() > 0.05


@pytest.mark.parametrize("workers", [1, 2])
def test_tiles_are_private_whatever_the_batch_and_the_workers(bundles, workers):
    image = Canvas(sample_photo(56, 56, 1))
    whole, _ = walked(bundles("default"), image)
    for name, batches in {"default": [4], "three": [1, 3], "one": [1, 1, 1, 1]}.items():
        picture, engines = walked(bundles(name), image, workers)
        assert np.abs(picture - whole).max() <= 1e-6
        assert len(engines["text"].made) == 1
        for component, each in {"tokenise": 1, "step": 25, "detokenise": 1}.items():
            sizes = Counter(len(next(iter(outputs.values()))) for outputs in engines[component].made)
            assert sizes == {size: each * count for size, count in Counter(batches).items()}


@pytest.mark.parametrize(("width", "height"), [(5, 3), (13, 9)])
def test_a_picture_of_any_size_is_padded_and_cut(bundles, width, height):
    picture = sample_photo(width, height, 1)
    large = np.asarray(Image.fromarray(picture).resize((4 * width, 4 * height), Image.Resampling.BICUBIC))
    for axis, side in ((0, 4 * height), (1, 4 * width)):  # to whole patches, and to a tile at least
        more = -(-max(side, 32) // 8) * 8 - side
        large = np.pad(large, [(0, more * (a == axis)) for a in range(3)], "reflect" if more < side else "edge")
    _, expected = eager("default", Canvas(large))
    with load(bundles("default"), threads=1) as restorer:
        ours = restorer(picture, seed=SEED, inputs={"prompt": WORDS})
    assert ours.shape == (4 * height, 4 * width, 3)
    assert np.abs(ours - 255 * expected.transpose(1, 2, 0)[: 4 * height, : 4 * width]).max() <= 0.51


def test_ids_are_padded_with_zeros_and_every_position_is_read(bundles):
    ids, texts, made = rounds(bundles("default"), {}, {"prompt": WORDS}, {"prompt": "abcdefghijk"})
    assert ids[0] == [BOS, EOS, 0, 0, 0, 0, 0, 0]  # the default is no words
    assert ids[1] == [BOS, 26, 2, 0, 27, EOS, 0, 0] == ids_of(WORDS)
    assert ids[2] == [BOS, 0, 1, 2, 3, 4, 5, EOS]
    states = clip().text_model(torch.tensor(ids)).last_hidden_state.numpy()
    for outputs, expected, of in zip(texts, states, ids, strict=True):
        assert distance(outputs["words"][0], expected) <= 1e-5
        assert distance(outputs["pooled"][0], expected[of.index(EOS)]) <= 1e-5
    assert len({picture.tobytes() for picture in made}) == 3


def test_words_and_guidance_of_the_build_are_the_defaults(bundles):
    asked = {}, {"prompt": "a"}, {"prompt": WORDS, "guidance": GUIDANCE}, {"guidance": 1.0}
    ids, _, (default, other, same, weak) = rounds(bundles("x0"), *asked)
    assert ids == [ids_of(WORDS), ids_of("a"), ids_of(WORDS)]  # the last round has the words of the one before
    assert np.array_equal(default, same)
    assert not np.array_equal(default, other) and not np.array_equal(default, weak)


# Sizes


def test_the_parameters_of_the_full_preset_are_the_published_ones():
    held = {"tokenizer": {}, "dit": {}, "text_encoder": {}}
    for component, source in toksr.components("full", **toksr.settings("full", {}, {})).items():
        for parameter, spec in parameter_specs(source).items():
            place, name = held[toksr.origin(component, parameter)], toksr.keys(component, parameter)[0]
            assert name not in place  # no tensor is two parameters
            place[name] = tuple(spec.shape)
    assert held["tokenizer"] == shapes_of(FULL, "encoder", "decoder")
    assert held["dit"] == shapes_of(FULL, "dit")
    assert held["tokenizer"]["decoder.ffn.0.weight"] == (768, 1024, 1, 1)
    millions = {name: round(sum(map(math.prod, shapes.values())) / 1e6, 1) for name, shapes in held.items()}
    assert (millions["tokenizer"], millions["dit"]) == (390.2, 114.8)
    with torch.device("meta"):
        config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        towers = CLIPModel(CLIPConfig(text_config=config)).state_dict()
    assert held["text_encoder"] == {n: tuple(t.shape) for n, t in towers.items() if n.startswith("text_model.")}


@pytest.mark.parametrize("given", [{}, {"guidance": 2.0, "text_mode": "all77"}, {"batch": 31, "steps": 1000}], ids=str)
@pytest.mark.parametrize("preset", toksr.PRESETS)
def test_every_program_could_run(preset, given):
    settings = toksr.settings(preset, given, {})
    components = {n: Signature(c.inputs, c.outputs) for n, c in toksr.components(preset, **settings).items()}
    check(toksr.program(preset, **settings), components, {})


# Bad input


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("run"),)


def altered(name, changes):
    """Spoils a file of tensors; None takes one out."""

    def spoil(folder):
        read, write = (torch.load, torch.save) if name.endswith(".bin") else (load_file, save_file)
        write({n: t for n, t in (read(folder / name) | changes).items() if t is not None}, folder / name)

    return spoil


BIN, DENOISER, TOWERS = "tatitok_bl32_vae.bin", "dit.safetensors", "clip/model.safetensors"
NORM, ENDS = "text_model.final_layer_norm.bias", "encoder.conv_out.weight"
NO_TEXT = {name: None for name in shapes_of(TINY, "encoder", "decoder") if "text_guidance" in name}
SPOILT = {  # what is done to the files, and what is said of it
    "a quantiser": (altered(BIN, {"quantize.embedding.weight": torch.ones(8, 4)}), "('quantize.embedding.weight')"),
    "no text": (altered(BIN, NO_TEXT), "lacks 'decoder.text_guidance_"),
    "no variance": (altered(BIN, {ENDS: torch.ones(4, 32, 1, 1)}), "gives no mean and variance of 4 numbers"),
    "code": (altered(BIN, {"latent_tokens": Code()}), "holds more than tensors"),
    "another key": (altered(BIN, {"encoder.x": torch.ones(3)}), "unexpected 1 tensors: encoder.x; give TA-TiTok's"),
    "another's denoiser": (
        altered(DENOISER, {"dit.embed.weight": torch.ones(32, 3)}),
        "is for 4 tokens of 3 numbers, words of 16; the tokenizer gives 4 of 4, words of 16; give",
    ),
    "no picture": (altered(BIN, {"encoder.positional_embedding": torch.ones(17)}), "has shape [17]; no tokenizer that"),
    "another's words": (
        altered(BIN, {"decoder.text_guidance_proj.weight": torch.ones(32, 24)}),
        "reads 8 words of 24 numbers, CLIP here gives 8 of 16; is this the right preset?",
    ),
    "no denoiser": (altered(DENOISER, {"dit.embed.weight": None}), "lacks 'dit.embed.weight'; no denoiser"),
    "half a denoiser": (altered(DENOISER, {"dit.out.bias": None}), "lacks 1 tensors: dit.out.bias; give TokSR's"),
    "no tokenizer": (
        lambda folder: (folder / "clip" / "vocab.json").unlink(),
        "vocab.json missing; give the folder with",
    ),
    "half a text tower": (altered(TOWERS, {NORM: None}), f"lacks 1 tensors: {NORM}; give CLIP ViT-L/14-336's"),
}
ASKED = {  # code, what is left out or added, and what is said of it
    "no tokenizer": (2, "tokenizer", [], "neither --tokenizer PATH nor --random-weights SEED is given"),
    "no CLIP": (8, "clip", [], "CLIP ViT-L/14-336's text tower is not given; give --clip"),
    "no denoiser": (8, "dit", [], "TokSR's denoiser is not given; give --dit"),
    "a batch of none": (2, "", ["--batch", "0"], "--batch 0 must lie in 1..31"),
    "a batch too large": (2, "", ["--batch", "99"], "--batch 99 must lie in 1..31"),
    "no guidance": (2, "", ["--guidance", "nan"], "invalid finite value: 'nan'"),
    "no steps": (2, "", ["--steps", "0"], "--steps 0 must lie in 1..1000"),
}
ASKED_OF_A_BUNDLE = {
    "guidance": (["--guidance", "2"], "--guidance"),
    "another tile": (["--tile", "64"], "tile=64 is not one of the sizes this bundle is made for: [32]"),
    "another scale": (["--scale", "2"], "scale=2 is none that this bundle can enlarge by; use 4"),
    "no steps": (["--steps", "0"], "count=0 is no number of steps"),
}


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return written(tmp_path / "files", TINY)


def refused(capsys, code, part, *words):
    """A command that must fail with this code, one line and nothing left behind."""
    before = sorted(Path().iterdir())
    capsys.readouterr()
    assert main(list(words)) == code
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if not re.match(r"\w+ +(started|cached|done in \S+ s)$", line))  # of a build
    assert line.startswith("tilewright: ") and part in line and len(line) < 700, line
    assert sorted(Path().iterdir()) == before


def refused_build(capsys, code, part, given, *words):
    given = [word for name, value in given.items() for word in (f"--{name}", value)]
    build = ("export", "build", "toksr", "--preset", "tiny", "--verify", "never", "-o", "b")
    refused(capsys, code, part, *build, *given, *words)


@pytest.mark.parametrize(("spoil", "part"), SPOILT.values(), ids=SPOILT)
def test_wrong_files_are_told_in_one_line(given, capsys, spoil, part):
    spoil(Path("files"))
    refused_build(capsys, 8, part, given)


@pytest.mark.parametrize(("code", "left_out", "words", "part"), ASKED.values(), ids=ASKED)
def test_wrong_arguments_are_told_in_one_line(given, capsys, code, left_out, words, part):
    refused_build(capsys, code, part, {n: v for n, v in given.items() if n != left_out}, *words)


@pytest.mark.parametrize(("words", "part"), ASKED_OF_A_BUNDLE.values(), ids=ASKED_OF_A_BUNDLE)
def test_what_a_bundle_cannot_do_is_told_in_one_line(bundles, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample_photo(8, 8, 1)).save("in.png")
    refused(capsys, 2, part, "runtime", "restore", "in.png", "out.png", "--bundle", str(bundles("default")), *words)
