"""Train the small HiTokSR of preset `demo`: `python -m train.hitoksr FOLDER OUT` continues where it stopped.

The stages are the paper's, at small scale: the vision prior, the tokenizer, the generator, and the decoder again. In
the place of an adversary and a perceptual loss, differences of neighbouring pixels are trained.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cosine_similarity, cross_entropy, interpolate, l1_loss, one_hot

from tilewright.export.networks import hitoksr as networks
from tilewright.export.systems.hitoksr.sizes import PRESETS, sizes_of_networks
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope_reference
from train import command, data
from train.linear import silence
from train.loop import Average, adam, stage
from train.pictures import appearance, crops, mixed, pixels, score

SIDE, COUNT = 96, 8
STEPS = {"prior": 1000, "tokenizer": 2000, "stem": 5000, "generator": 300, "decoder": 500}
TOP = 5
NEAR = 0.25  # codewords count as near within a Gaussian of half this variance
ORIENTATIONS = 8


class Prior(nn.Module):
    """The vision prior, and the heads of its training: they predict strokes and kind of the clean image."""

    def __init__(self, config: networks.HiTokConfig) -> None:
        super().__init__()
        width = config.vision["hidden_size"]
        self.vision = networks.VisionPrior(config)
        self.strokes = nn.Linear(width, ORIENTATIONS + 3)
        self.kind = nn.Linear(width * len(config.class_layers), 1 + len(data.FAMILIES))
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.deviation = nn.Buffer(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.vision((image - self.mean) / self.deviation)

    def losses(self, sharp: Tensor, soft: Tensor, kinds: Tensor, patch: int) -> dict[str, Tensor]:
        patches, classes = self(soft)
        return {
            "strokes": l1_loss(self.strokes(patches).float(), strokes_of(sharp, patch)),
            "kind": 0.2 * cross_entropy(self.kind(classes.flatten(1)).float(), kinds),
        }


def strokes_of(image: Tensor, patch: int) -> Tensor:
    """For every patch the root of a histogram of its gradients' directions, and its mean colour."""
    light = image.mean(1, keepdim=True)
    x, y = (nn.functional.pad(light.diff(dim=d), (0, d == -1, 0, d == -2)) for d in (-1, -2))
    turn = (torch.atan2(y, x) / torch.pi % 1 * ORIENTATIONS).long().clamp(max=ORIENTATIONS - 1)
    histogram = one_hot(turn[:, 0], ORIENTATIONS).permute(0, 3, 1, 2) * torch.hypot(x, y)
    features = torch.cat([avg_pool2d(histogram, patch).sqrt(), avg_pool2d(image, patch)], 1)
    return features.flatten(2).transpose(1, 2)


class Tokenizer(nn.Module):
    """Encoder, codebooks and decoder. Codewords follow the mean of their latents; unused ones move to other latents."""

    def __init__(self, config: networks.HiTokConfig) -> None:
        super().__init__()
        self.encoder, self.quantizer = networks.Encoder(config), networks.Quantizer(config)
        self.decoder = networks.Decoder(config)
        groups, codes, width = self.quantizer.codebook.shape
        self.quantizer.codebook.requires_grad_(False)
        self.uses = nn.Buffer(torch.zeros(groups, codes))
        self.sums = nn.Buffer(torch.zeros(groups, codes, width))

    def losses(self, step: int, sharp: Tensor) -> dict[str, Tensor]:
        groups = len(self.quantizer.codebook)
        active = groups if torch.rand(()) < 0.9 else int(torch.randint(1, groups, ()))
        latents = self.encoder(sharp * 2 - 1).float()
        if step == 0:
            self.quantizer.codebook.copy_(drawn(latents.detach(), groups, self.uses.shape[1]))
        with torch.no_grad():
            indices, codes = self.quantizer(latents)
            self.follow(latents, indices)
        active_channels = torch.arange(codes.shape[-1]) < active * codes.shape[-1] // groups
        straight = (latents + (codes - latents).detach()) * active_channels
        image = self.decode(straight, sharp.shape[-2:])
        target = coarse(sharp, groups - active)
        return {"pixels": appearance(image, target), "commitment": 0.25 * (latents - codes).square().mean()}

    def decode(self, codes: Tensor, size: tuple[int, ...]) -> Tensor:
        patch = self.decoder.config.patch_px
        grid = codes.transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))
        return (self.decoder(grid).float() + 1) / 2

    def follow(self, latents: Tensor, indices: Tensor) -> None:
        """Update the running means of codewords."""
        groups, codes, width = self.sums.shape
        chosen = one_hot(indices.flatten(0, -2).long(), codes).float().transpose(0, 1)  # [G, rows, K]
        parts = latents.flatten(0, -2).unflatten(-1, (groups, width)).transpose(0, 1)  # [G, rows, D]
        self.uses.mul_(0.98).add_(chosen.sum(1), alpha=0.02)
        self.sums.mul_(0.98).add_(chosen.mT @ parts, alpha=0.02)
        codebook, rarely = self.quantizer.codebook, 1e-3
        means = self.sums / self.uses[..., None].clamp(min=rarely)
        codebook.copy_(torch.where(self.uses[..., None] > rarely, means, codebook))
        dead = self.uses < 0.05
        if dead.any():
            fresh = drawn(latents, groups, codes)
            codebook.copy_(torch.where(dead[..., None], fresh, codebook))
            self.uses.copy_(torch.where(dead, 0.5, self.uses))
            self.sums.copy_(torch.where(dead[..., None], 0.5 * fresh, self.sums))


