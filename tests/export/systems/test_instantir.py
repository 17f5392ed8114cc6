"""InstantIR's bundles against the eager reference: every component, whole trajectories, tiles, rounds and words."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from support import instantir_reference as reference
from support.instantir_files import SDXL
from tilewright.export.build.request import Request
from tilewright.export.networks.instantir import Gates
from tilewright.export.system import Preset, UserFiles
from tilewright.export.systems.instantir.sizes import PRESETS
from tilewright.export.systems.instantir.system import SYSTEM
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.tiles import Tile, TilePlan, tile_plan, weights
from tilewright.runtime.text import token_ids

SIZES, SEED = PRESETS["tiny"], 7
PROMPT, NEGATIVE = "a sharp photo", "the image"
RESIDUALS = [*(f"r{i}" for i in range(4)), "mid"]
GATES = {"control_start": 0.0, "control_end": 1.0, "preview_start": 0.0, "preview_end": 1.0}
MODES = {"off": 0, "paper": 1, "code": 2}


class Eager:
    """The reference, and what it makes of words and images."""

    def __init__(self, tokenizers: Path) -> None:
        self.files = reference.make_files(reference.TINY, 0)
        self.ids = {
            f"{prefix}{name}": token_ids(tokenizers / file, text, SIZES.words)
            for prefix, text in (("", PROMPT), ("negative_", NEGATIVE))
            for name, file in (("ids", "clip.json"), ("ids_2", "clip_2.json"))
        }
        self.reference = reference.Reference(self.files, reference.TINY)
        self.abar = reference.make_scheduler("ddim", 30).alphas_cumprod

    def text(self, prefix: str) -> Any:
        return self.reference.text(*(torch.from_numpy(self.ids[f"{prefix}{name}"]) for name in ("ids", "ids_2")))

    def conditions(self, image: np.ndarray) -> dict[str, Tensor]:
        """Of both halves, that without the words first."""
        pairs = zip(("context2", "pooled2"), zip(self.text("negative_"), self.text(""), strict=True), strict=True)
        features = [self.reference.features(p) for p in (torch.zeros_like(pixels(image)), pixels(image))]
        roles = {"tokens2": False, "preview_tokens2": True}
        tokens = {name: torch.cat([self.reference.tokens(f, role) for f in features]) for name, role in roles.items()}
        return {name: torch.cat(pair) for name, pair in pairs} | tokens

    def levels(self, t: int) -> dict[str, float]:
        return {"t": float(t), "alpha": float(self.abar[t].sqrt()), "beta": float((1 - self.abar[t]).sqrt())}

    def encode(self, image: np.ndarray) -> Tensor:
        return self.reference.encode(torch.from_numpy(image.copy())[None])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers spend their time waiting for a second thread, seconds at a time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundles(instantir_tiny: Path, instantir_merged: Path) -> Iterator[dict[str, Any]]:
    with load(instantir_tiny, threads=1) as usual, load(instantir_merged, threads=1) as merged:
        yield {"usual": usual, "merged": merged}


@pytest.fixture(scope="module")
def usual(bundles: dict[str, Any]) -> Any:
    return bundles["usual"]


@pytest.fixture(scope="module", params=["usual", "merged"])
def either(request: pytest.FixtureRequest, bundles: dict[str, Any]) -> Any:
    return bundles[request.param]


@pytest.fixture(scope="module")
def eager(instantir_tiny: Path) -> Eager:
    return Eager(instantir_tiny / "tokenizers")


class Whole(np.ndarray):
    """A canvas as it is."""

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self[:, top : top + height, left : left + width], np.float32).view(np.ndarray)


class Counting:
    """An engine that keeps what it takes and gives."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.made, self.taken = engine, [], []

    def run(self, inputs: Any, wanted: Any) -> Any:
        outputs = self.engine.run(inputs, wanted)
        self.taken.append(dict(inputs))
        self.made.append(outputs)
        return outputs


def counted(restorer: Any) -> dict[str, Counting]:
    return {name: Counting(restorer.engines[name]) for name in restorer.engines}


