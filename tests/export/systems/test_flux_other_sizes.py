"""FLUX systems built from folders of sizes that no preset has, against upstream parts of those sizes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from support.fill import Canvas, InToken, Vicr, distance, psnr
from support.fill_files import DEVIATION, MEAN, SHORT, SIZES, WORDS, Published, publish
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.networks.vision import ClipVision
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.text import token_ids

pytestmark = pytest.mark.slow

SPATIAL, CHANNELS, STEPS = 4, 3, 5
PROMPT = "a stone bridge"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published"))


def canvas(width: int, height: int) -> np.ndarray:
    return sample_photo(width, height, 1).transpose(2, 0, 1).astype(np.float32) / 255


def noise_of(image: np.ndarray, region: int, panels: int = 1) -> np.ndarray:
    rows, columns = image.shape[1] // SPATIAL, panels * image.shape[2] // SPATIAL
    return normal(5, region=region, stream=0, channels=CHANNELS, top=0, left=0, height=rows, width=columns)


def words_of(published: Published, t5: np.ndarray, clip: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled vector of ids, by transformers' own classes; the end is the last id of the vocabulary."""
    with torch.no_grad():
        context = published.t5(torch.from_numpy(t5)).last_hidden_state
        return context, published.clip_text(torch.from_numpy(clip)).pooler_output


class Recording:
    """An engine that keeps the latents it gives."""

    def __init__(self, engine: object) -> None:
        self.engine, self.latents = engine, list[np.ndarray]()

    def run(self, inputs, wanted):
        outputs = self.engine.run(inputs, wanted)
        self.latents.append(outputs["z_next"])
        return outputs


def test_in_token_is_built_of_the_sizes_that_the_files_say(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tilewright"):
        build(
            Request(
                "in-token", None, tmp_path / "b", published.folder, verify="never", system_options={"prompt": PROMPT}
            )
        )
    assert not caplog.records  # the files say everything
    made = load_file(tmp_path / "b" / "constants.safetensors")
    assert made["context"].shape == (1, WORDS, 20) and made["pooled"].shape == (1, 24)
    context, pooled = (torch.from_numpy(made[name]) for name in ("context", "pooled"))
    processor = {"image_mean": MEAN, "image_std": DEVIATION}
    upstream = InToken(
        published.transformer,
        published.vae,
        SIZES["scheduler"],
        published.siglip,
        published.redux,
        processor,
        context,
        pooled,
    )
    image = canvas(32, 24)
    path, picture = upstream.walk(image, noise_of(image, 0), STEPS)
    with load(tmp_path / "b") as restorer:
        program, step = restorer.bundle.program, Recording(restorer.engines["step"])
        engines = {name: restorer.engines[name] for name in restorer.engines} | {"step": step}
        ours = run(program, engines, restorer.constants, Job(Canvas(image), seed=5, steps=STEPS))
    for latent, expected in zip(step.latents, path, strict=True):
        assert distance(latent, expected) <= 1e-4
    assert psnr(ours, picture) >= 60 and ours.std() > 0.02
    assert program.multiple_px == 8 and program.passes[0].tiles == Tiles(48, 8, (48, 48))


def test_in_tokens_words_are_read_by_the_encoders_of_the_files(published: Published, tmp_path: Path) -> None:
    """Constants are made at build by both encoders, of ids that the folder's own tokenizers give."""
    from tilewright.export import tokenizers

    request = Request(
        "in-token", None, tmp_path / "b", published.folder, verify="never", system_options={"prompt": PROMPT}
    )
    build(request)  # nothing is traced again
    fill, ids = published.folder / "FLUX.1-Fill-dev", []
    for text, length in ((tokenizers.t5(fill / "tokenizer_2", 40), 40), (tokenizers.clip(fill / "tokenizer", 18), 18)):
        (tmp_path / "tokenizer.json").write_text(text)
        ids.append(token_ids(tmp_path / "tokenizer.json", PROMPT, length))
    made = load_file(tmp_path / "b" / "constants.safetensors")
    for ours, expected in zip((made["context"], made["pooled"]), words_of(published, *ids), strict=True):
        assert distance(ours, expected.numpy()) <= 1e-5


def test_vicr_is_built_of_the_sizes_that_the_files_say(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tilewright"):
        build(Request("vicr", None, tmp_path / "b", published.folder, verify="never"))
    assert not caplog.records
    files = (("t5_ids", "t5.json", 40), ("clip_ids", "clip.json", 18))
    ids = {name: token_ids(tmp_path / "b" / "tokenizers" / file, PROMPT, n) for name, file, n in files}
    look = ClipVision(SIZES["clip_vision"], short=SHORT, mean=MEAN, deviation=DEVIATION)
    context, pooled = words_of(published, *ids.values())
    parts = (published.transformer, published.vae, SIZES["scheduler"], published.clip_vision, look.pixels)
    upstream, image = Vicr(*parts, published.bridge, context, pooled), canvas(24, 40)
    path, picture = upstream.walk(image, noise_of(image, 1, panels=2), STEPS)
    with load(tmp_path / "b") as restorer:
        step = Recording(restorer.engines["step"])
        engines = {name: restorer.engines[name] for name in restorer.engines} | {"step": step}
        job = Job(Canvas(image), seed=5, steps=STEPS, inputs=ids)
        ours = run(restorer.bundle.program, engines, restorer.constants, job)
    for latent, expected in zip(step.latents, path, strict=True):
        assert distance(latent, expected) <= 1e-4
    assert psnr(ours, picture) >= 60 and ours.std() > 0.02
