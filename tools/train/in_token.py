"""Train the small In-Token system of preset `demo`: `python -m train.in_token FOLDER OUT`.

All networks are the published classes at small sizes, saved in the published layout. First comes the VAE, whose encoder
learns to ignore degradation. Then FLUX's transformer is trained by rectified flow, together with SigLIP, Redux and the
prompt's embeddings.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from tilewright.export.networks import configs
from tilewright.export.systems.flux.files import config
from tilewright.export.systems.flux.fill import SCHEDULE_OPTIONS
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.runtime.plan.schedules import flow_shift
from train import command, linear
from train.loop import Average, adam, stage
from train.pictures import appearance, crops, mixed, score

SIDE = 96
COUNT = {"vae": 8, "flow": 16}
STEPS = {"vae": 2400, "flow": 5000}
PEAK = {"vae": 5e-4, "flow": 4e-4}
GUIDANCE = 30.0
SIZES = PRESETS["demo"]
SHIFT = math.exp(3)  # shift of the noise levels in training, between those at the schedule's begin and end
STEADY = 12.0  # length of the first bias over that of a channel's weights: it makes tokens nearly equally long


class Conditioned(nn.Module):
    """The transformer, and the networks that make its conditions."""

    def __init__(self) -> None:
        super().__init__()
        transformer: Any = FluxTransformer2DModel(**SIZES.transformer)
        self.transformer = transformer
        for name, module in transformer.named_modules():
            if "norm" in name and isinstance(module, nn.Linear):  # every block begins as the identity
                linear.silence(module)
        begin(transformer)
        self.siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES.siglip))
        width = SIZES.siglip["hidden_size"]
        self.redux = ReduxImageEncoder(redux_dim=width, txt_in_features=SIZES.t5["d_model"])
        self.prompt = nn.Parameter(0.02 * torch.randn(1, SIZES.words, SIZES.t5["d_model"]))
        self.pooled = nn.Parameter(torch.zeros(1, SIZES.clip_text["hidden_size"]))

    def tokens(self, image: Tensor) -> Tensor:
        """The prompt's tokens, then those that SigLIP and Redux make of images between 0 and 1."""
        side = (SIZES.siglip["image_size"],) * 2
        small = F.interpolate(image, side, mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self.redux(self.siglip(pixel_values=small * 2 - 1).last_hidden_state).image_embeds
        return torch.cat([self.prompt.expand(len(image), -1, -1), tokens], 1)

    def forward(self, z: Tensor, y: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The velocity for the latent z [B, C, h, w]."""
        batch, _, height, width = z.shape
        rows, columns = height // 2, width // 2
        noisy, condition = (F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2) for latent in (z, y))
        mask = noisy.new_zeros(batch, rows * columns, SIZES.transformer["in_channels"] - 2 * noisy.shape[2])
        positions = torch.zeros(rows, columns, 3)
        positions[..., 1], positions[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        tokens = self.transformer(
            hidden_states=torch.cat([noisy, condition, mask], 2),
            encoder_hidden_states=context,
            pooled_projections=self.pooled.expand(batch, -1),
            timestep=sigma,
            guidance=torch.full((batch,), GUIDANCE),
            img_ids=positions.flatten(0, 1),
            txt_ids=torch.zeros(context.shape[1], 3),
        ).sample
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)


@torch.no_grad()
def begin(transformer: Any) -> None:
    """Initialise the transformer so that its velocity is z - y, which leads to the encoder's latent y."""
    embed, out = transformer.x_embedder, transformer.proj_out
    width, latent = embed.out_features, out.out_features
    columns = torch.randn(width, 2 * latent + 1) / math.sqrt(width)
    columns -= columns.mean(0)  # layer norms take the mean away
    noisy, condition = torch.linalg.pinv(columns)[: 2 * latent].chunk(2)
    embed.weight.zero_()[:, : 2 * latent] = columns[:, :-1]
    embed.bias.copy_(STEADY * columns[:, -1])
    out.weight.copy_((noisy - condition) * math.sqrt((2 * latent + STEADY**2) / width))
    out.bias.zero_()


class Training:
    """The networks, and one method for each stage."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.vae: Any = AutoencoderKL(**SIZES.vae)
        self.conditioned = Conditioned()

    def stage(
        self, name: str, network: nn.Module, average: Average[Any], losses: Callable[..., Any], judged: Any
    ) -> None:
        batch = crops(10 + list(STEPS).index(name), COUNT[name], SIDE)

        def measured(step: int, images: tuple[Tensor, ...]) -> dict[str, Tensor]:
            with mixed():
                return losses(*images[:2])

        state, optimizer = {"network": network, "average": average}, adam(network.parameters())
        stage(name, self.folder, STEPS[name], PEAK[name], optimizer, state, batch, measured, average.update, judged)

    def run(self) -> None:
        self.stage_vae()
        self.stage_flow()

    def latent(self, vae: Any, image: Tensor) -> Tensor:
        return vae.encoder(image * 2 - 1).chunk(2, 1)[0].float()

    def picture(self, vae: Any, latent: Tensor) -> Tensor:
        return (vae.decoder(latent).float() + 1) / 2

    def stage_vae(self) -> None:
        """Train latents of unit variance. A degraded image shall have those of the sharp image.

        They are decoded with a little noise, as the flow leaves some.
        """
        first, *_ = crops(9, 3 * COUNT["vae"], SIDE)(0)
        linear.begin(self.vae, first * 2 - 1)
        average = Average(self.vae)

        def losses(sharp: Tensor, soft: Tensor) -> dict[str, Tensor]:
            both = self.latent(self.vae, torch.cat([sharp, soft]))
            image = self.picture(self.vae, both + 0.1 * torch.rand(len(both), 1, 1, 1) * torch.randn_like(both))
            z, y = both.chunk(2)
            mean, spread = z.mean((0, 2, 3)), z.var((0, 2, 3))
            return {
                "pixels": 4 * appearance(image, torch.cat([sharp, sharp])),
                "latents": 0.2 * (y - z.detach()).square().mean(),
                "scale": 0.02 * (mean.square() + spread.log().square()).mean(),
            }

        def judged() -> dict[str, float]:
            def again(image: Tensor) -> Tensor:
                return self.picture(average.network, self.latent(average.network, image))

            sharp = score(SIDE, lambda sharp, soft: again(sharp))["psnr"]
            return {"sharp": sharp} | score(SIDE, lambda sharp, soft: again(soft))

        self.stage("vae", self.vae, average, losses, judged)
        self.vae.load_state_dict(average.network.state_dict())
        self.vae.requires_grad_(False)

    def stage_flow(self) -> None:
        average = Average(self.conditioned)

        def losses(sharp: Tensor, soft: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                z, y = self.latent(self.vae, torch.cat([sharp, soft])).chunk(2)
            noise, time = torch.randn_like(z), torch.rand(len(z), 1, 1, 1)
            sigma = SHIFT * time / (1 + (SHIFT - 1) * time)  # mostly large, where the picture is decided
            velocity = self.conditioned(z + sigma * (noise - z), y, sigma.flatten(), self.conditioned.tokens(soft))
            return {"flow": (velocity.float() - (noise - z)).square().mean()}

        self.stage("flow", self.conditioned, average, losses, lambda: score(SIDE, self.sampler(average.network)))
        self.conditioned.load_state_dict(average.network.state_dict())

    def sampler(self, conditioned: Any, steps: int = 8) -> Callable[[Tensor, Tensor], Tensor]:
        """Euler's steps on whole crops, as in the program."""
        shift = {SCHEDULE_OPTIONS[key]: value for key, value in SIZES.schedule.items()}

        def restored(sharp: Tensor, soft: Tensor) -> Tensor:
            y, context = self.latent(self.vae, soft), conditioned.tokens(soft)
            z = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            tables = flow_shift(steps, (SIDE // SIZES.multiple) ** 2, **shift)
            for sigma, sigma_next in zip(tables["sigma"], tables["sigma_next"], strict=True):
                z = (
                    z
                    + float(sigma_next - sigma)
                    * conditioned(z, y, torch.full((len(z),), float(sigma)), context).float()
                )
            return self.picture(self.vae, z)

        return restored

    def files(self) -> dict[str, dict[str, Tensor] | str]:
        """The shipped weights in one folder, as in FLUX.1-Fill-dev with FLUX.1-Redux-dev inside."""
        model = self.conditioned
        siglip = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in model.siglip.state_dict().items()}
        return {
            "transformer/diffusion_pytorch_model": model.transformer.state_dict(),
            "vae/diffusion_pytorch_model": self.vae.state_dict(),
            "FLUX.1-Redux-dev/image_encoder/model": {k: v for k, v in siglip.items() if ".head." not in k},
            "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model": model.redux.state_dict(),
            "prompt": {"prompt_embeds": model.prompt.detach(), "pooled_prompt_embeds": model.pooled.detach()},
            **config_files(),
        }


def config_files() -> dict[str, str]:
    """The configuration files of the published folders, with the small sizes."""
    redux = {"redux_dim": SIZES.siglip["hidden_size"], "txt_in_features": SIZES.context}
    values = {
        "transformer": (configs.FLUX, SIZES.transformer),
        "vae": (configs.VAE, {**SIZES.vae, "sample_size": SIZES.tile_px}),
        "scheduler": (configs.FLOW, SIZES.schedule),
        "FLUX.1-Redux-dev/image_encoder": (configs.SIGLIP, SIZES.siglip),
        "FLUX.1-Redux-dev/image_embedder": (configs.REDUX, redux),
        "FLUX.1-Redux-dev/feature_extractor": (configs.SIGLIP_PROCESSOR, SIZES.siglip_processor),
    }
    return {f"{folder}/{form.file}": config(form, sizes) for folder, (form, sizes) in values.items()}


if __name__ == "__main__":
    sys.exit(command.main(__doc__, Training))