def canvas(width: int, height: int) -> np.ndarray:
    """A picture of that size, planes in [0.2, 0.8]: no resize overshoots, so Pillow's needs no clamp."""
    return (sample_photo(width, height, 1).transpose(2, 0, 1) / 255 * 0.6 + 0.2).astype(np.float32)


def two(width: int, height: int) -> list[np.ndarray]:
    return [canvas(width, height), canvas(width, height)[:, ::-1].copy()]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Any, wanted: Any) -> float:
    """How far ours is off, relative to what is wanted."""
    ours, wanted = (np.asarray(x, np.float64) for x in (ours, wanted))
    assert ours.shape == wanted.shape
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


def psnr(ours: Any, wanted: Any) -> float:
    return float(10 * np.log10(1 / np.mean((np.asarray(ours, np.float64) - np.asarray(wanted)) ** 2)))


def called(restorer: Any, component: str, **inputs: Any) -> dict[str, np.ndarray]:
    """All outputs of a component."""
    specs = restorer.bundle.manifest.components[component]
    feed = {}
    for name, value in inputs.items():
        array, spec = np.asarray(value, specs.inputs[name].dtype), specs.inputs[name]
        feed[name] = array.reshape((1,) * (len(spec.shape) - array.ndim) + array.shape)  # one row
    return restorer.engines[component].run(feed, list(specs.outputs))