def drawn(latents: Tensor, groups: int, codes: int) -> Tensor:
    """Codewords [G, K, D] from latents of this batch."""
    rows = latents.flatten(0, -2)
    picked = rows[torch.randint(len(rows), (codes,))]
    return picked.unflatten(-1, (groups, -1)).transpose(0, 1).contiguous()


def coarse(image: Tensor, levels: int) -> Tensor:
    """The image without its finest wavelets: Haar's approximation at its own size."""
    size = 2**levels
    return interpolate(avg_pool2d(image, size), scale_factor=size) if levels else image


def distances(latents: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances [..., G, K] of latents [..., G, D] to their groups' codewords, without the latents' norm."""
    return codebook.square().sum(-1) - 2 * torch.einsum("...gd,gkd->...gk", latents, codebook)


def scores(generator: networks.Generator, soft: Tensor, patches: Tensor, classes: Tensor) -> Tensor:
    """Logits [B, N, G, K] of every codeword."""
    logits = generator.head(generator.hidden(soft * 2 - 1, patches, classes)).float()
    return logits.unflatten(-1, (generator.config.groups, generator.config.codes))


def words(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codewords [..., G*D] of indices [..., G]."""
    return codebook[torch.arange(len(codebook)), indices].flatten(-2)


@torch.no_grad()
def start(generator: networks.Generator, tokenizer: Tokenizer) -> None:
    """Initialise the generator with the tokenizer's encoder; its stem already gives the encoder's embedding."""
    blocks: Any = generator.blocks
    for mine, theirs in zip(blocks, tokenizer.encoder.blocks, strict=True):
        mine.load_state_dict(theirs.state_dict(), strict=False)
    without: list[Any] = [*generator.cls, *(sft for block in blocks for sft in (block.sft1, block.sft2))]
    for layer in without:
        silence(layer)
    generator.norm.load_state_dict(tokenizer.encoder.norm.state_dict())
    codebook, latent = tokenizer.quantizer.codebook, tokenizer.encoder.out
    weight, bias = (p.unflatten(0, (len(codebook), -1)) for p in (latent.weight, latent.bias))
    nearness = 2 * torch.einsum("gkd,gd->gk", codebook, bias) - codebook.square().sum(-1)
    generator.head.weight.copy_((codebook @ weight).flatten(0, 1) * (2 / NEAR))
    generator.head.bias.copy_(nearness.flatten() / NEAR)


class Training:
    """The networks, and one method for each stage."""

    def __init__(self, folder: Path) -> None:
        # the op is for inference and has no gradient, but its reference has
        networks.qkv_norm_rope = qkv_norm_rope_reference  # type: ignore[assignment]
        torch.manual_seed(0)
        self.folder = folder
        self.config = networks.HiTokConfig(**sizes_of_networks(PRESETS["demo"]))
        self.prior, self.tokenizer = Prior(self.config), Tokenizer(self.config)
        self.generator = networks.Generator(self.config)

    def stage(
        self,
        name: str,
        peak: float,
        trained: nn.Module,
        average: Average[Any],
        losses: Callable[..., Any],
        judged: Callable[[], dict[str, float]] = dict,
    ) -> None:
        optimizer = adam(p for p in trained.parameters() if p.requires_grad)
        state = {"network": trained, "average": average}
        batch = crops(list(STEPS).index(name), COUNT, SIDE)

        def measured(step: int, images: tuple[Tensor, ...]) -> dict[str, Tensor]:
            with mixed():
                return losses(step, *images)

        stage(name, self.folder, STEPS[name], peak, optimizer, state, batch, measured, average.update, judged)

    def run(self) -> None:
        self.stage_prior()
        self.stage_tokenizer()
        self.stage_stem()
        self.stage_generator()
        self.stage_decoder()
        print("codewords that held-out images use, by group:", *(f"{share:.0%}" for share in self.used()))

    @torch.no_grad()
    def used(self) -> list[float]:
        """For every codebook, the share of codewords that the tokenizer chooses for sharp held-out images."""
        used = torch.zeros_like(self.tokenizer.uses, dtype=torch.bool)
        for _, sharp, _ in data.kept_back("held-out"):
            tiles = pixels(data.squares(sharp, SIDE))
            indices, _ = self.tokenizer.quantizer(self.tokenizer.encoder(tiles * 2 - 1).float())
            for group, chosen in enumerate(indices.flatten(0, -2).long().T):
                used[group, chosen] = True
        return used.float().mean(1).tolist()

    def stage_prior(self) -> None:
        average = Average(self.prior)
        self.stage(
            "prior", 1e-3, self.prior, average,
            lambda step, sharp, soft, kinds: self.prior.losses(sharp, soft, kinds, self.config.patch_px),
        )  # fmt: skip
        self.prior.load_state_dict(average.network.state_dict())

    def stage_tokenizer(self) -> None:
        average = Average(self.tokenizer)
        self.stage(
            "tokenizer", 1.5e-3, self.tokenizer, average,
            lambda step, sharp, soft, kinds: self.tokenizer.losses(step, sharp),
            judged=lambda: score(SIDE, lambda sharp, soft: self.reconstructed(average.network, sharp)),
        )  # fmt: skip
        # codewords are running means already, and are not averaged again
        buffers = {k: v for k, v in self.tokenizer.state_dict().items() if k.startswith(("quantizer.", "uses", "sums"))}
        self.tokenizer.load_state_dict(average.network.state_dict() | buffers)
        self.tokenizer.requires_grad_(False)

    def reconstructed(self, tokenizer: Tokenizer, sharp: Tensor) -> Tensor:
        _, codes = self.tokenizer.quantizer(tokenizer.encoder(sharp * 2 - 1).float())
        return tokenizer.decode(codes, sharp.shape[-2:])

    def stage_stem(self) -> None:
        """Train the stem to predict, from a degraded image, the encoder's embedding of the sharp image."""
        average = Average(self.generator.stem)
        embed = self.tokenizer.encoder.embed

        def losses(step: int, sharp: Tensor, soft: Tensor, kinds: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                aim = embed(sharp * 2 - 1).float()
            return {"embedding": (self.generator.stem(soft * 2 - 1).float() - aim).square().mean() / aim.var()}

        self.stage("stem", 2e-3, self.generator.stem, average, losses)
        self.generator.stem.load_state_dict(average.network.state_dict())

    def stage_generator(self) -> None:
        """Train with cross-entropy against all codewords near the true one, so that an average of them wins."""
        clean = deepcopy(self.prior).requires_grad_(False)  # its features of sharp images stay the target
        pair: Any = nn.ModuleList([self.generator, self.prior])
        codebook = self.tokenizer.quantizer.codebook
        groups, _, width = codebook.shape
        start(self.generator, self.tokenizer)
        average = Average(pair)

        def judged() -> dict[str, float]:
            generator, prior = average.network
            return score(SIDE, lambda sharp, soft: self.restored(generator, prior, self.tokenizer, soft))

        def losses(step: int, sharp: Tensor, soft: Tensor, kinds: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                truth = self.tokenizer.encoder(sharp * 2 - 1).float().unflatten(-1, (groups, width))
                near = (-distances(truth, codebook) / NEAR).softmax(-1)
                aim, _ = clean(sharp)
            patches, classes = self.prior(soft)
            logits = scores(self.generator, soft, patches, classes)
            return {
                "tokens": cross_entropy(logits.flatten(0, 2), near.flatten(0, 2)),
                "alignment": 0.1 * (1 - cosine_similarity(patches.float(), aim.float(), -1)).mean(),
            }

        self.stage("generator", 5e-5, pair, average, losses, judged)
        pair.load_state_dict(average.network.state_dict())
        pair.requires_grad_(False)

    def restored(self, generator: Any, prior: Any, tokenizer: Tokenizer, soft: Tensor) -> Tensor:
        best = scores(generator, soft, *prior(soft)).argmax(-1)
        return tokenizer.decode(words(self.tokenizer.quantizer.codebook, best), soft.shape[-2:])

    def stage_decoder(self) -> None:
        self.tokenizer.decoder.requires_grad_(True)
        average = Average(self.tokenizer)

        def losses(step: int, sharp: Tensor, soft: Tensor, kinds: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                best, indices = scores(self.generator, soft, *self.prior(soft)).topk(TOP, -1)
                picked = torch.multinomial(best.softmax(-1).flatten(0, -2), 1).view(*best.shape[:-1], 1)
                chosen = words(self.tokenizer.quantizer.codebook, indices.gather(-1, picked)[..., 0])
            return {"pixels": 4 * appearance(self.tokenizer.decode(chosen, sharp.shape[-2:]), sharp)}

        def judged() -> dict[str, float]:
            return score(SIDE, lambda sharp, soft: self.restored(self.generator, self.prior, average.network, soft))

        self.stage("decoder", 5e-4, self.tokenizer, average, losses, judged)
        self.tokenizer.decoder.load_state_dict(average.network.decoder.state_dict())

    def files(self) -> dict[str, dict[str, Tensor] | str]:
        """The shipped weights under the system's names, and the configuration file with their sizes."""
        parts = {
            "vfm.": self.prior.vision.vfm,
            "generator.": self.generator,
            "decoder.": self.tokenizer.decoder,
            "quantizer.": self.tokenizer.quantizer,
        }
        state = {prefix + name: t for prefix, part in parts.items() for name, t in part.state_dict().items()}
        config = {"_class_name": "HiTokSR", "licence": "Apache-2.0: trained by tools/train", **PRESETS["demo"]}
        return {
            "config.json": json.dumps(config, indent=2) + "\n",
            "hitoksr": {name: t for name, t in state.items() if not name.endswith("mask_token")},
        }


if __name__ == "__main__":
    sys.exit(command.main(__doc__, Training))
