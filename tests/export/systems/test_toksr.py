"""TokSR end to end from files as published, against PyTorch's own blocks and diffusers' scheduler, tile by tile."""

import math
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from support.commands import refused
from support.pages import assert_flags_exist, page, run_commands
from support.toksr import Denoiser, picture_of, tokens_of
from support.toksr_files import OTHER, TA_TITOK, TINY, clip, shapes_of, tensors, untold, written
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.tiles import tile_plan, weights
from tilewright.runtime.text import token_ids

pytestmark = pytest.mark.slow

WORDS, BOS, EOS, SEED, GUIDANCE = "a cab", 62, 63, 5, 3.0
# name -> the files' sizes and the options of the build; any two choices of a step in every combination
BUNDLES = {
    "default": (TINY, {}),
    "all77": (TA_TITOK, {"text_mode": "all77", "guidance": GUIDANCE}),
    "x0": (TA_TITOK, {"prediction": "x0", "guidance": GUIDANCE, "prompt": WORDS}),
    "all77 x0": (TINY, {"text_mode": "all77", "prediction": "x0"}),
    "other": (OTHER, {"guidance": GUIDANCE}),
    "one": (TINY, {"batches": (1,)}),
    "three": (TINY, {"batches": (3,)}),
}


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
            asked = given[kind] | untold(sizes) | options
            batches = asked.pop("batches", ())
            build(Request("toksr", None, root / name, verify="never", system_options=asked, batches=batches))
            made[name] = root / name
        return made[name]

    return built


# The reference: PyTorch's own blocks in float64


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
    tiling = tile_plan(*image.shape[:0:-1], sizes["image"], sizes["patch"], sizes["patch"])  # which share a patch
    tiles = torch.from_numpy(np.stack([image.crop(t.top, t.left, t.height, t.width) for t in tiling.tiles]))
    told = text if sizes["encoder"]["text"] else None
    condition = tokens_of(network(sizes, "encoder"), sizes, tiles, told)
    kind = {"eps": "epsilon", "x0": "sample"}[options.get("prediction", "eps")]
    scheduler = DDIMScheduler(1000, 1e-4, 2e-2, "linear", None, False, True, 0, kind)  # no clipping, alpha 1, offset 0
    scheduler.set_timesteps(25)
    draw = partial(normal, SEED, stream=0, channels=sizes["token"], top=0, left=0, height=1, width=sizes["latents"])
    z = torch.from_numpy(np.stack([draw(region=1 + tile.index) for tile in tiling.tiles])).double()
    denoiser = Denoiser(network(sizes, "dit"), sizes["dit"]["heads"])
    guidance, path = options.get("guidance", 1.0), []
    for t in scheduler.timesteps.tolist():
        without, answer = (
            torch.stack([denoiser(*pair, t, given) for pair in zip(z, condition, strict=True)])
            for given in (torch.zeros_like(label), label)
        )
        z = scheduler.step(without + guidance * (answer - without), t, z).prev_sample
        path.append(z.numpy())
    parts = picture_of(network(sizes, "decoder"), sizes, z, text).numpy()
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


def walked(bundle, image, devices=1):
    with counted(bundle) as (restorer, engines):
        ids = token_ids(bundle / "tokenizers" / "clip.json", WORDS, 8)
        job = Job(image, seed=SEED, inputs={"ids": ids})
        return run(restorer.bundle.program, engines, restorer.constants, job, devices=devices), engines


def rounds(bundle, *asked):
    """A picture restored with these inputs, one after another; the ids, the text's outputs and the results."""
    with counted(bundle) as (restorer, engines):
        sitting = restorer.sitting(sample_photo(8, 8, 1), seed=SEED, steps=1)
        restorer.executor.devices[0].engines = engines
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
    for name, batch in {"default": 16, "three": 3, "one": 1}.items():
        picture, engines = walked(bundles(name), image, workers)
        assert np.abs(picture - whole).max() <= 1e-6
        assert len(engines["text"].made) == 1
        for component, each in {"tokenise": 1, "step": 25, "detokenise": 1}.items():
            sizes = [len(next(iter(outputs.values()))) for outputs in engines[component].made]
            assert max(sizes) <= batch and sum(sizes) == 4 * each
            assert len(sizes) <= each * (1 if batch >= 4 and workers == 1 else 4)


@pytest.mark.parametrize(("width", "height"), [(5, 3), (13, 9)])
def test_a_picture_of_any_size_is_padded_and_cut(bundles, width, height):
    picture = sample_photo(width, height, 1)
    large = np.asarray(Image.fromarray(picture).resize((4 * width, 4 * height), Image.Resampling.BICUBIC))
    for axis, side in ((0, 4 * height), (1, 4 * width)):  # to whole patches, and to a tile at least
        more = -(-max(side, 32) // 8) * 8 - side
        large = np.pad(large, [(0, more * (a == axis)) for a in range(3)], "reflect" if more < side else "edge")
    _, expected = eager("default", Canvas(large))
    with load(bundles("default"), threads=1) as restorer:
        ours = restorer(picture, seed=SEED, prompt=WORDS)
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


ASKED_OF_A_BUNDLE = {
    "guidance": (["--guidance", "2"], "--guidance"),
    "another tile": (["--tile", "64"], "--tile 64 is not one of the sizes this bundle is made for: [32]"),
    "another scale": (["--scale", "2"], "--scale 2 does not work with this bundle; use 4"),
    "no steps": (["--steps", "0"], "count=0 is no number of steps"),
}


@pytest.mark.parametrize(("words", "part"), ASKED_OF_A_BUNDLE.values(), ids=ASKED_OF_A_BUNDLE)
def test_what_a_bundle_cannot_do_is_told_in_one_line(bundles, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(sample_photo(8, 8, 1)).save("in.png")
    refused(capsys, 2, part, "runtime", "restore", "in.png", "out.png", "--bundle", str(bundles("default")), *words)


def test_the_pages_commands_run_on_files_as_published(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, TINY)
    (tmp_path / "clip").rename(tmp_path / "clip-vit-large-patch14-336")
    (tmp_path / "tatitok").mkdir()
    (tmp_path / "tatitok_bl32_vae.bin").rename(tmp_path / "tatitok" / "tatitok_bl32_vae.bin")
    Image.fromarray(sample_photo(8, 8, 1)).save("in.png")
    heads = [word for name, value in untold(TINY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run_commands(page("toksr"), {"build": ("--verify", "never", *heads)}) == 2


def test_the_page_names_options_that_exist(bundles):
    with load(bundles("default"), threads=1) as restorer:
        assert_flags_exist(page("toksr"), restorer.bundle.program)