def pixels(image: np.ndarray) -> Tensor:
    """What DINOv2's processor makes of an image, by Pillow in floating point."""
    height, width = (SIZES.pixels["short"] * length // min(image.shape[1:]) for length in image.shape[1:])
    pictures = [Image.fromarray(plane.copy()).resize((width, height), Image.Resampling.BICUBIC) for plane in image]
    top, left = (height - SIZES.pixels["side"]) // 2, (width - SIZES.pixels["side"]) // 2
    cropped = torch.from_numpy(
        np.stack([*map(np.asarray, pictures)])[:, top : top + SIZES.pixels["side"], left : left + SIZES.pixels["side"]]
    )
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((cropped - mean[:, None, None]) / deviation[:, None, None])[None]


def test_the_text_encoders(either: Any, eager: Eager) -> None:
    for prefix in ("", "negative_"):
        made = called(either, "text", **{name: eager.ids[f"{prefix}{name}"] for name in ("ids", "ids_2")})
        for name, wanted in zip(("context", "pooled"), eager.text(prefix), strict=True):
            assert apart(made[name], wanted) <= 1e-5


def test_what_dino_sees(either: Any, eager: Eager) -> None:
    for images in (two(48, 32), two(36, 64), two(30, 28), two(48, 32)[:1]):
        made = called(either, "see", image=np.stack(images), positions=either.constants["positions"])["features"]
        for ours, image in zip(made, images, strict=True):
            assert apart(ours[None], eager.reference.features(pixels(image))) <= 1e-5
    nothing = eager.reference.features(torch.zeros(1, 3, SIZES.pixels["side"], SIZES.pixels["side"]))
    assert apart(either.constants["nothing"], nothing) <= 1e-5


@pytest.mark.parametrize("positions", ["release", "current"])
def test_dinos_positions(usual: Any, eager: Eager, positions: str) -> None:
    settings = SYSTEM.decide(Preset("tiny", SIZES, True), {"dino_positions": positions}, UserFiles({}, {}))
    network = SYSTEM.build_time(settings)["positions"].build()
    stored = eager.files["dino"]["embeddings.position_embeddings"]
    network.load_state_dict({"position_embeddings": stored}, strict=True)
    wanted = reference.dino_table(stored, SIZES.pixels["side"] // SIZES.dino["patch_size"], positions)
    assert apart(network(), wanted) <= 1e-6
    assert (apart(usual.constants["positions"], wanted) <= 1e-6) == (positions == "release")


def fed(restorer: Any, ids: dict[str, Any], images: list[np.ndarray], look: str, scale: dict[str, Any]) -> Any:
    """What predictions of a role are fed from images: through text, words, see and look."""
    text = {p: called(restorer, "text", **{n: ids[f"{p}{n}"] for n in ("ids", "ids_2")}) for p in ("", "negative_")}
    feed = {f"{prefix}pooled": made["pooled"] for prefix, made in text.items()}
    feed |= called(restorer, "words", **{f"{prefix}context": made["context"] for prefix, made in text.items()})
    features = called(restorer, "see", image=np.stack(images), positions=restorer.constants["positions"])
    return feed | called(restorer, look, **features, nothing=restorer.constants["nothing"], **scale) | scale


ROLES: dict[str, Any] = {  # a bundle, its component and its look, the branch's strength
    "base": ("usual", "unet", "look", {"lora_scale": 0.0}),
    "preview": ("usual", "unet", "look", {"lora_scale": 1.0}),
    "merged base": ("merged", "base", "look_base", {}),
    "merged preview": ("merged", "preview", "look_preview", {}),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_a_prediction(bundles: dict[str, Any], eager: Eager, role: str, batch: int) -> None:
    """From words and image to the noise of both halves, with residuals not at all, in full and in part."""
    bundle, component, look, scale = ROLES[role]
    restorer, preview, images = bundles[bundle], role.endswith("preview"), two(48, 32)[:batch]
    specs = restorer.bundle.manifest.components[component].inputs
    z, feed, residuals = rand(batch, 4, 16, 24), fed(restorer, eager.ids, images, look, scale), {}
    for name in sorted(specs.keys() & {*RESIDUALS}):
        part = int(str(specs[name].shape[3]).partition("/")[2] or 1)
        residuals[name] = rand(batch, 2, int(specs[name].shape[2]), 16 // part, 24 // part, seed=len(residuals))
    for t, control in ((958, 0.0), (496, 1.0), (1, 0.4)) if residuals else ((958, 0.0), (1, 0.0)):
        steered = {"control": np.full((batch, 1), control)} | residuals if residuals else {}
        made = called(restorer, component, **feed, z=z, t=t, **steered)["predicted"]
        for k, image in enumerate(images):
            given, z2 = eager.conditions(image), z[[k, k]]
            added = [residuals[name][k] * control for name in RESIDUALS] if control else None
            text, tokens = (given["context2"], given["pooled2"]), given["preview_tokens2" if preview else "tokens2"]
            pair = added and (added[:-1], added[-1])
            assert apart(made[k], eager.reference.eps(z2, torch.tensor(t), *text, tokens, pair, preview)) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_aggregator(either: Any, eager: Eager, mode: str) -> None:
    """Two tiles whose last previews were off by different amounts; preview, what judges it, residuals and strength."""
    z, y, before, noise = (rand(2, *n, 4, 16, 24, seed=i) for i, n in enumerate([(), (), (), (2,)]))
    pooled2 = eager.conditions(canvas(48, 32))["pooled2"]
    feed = {"z": z, "y": y, "noise": noise, "preview": before, "adares": MODES[mode]}
    feed |= {"negative_pooled": pooled2[:1], "pooled": pooled2[1:]}
    for t, scale, deltas, control_on, preview_on in [
        (958, 1.0, (1.0, 1.0), 1.0, 1.0),
        (496, 0.6, (0.3, 1.7), 1.0, 1.0),
        (34, 1.0, (0.05, 0.3), 1.0, 1.0),
        (34, 0.7, (0.4, 0.2), 1.0, 0.0),
        (1, 1.0, (0.4, 0.2), 0.0, 1.0),
    ]:
        job = {"control_scale": scale, "control_on": [control_on], "preview_on": [preview_on], "delta": [*zip(deltas)]}
        made = called(either, "aggregate", **feed, **eager.levels(t), **job)
        for k, delta in enumerate(deltas):
            y2 = y[[k, k]]
            seen = reference.consistency(noise[k], torch.tensor(t), z[[k, k]], eager.abar) if preview_on else y2
            judged = seen + min(delta, 1.0) * (y2 - seen) if mode == "paper" else seen
            strength = min(delta if mode == "code" else 1.0, scale) * control_on
            strength, shown = (strength, seen[1]) if strength > 0.1 else (0.0, before[k])
            assert made["control"][k, 0] == pytest.approx(strength, rel=1e-6)
            assert apart(made["shown"][k], shown) <= 1e-5
            assert made["moved"][k, 0] == pytest.approx(float((shown - before[k]).square().sum()), rel=1e-5)
            skips, middle = eager.reference.aggregate(y2, torch.tensor(t), judged, pooled2)
            for name, wanted in zip(RESIDUALS, [*skips, middle], strict=True):
                assert apart(made[name][k], wanted) <= 1e-5


@pytest.mark.parametrize("count", [30, 7])
def test_the_gates(either: Any, count: int) -> None:
    """As the release's list of steps that are kept."""
    places = [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.9, 1.0]
    for start, end in [(start, end) for start in places for end in places]:
        swapped = {"preview_start": end, "preview_end": start}
        made = called(either, "gates", t=np.zeros(count), control_start=start, control_end=end, **swapped)
        for name, (first, last) in {"control_on": (start, end), "preview_on": (end, start)}.items():
            kept = [1.0 - float(i / count < first or (i + 1) / count > last) for i in range(count)]
            assert made[name][0, :, 0].tolist() == kept, (name, first, last)


@pytest.mark.slow
def test_gates_of_hundredths_fall_as_in_the_release() -> None:
    """It compares in float64, where what is equal on paper is equal; in float32 0.6 of 50 steps is more than 30."""
    gates = Gates()
    for count in range(1, 101):
        for share in (i / 100 for i in range(101)):
            starts, ends = gates(torch.zeros(1, count), *(torch.tensor([gate]) for gate in (share, 1.0, 0.0, share)))
            assert starts[0, :, 0].tolist() == [float(i / count >= share) for i in range(count)], (count, share)
            assert ends[0, :, 0].tolist() == [float((i + 1) / count <= share) for i in range(count)], (count, share)


@pytest.mark.parametrize("count", [30, 7])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_step_of_the_sampler(either: Any, eager: Eager, sampler: str, count: int) -> None:
    """Guidance, diffusers' own scheduler and AdaRes' measure, for two tiles, at every time."""
    scheduler = reference.make_scheduler(sampler, count)
    z, predicted, noise, shown = (rand(2, *n, 4, 16, 24, seed=i) for i, n in enumerate([(), (2,), (), ()]))
    feed = {"z": z, "predicted": predicted, "noise": noise, "preview": shown, "moved": [[2.0], [3.0]]}
    for t, after in zip(scheduler.timesteps.tolist(), [*scheduler.timesteps.tolist()[1:], 0], strict=True):
        following = {f"{name}_next": value for name, value in eager.levels(after).items() if name != "t"}
        job = {"guidance": 7.0, "sampler": int(sampler == "ddpm")}
        made = called(either, "step", **feed, **eager.levels(t), **following, **job)
        eps = predicted[:, 0] + 7 * (predicted[:, 1] - predicted[:, 0])
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise):
            wanted = scheduler.step(eps, t, z)
        assert apart(made["z_next"], wanted.prev_sample) <= 1e-5
        off = (shown - wanted.pred_original_sample).square().sum((1, 2, 3))[:, None]
        assert apart(made["delta"], off / torch.tensor([[2.0], [3.0]])) <= 1e-5


def test_the_two_halves_of_the_vae_and_the_start(either: Any, eager: Eager) -> None:
    images, noise = two(48, 32), rand(2, 4, 16, 24)
    tables = {name: [value, 0.5] for name, value in eager.levels(958).items() if name != "t"}
    latents = called(either, "encode", image=np.stack(images))["latent"]
    for start in (0, 1):
        made = called(either, "start", latent=latents, noise=noise, start=start, **tables)["z"]
        for k, image in enumerate(images):
            latent = eager.encode(image)[0]
            assert apart(latents[k], latent) <= 1e-5
            noised = noise[k] if start else tables["alpha"][0] * latent + tables["beta"][0] * noise[k]
            assert apart(made[k], noised) <= 1e-5
    for ours, latent in zip(called(either, "decode", latent=noise)["image"], noise, strict=True):
        assert apart(ours, eager.reference.decode(latent[None])[0]) <= 1e-5


def noise_under(tile: Tile, stream: int) -> Tensor:
    """The noise of a grid under a tile."""
    place = {"top": tile.top, "left": tile.left, "height": tile.height, "width": tile.width}
    cells = {name: value // SIZES.spatial for name, value in place.items()}
    return torch.from_numpy(normal(SEED, region=0, stream=stream, channels=4, **cells))[None]


ADAPTIVE = [{"adares": "code", "control_scale": 0.6}, {"adares": "paper", "sampler": "ddpm"}]
OTHERS = [{"start": "noise"}, {"control_scale": 0.1}, {"control_scale": 0.6, "guidance": 3.0}, ADAPTIVE[0]]
RUNS = [("usual", 7, {"sampler": sampler, "adares": adares}) for sampler in ("ddim", "ddpm") for adares in MODES]
RUNS += [("usual", 30, {"sampler": sampler, "adares": "code"}) for sampler in ("ddim", "ddpm")]
RUNS += [("merged", 7, {"sampler": "ddpm", "adares": "code"}), *(("usual", 7, how) for how in OTHERS)]


@pytest.mark.parametrize(("bundle", "steps", "how"), RUNS, ids=str)
def test_a_trajectory(bundles: dict[str, Any], eager: Eager, bundle: str, steps: int, how: dict[str, Any]) -> None:
    """Every step's latent, preview and strength of an image of one tile, and the picture."""
    restorer, image = bundles[bundle], canvas(48, 32)
    engines, job = counted(restorer), Job(image.view(Whole), SEED, steps=steps, inputs=eager.ids | how)
    ours = run(restorer.bundle.program, engines, restorer.constants, job)
    asked = {"steps": steps, "guidance": 7.0, "sampler": "ddim", "adares": "off"} | how
    noise, y = (lambda stream: noise_under(Tile(0, 0, 0, 32, 48), stream)), eager.encode(image)
    wanted = eager.reference.trajectory(y, noise, **eager.conditions(image), **asked)
    assert len(engines["step"].made) == len(engines["aggregate"].made) == len(wanted) == steps
    for step, shown, record in zip(engines["step"].made, engines["aggregate"].made, wanted, strict=True):
        assert shown["control"][0, 0] == pytest.approx(record["cond"] if record["reference"] is not None else 0, 1e-3)
        assert apart(step["z_next"], record["z"]) <= 1e-4
        assert not record["preview"].any() or apart(shown["shown"], record["preview"]) <= 1e-4
    assert psnr(ours, eager.reference.decode(wanted[-1]["z"])[0]) >= 60
    assert ours.std() > 0.05


TILED, TILING, STEPS = canvas(112, 48), tile_plan(112, 48, 64, 16, SIZES.multiple), 4  # two tiles of 64x48


def loop(eager: Eager, image: np.ndarray, how: dict[str, Any]) -> Generator[Any, Any, None]:
    """One tile of the reference: takes a step's latents and noise and gives what follows, for a test to join."""
    how = {"sampler": "ddim", "adares": "off"} | GATES | how
    given, scheduler = eager.conditions(image), reference.make_scheduler(how["sampler"], STEPS)
    text, before, delta, made = (given["context2"], given["pooled2"]), torch.zeros(2, 1, 1, 1), 1.0, None
    for i, t in enumerate(scheduler.timesteps):
        z, y, noise = yield made
        z2, y2, preview2, residuals = torch.cat((z, z)), torch.cat((y, y)), before, None
        starts = {name: i / STEPS >= how[f"{name}_start"] for name in ("control", "preview")}
        kept = {name: start and (i + 1) / STEPS <= how[f"{name}_end"] for name, start in starts.items()}
        strength = (delta if how["adares"] == "code" else 1.0) * kept["control"]
        if strength > 0.1:
            noise2 = eager.reference.eps(z2, t, *text, given["preview_tokens2"], None, preview=True)
            preview2 = reference.consistency(noise2, t, z2, eager.abar) if kept["preview"] else y2
            judged = preview2 + (delta if how["adares"] == "paper" else 0.0) * (y2 - preview2)
            skips, middle = eager.reference.aggregate(y2, t, judged, given["pooled2"])
            residuals = [strength * skip for skip in skips], strength * middle
        without, with_words = eager.reference.eps(z2, t, *text, given["tokens2"], residuals, preview=False).chunk(2)
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise):
            made, x0 = scheduler.step(without + 7 * (with_words - without), t, z, return_dict=False)
        off, moved = ((preview2[1:] - x).square().sum() for x in (x0, before[1:]))
        delta, before = min(1.0, float(off / moved.clamp(min=1e-12))), preview2
    yield made


def under(grid: Any, tile: Tile, px: int) -> Any:
    top, left, bottom, right = (v // px for v in (tile.top, tile.left, tile.top + tile.height, tile.left + tile.width))
    return grid[..., top:bottom, left:right]


def blended(tiling: TilePlan, px: int, parts: list[Tensor]) -> Tensor:
    """Tiles joined with the runtime's weights."""
    whole = torch.zeros(*parts[0].shape[:-2], tiling.height // px, tiling.width // px)
    rows, columns = weights(tiling, px)
    for tile, part in zip(tiling.tiles, parts, strict=True):
        row, column = divmod(tile.index, len(tiling.lefts))
        under(whole, tile, px)[...] += part * torch.from_numpy(np.outer(rows[row], columns[column]))
    return whole


def tiled(restorer: Any, inputs: dict[str, Any], program: Any = None, seed: int = SEED, devices: int = 1) -> Any:
    """The picture, and what the step made of each noise: tiles come in any order."""
    engines = counted(restorer)
    job = Job(TILED.view(Whole), seed, TILING.tile_width, TILING.overlap, STEPS, inputs)
    picture, step = (
        run(program or restorer.bundle.program, engines, restorer.constants, job, devices=devices),
        engines["step"],
    )
    made = {t["noise"].tobytes(): m["z_next"] for t, m in zip(step.taken, step.made, strict=True)}
    assert len(made) == len(step.made) == STEPS * len(TILING.tiles)
    return picture, made


GATED = {"adares": "code", "control_start": 0.25, "control_end": 0.75, "preview_start": 0.5}
ENDING = {"sampler": "ddpm", "control_end": 0.75, "preview_end": 0.5}


@pytest.mark.parametrize("how", [ADAPTIVE[1], GATED, ENDING], ids=str)
def test_tiles_are_joined_after_every_step(usual: Any, eager: Eager, how: dict[str, Any]) -> None:
    """Each with the words, what is seen in its own crop, and a preview and measure of its own."""
    ours, made = tiled(usual, eager.ids | how)
    crops = [under(TILED, tile, 1) for tile in TILING.tiles]
    loops = [loop(eager, crop, how) for crop in crops]
    assert [next(path) for path in loops] == [None, None]
    y = blended(TILING, SIZES.spatial, [eager.encode(crop) for crop in crops])
    scheduler = reference.make_scheduler("ddim", STEPS)
    z = scheduler.add_noise(y, noise_under(Tile(0, 0, 0, *TILED.shape[1:]), 0), scheduler.timesteps[:1])
    for i in range(STEPS):
        moved = []
        for tile, path in zip(TILING.tiles, loops, strict=True):
            noise = noise_under(tile, 1 + i)
            moved.append(path.send((*(under(grid, tile, SIZES.spatial) for grid in (z, y)), noise)))
            assert apart(made[noise.numpy().tobytes()], moved[-1]) <= 1e-4
        z = blended(TILING, SIZES.spatial, moved)
    decoded = [eager.reference.decode(under(z, tile, SIZES.spatial)) for tile in TILING.tiles]
    assert psnr(ours, blended(TILING, 1, decoded)[0]) >= 60


def test_tiles_joined_by_their_pixels_are_images_of_their_own(usual: Any, eager: Eager, instantir_files: Path) -> None:
    how, parts = {"sampler": "ddpm", "adares": "paper"}, []
    settings = Request("instantir", "tiny", Path("none"), instantir_files, system_options={"join": "pixels"}).settings
    ours, made = tiled(usual, eager.ids | how, SYSTEM.program(settings))
    for tile in TILING.tiles:
        crop, asked = under(TILED, tile, 1).copy(), how | {"steps": STEPS, "guidance": 7.0}
        noise = [noise_under(tile, stream) for stream in range(1 + STEPS)]
        path = eager.reference.trajectory(eager.encode(crop), noise.__getitem__, **eager.conditions(crop), **asked)
        for i, record in enumerate(path):
            assert apart(made[noise[1 + i].numpy().tobytes()], record["z"]) <= 1e-4
        parts.append(eager.reference.decode(path[-1]["z"]))
    assert psnr(ours, blended(TILING, 1, parts)[0]) >= 60


def test_workers_change_no_byte_and_a_seed_changes_them(usual: Any, eager: Eager) -> None:
    kinds = {name: eager.ids | {"sampler": name} for name in ("ddim", "ddpm")}
    one, again, beside = (tiled(usual, kinds["ddpm"], devices=n)[0].tobytes() for n in (1, 1, 2))
    assert one == again == beside
    others = [tiled(usual, inputs, seed=seed)[0].tobytes() for inputs in kinds.values() for seed in (SEED, SEED + 1)]
    assert one in others and len({*others}) == 4


def test_rounds_repeat_only_what_the_words_decide(usual: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, picture = counted(usual), sample_photo(48, 32, 1)
    sitting = usual.sitting(picture, scale=1, steps=3, seed=4)
    monkeypatch.setattr(usual.executor.devices[0], "engines", engines)
    one, other, again = (sitting(prompt=words) for words in (PROMPT, NEGATIVE, PROMPT))
    calls = {name: len(engine.made) for name, engine in engines.items()}
    once, often = {"encode": 1, "see": 1, "look": 2}, {"text": 6, "words": 3, "start": 3, "gates": 3, "decode": 3}
    assert calls == once | often | {"unet": 18, "aggregate": 9, "step": 9}
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one, sitting(prompt=PROMPT, guidance=9.0))
    assert (len(engines["text"].made), len(engines["words"].made), len(engines["encode"].made)) == (6, 3, 1)
    assert np.array_equal(other, usual(picture, scale=1, steps=3, seed=4, prompt=NEGATIVE))


def test_both_texts_reach_both_encoders_padded_as_each_was_trained(
    usual: Any, instantir_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first with the id of the end, the second with 0."""
    engines = counted(usual)
    sitting = usual.sitting(sample_photo(48, 32, 1), scale=1, steps=1)
    monkeypatch.setattr(usual.executor.devices[0], "engines", engines)
    sitting(prompt=PROMPT, negative_prompt=NEGATIVE)
    asked = {"max_length": SIZES.words, "padding": "max_length", "truncation": True, "return_tensors": "np"}
    for taken, text in zip(engines["text"].taken, (PROMPT, NEGATIVE), strict=True):
        for name, folder, pad in (("ids", "tokenizer", 63), ("ids_2", "tokenizer_2", 0)):
            wanted = CLIPTokenizer.from_pretrained(instantir_files / SDXL / folder)(text, **asked).input_ids
            assert taken[name].tolist() == wanted.tolist()
            assert (taken[name][0, 0], taken[name][0, -1]) == (62, pad) and 63 in taken[name][0]
    assert engines["text"].taken[0]["ids"].tolist() != engines["text"].taken[1]["ids"].tolist()
