"""TokSR in PyTorch's own blocks in float64, one tile at a time, under the published names."""

import math
from collections import OrderedDict
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Denoiser", "picture_of", "tokens_of"]


class Block(nn.Module):
    """A block of the tokenizer, of PyTorch's own modules under the published names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        linears = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(linears))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed)[0]
        return x + self.mlp(self.ln_2(x))


class Half(nn.Module):
    """Encoder or decoder, whole sequences of one tile through each block."""

    def __init__(self, sizes: dict[str, Any], half: dict[str, Any], *, encoder: bool) -> None:
        super().__init__()
        width, patch, self.patches = half["width"], sizes["patch"], (sizes["image"] // sizes["patch"]) ** 2
        tables = {"class": (1, width), "positional": (self.patches + 1, width)}
        tables["latent_token_positional"] = (sizes["latents"], width)
        if half.get("text", True):
            tables["text_guidance_positional"] = (sizes["words"], width)
            self.text_guidance_proj = nn.Linear(sizes["text_width"], width)
        if encoder:
            self.patch_embed = nn.Conv2d(3, width, patch, patch)
            self.conv_out = nn.Conv2d(width, 2 * sizes["token"], 1)
        else:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            self.decoder_embed = nn.Linear(sizes["token"], width)
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch * patch, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        for name, shape in tables.items():
            self.register_parameter(f"{name}_embedding", nn.Parameter(torch.empty(shape)))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Sequential(*(Block(width, half["heads"]) for _ in range(half["layers"])))

    def rows(self, patches: Tensor, latents: Tensor, words: Tensor | None) -> Tensor:
        own = torch.cat((self.class_embedding, patches)) + self.positional_embedding
        parts = [own, latents + self.latent_token_positional_embedding]
        if words is not None:
            parts.append(self.text_guidance_proj(words) + self.text_guidance_positional_embedding)
        return self.ln_post(self.transformer(self.ln_pre(torch.cat(parts))[None]))[0]

    def encoded(self, image: Tensor, latent_tokens: Tensor, words: Tensor | None) -> Tensor:
        """The mean [token, 1, latents] of an image [3, S, S]."""
        x = self.rows(self.patch_embed(image[None])[0].flatten(1).T, latent_tokens, words)
        moments = self.conv_out(x[1 + self.patches :][: len(latent_tokens)].T[None, :, None])[0]
        return moments[: len(moments) // 2]

    def decoded(self, tokens: Tensor, words: Tensor) -> Tensor:
        """An image [3, S, S] of latents [token, 1, latents]."""
        x = self.rows(self.mask_token[0].repeat(self.patches, 1), self.decoder_embed(tokens[:, 0].T), words)
        grid = math.isqrt(self.patches)
        x = self.ffn(x[1 : 1 + self.patches].T.unflatten(1, (grid, grid))[None])
        size = math.isqrt(x.shape[1] // 3)
        picture = torch.empty(1, 3, grid * size, grid * size, dtype=x.dtype)
        for p1, p2, c in product(range(size), range(size), range(3)):  # the order of the channels
            picture[:, c, p1::size, p2::size] = x[:, (p1 * size + p2) * 3 + c]
        return self.conv_out(picture)[0]


def reference(network: nn.Module, sizes: dict[str, Any], half: str) -> Half:
    """PyTorch's own modules with the network's weights, which must have the published names."""
    with torch.device("meta"):
        module = Half(sizes, sizes[half], encoder=half == "encoder")
    state = {name[8:]: w.double() for name, w in network.state_dict().items() if name.startswith(f"{half}.")}
    assert len(network.state_dict()) == len(state) + (half == "encoder")  # the latent tokens are its only other
    module.load_state_dict(state, assign=True)
    return module.eval()


def tokens_of(network: Any, sizes: dict[str, Any], image: Tensor, words: Tensor | None = None) -> Tensor:
    module, learned = reference(network, sizes, "encoder"), network.latent_tokens.double()
    text = None if words is None else words[0].double()
    return sizes["scale"] * torch.stack([module.encoded(tile, learned, text) for tile in image.double()])


def picture_of(network: Any, sizes: dict[str, Any], tokens: Tensor, words: Tensor) -> Tensor:
    module = reference(network, sizes, "decoder")
    picture = torch.stack([module.decoded(t / sizes["scale"], words[0].double()) for t in tokens.double()])
    assert 0.1 < ((picture > 0) & (picture < 1)).double().mean() < 0.9  # clamping is seen, and not all there is
    return picture.clamp(0, 1)


class Denoiser:
    """The denoiser of one tile and one label, read from the state dict."""

    def __init__(self, network: Any, heads: int) -> None:
        self.weights = {name.removeprefix("dit."): w.double() for name, w in network.state_dict().items()}
        self.heads = heads
        self.layers = len({name.split(".")[1] for name in self.weights if name.startswith("blocks.")})

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attention(self, x: Tensor, seen: Tensor, name: str, *projections: str) -> Tensor:
        attention = nn.MultiheadAttention(x.shape[1], self.heads, bias=False, dtype=torch.float64)
        weights = torch.cat([self.weights[f"{name}.{projection}.weight"] for projection in projections])
        attention.load_state_dict({"in_proj_weight": weights, "out_proj.weight": torch.eye(x.shape[1])})
        x = attention(x, seen, seen)[0]
        return self.linear(x, f"{name}.out") if f"{name}.out.weight" in self.weights else x

    def __call__(self, noisy: Tensor, given: Tensor, t: float, labels: Tensor) -> Tensor:
        """Tokens [token, 1, latents] and labels [T, D] to the answer [token, 1, latents]."""
        positions = self.weights["positions.weight"]
        x = torch.cat([self.linear(tokens[:, 0].T, "embed") + positions for tokens in (noisy, given)])
        angles = torch.tensor([t * math.exp(-math.log(10_000) * i / 128) for i in range(128)], dtype=torch.float64)
        time = self.linear(F.silu(self.linear(torch.cat((angles.cos(), angles.sin())), "time.0")), "time.2")
        condition = self.norm(torch.cat((time[None], self.linear(labels, "label"))), "condition_norm")
        for i in range(self.layers):
            block = f"blocks.{i}"
            y = self.norm(x, f"{block}.ln_1")
            x = x + self.attention(y, y, f"{block}.attn", "qkv")
            x = x + self.attention(self.norm(x, f"{block}.ln_2"), condition, f"{block}.cross", "q", "kv")
            y = F.gelu(self.linear(self.norm(x, f"{block}.ln_3"), f"{block}.mlp.c_fc"))
            x = x + self.linear(y, f"{block}.mlp.c_proj")
        return self.linear(x, "out")[: noisy.shape[2]].T[:, None]
