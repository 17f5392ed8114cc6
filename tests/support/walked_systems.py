"""The systems' components as toys, and plain loops over steps and tiles that give what their programs must."""

import numpy as np

from support.walks import blurred, boxes, diffusion, field, flow, grown, joined, mean_of, shrunk, under

__all__ = [
    "FIXED",
    "FIXED_TABLES",
    "HITOKSR",
    "IN_TOKEN",
    "IN_TOKEN_CONSTANTS",
    "PRIVATE_CONSTANTS",
    "RESIDUALS",
    "STEERED",
    "STEERED_CONSTANTS",
    "SYSTEMS",
    "VICR",
    "VICR_INPUTS",
    "first_rows",
    "hitoksr_reference",
    "in_token_modulate",
    "in_token_reference",
    "in_token_step",
    "private",
    "private_reference",
    "private_step",
    "steered_aggregate",
    "steered_denoise",
    "steered_reference",
    "vicr_modulate",
    "vicr_reference",
    "vicr_step",
    "without_noise",
]


def per_tile(numbers):
    """Numbers [B], one for each tile, as factors of images [B, C, H, W]."""
    return numbers[:, None, None, None]


# HiTokSR: calls in a row on a tile

HITOKSR = {
    "generate": lambda image: {"codes": blurred(shrunk(image, 16, 32)), "indices": None},
    "decode": lambda codes: {"image": grown(codes, 16)},
}


def hitoksr_reference(image, tile=512, overlap=64):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    parts = [grown(blurred(shrunk(under(image, box), 16, 32)), 16) for box in tiles]
    return joined(parts, tiles, overlap, height, width)


# In-Token: joined every step, tiled passes that share their tiles, a schedule's tables and a table all tiles share


def in_token_modulate(pooled, guidance, sigmas):
    return {"modulation": sigmas[:, :, None] * np.stack([pooled.sum(1) / guidance, pooled.mean(1)], 1)[:, None]}


def in_token_step(z, y, context, seen, modulation, sigma, sigma_next):
    shift = per_tile(context.sum(1) + modulation[:, 0] - modulation[:, 1])
    return {"z_next": z + per_tile(sigma_next - sigma) * (0.6 * blurred(z) + 0.3 * y + seen + shift)}


IN_TOKEN_CONSTANTS = {"context": np.float32([[0.1, -0.2, 0.3, -0.3]]), "pooled": np.float32([[0.3, 0.4, -0.1]])}
IN_TOKEN = {
    "modulate": in_token_modulate,
    "encode": lambda image: {"latent": blurred(shrunk(image, 8, 16))},
    "see": lambda image: {"features": mean_of(image)},
    "redux": lambda features: {"tokens": 2 * features},
    "step": in_token_step,
    "decode": lambda latent: {"image": grown(blurred(latent), 8)},
}
FIXED = {name: function for name, function in IN_TOKEN.items() if name != "modulate"}
FIXED_TABLES = {  # of tiles of 1024 and of 512 px, as a build makes them
    f"modulation.{tokens}": np.random.default_rng(tokens).normal(0, 0.1, (1, 28, 2)).astype(np.float32)
    for tokens in (64 * 64, 32 * 32)
}


def first_rows(steps):
    """The constants as a build for fewer steps and fixed tiles would hold them."""
    return IN_TOKEN_CONSTANTS | {name: table[:, :steps] for name, table in FIXED_TABLES.items()}


def in_token_reference(image, tile, overlap, steps=28, guidance=30.0, table=None, places=None):
    """`places`: step -> where the tiles lie then."""
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    y = joined([blurred(shrunk(under(image, box), 8, 16)) for box in tiles], tiles, overlap, height, width, 8)
    z = field(0, 0, 16, height // 8, width // 8).astype(np.float64)
    seen = [2 * mean_of(under(image, box)) for box in tiles]
    context, pooled = (IN_TOKEN_CONSTANTS[name].astype(np.float64) for name in ("context", "pooled"))
    sigma, sigma_next = flow(steps, min(tile, height) * min(tile, width) // 256)
    if table is None:
        table = in_token_modulate(pooled, np.array([guidance]), sigma[None].astype(np.float64))["modulation"]
    for i in range(steps):
        moved, there = [], places(i) if places else tiles
        for box, e in zip(there, seen, strict=True):
            scalars = table[:, i], np.float64(sigma[[i]]), np.float64(sigma_next[[i]])
            moved.append(in_token_step(under(z, box, 8), under(y, box, 8), context, e, *scalars)["z_next"])
        z = joined(moved, there, overlap, height, width, 8)
    return joined([grown(blurred(under(z, box, 8)), 8) for box in tiles], tiles, overlap, height, width)


# VICR: an untiled pass before a tiled one, private state, a value of the tile read row by row


def vicr_modulate(pooled, guidance, bridge, sigmas):
    return {"modulation": sigmas[:, :, None] * (pooled * guidance[:, None] / 30 + bridge)[:, None]}


def vicr_step(z, y, context, modulation, sigma, sigma_next):
    velocity = 0.6 * blurred(z) + 0.3 * y + per_tile(context.mean((1, 2)) + modulation.sum(1))
    return {"z_next": z + per_tile(sigma_next - sigma) * velocity}


VICR = {
    "t5": lambda ids: {"context": ids.astype(np.float32)[:, :, None] / 100},
    "clip": lambda ids: {"pooled": ids[:, :3].astype(np.float32) / 100},
    "encode": lambda image: {"latent": np.concatenate([shrunk(image, 8, 16), shrunk(image, 8, 16) * 0], 3)},
    "see": lambda image: {"embeds": image.mean((2, 3))},
    "bridge": lambda embeds: {"bridge": embeds[:, ::-1] * 2},
    "modulate": vicr_modulate,
    "step": vicr_step,
    "decode": lambda latent: {"image": grown(latent[..., latent.shape[3] // 2 :], 8)},
}
VICR_INPUTS = {"t5_ids": np.arange(512)[None], "clip_ids": np.arange(77)[None]}


def vicr_reference(image, tile, overlap, steps=30):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    h, w = min(tile, height) // 8, min(tile, width) // 8
    context, pooled = VICR_INPUTS["t5_ids"][:, :, None] / 100, VICR_INPUTS["clip_ids"][:, :3] / 100
    sigma, sigma_next = flow(steps, h * w * 64 // 128)
    parts = []
    for index, box in enumerate(tiles):
        z = field(1 + index, 0, 16, h, 2 * w).astype(np.float64)[None]
        crop = under(image, box)
        y, bridge = VICR["encode"](crop)["latent"], crop.mean((2, 3))[:, ::-1] * 2
        modulation = vicr_modulate(pooled, np.array([30.0]), bridge, sigma[None].astype(np.float64))["modulation"]
        for i in range(steps):
            levels = np.float64(sigma[[i]]), np.float64(sigma_next[[i]])
            z = vicr_step(z, y, context, modulation[:, i], *levels)["z_next"]
        parts.append(grown(z[..., w:], 8))
    return joined(parts, tiles, overlap, height, width)


# The steered program: a start from noise, joined latents beside private values, three calls a step, fresh noise, inputs

STEERED_CONSTANTS = {
    "clip_ids": np.arange(154).reshape(1, 2, 77),
    "bigg_ids": np.arange(154).reshape(1, 2, 77) % 7,
    "start_alpha": np.float32([0.086803]),
    "start_beta": np.float32([0.996226]),
}
RESIDUALS = [*(f"r{i}" for i in range(9)), "mid"]


def steered_aggregate(y, previews, pooled, t, delta, adares, control_scale):
    difference = (y - previews[:, 1]) * delta[:, :, None, None] * per_tile(control_scale * (1 + adares))
    difference = difference + per_tile(pooled.mean((1, 2)) + t / 1e4)
    return {name: difference * (i + 1) / 200 for i, name in enumerate(RESIDUALS)}


def steered_denoise(z, tokens, context, pooled, previews, preview, guidance, sampler, noise, t, **rest):
    residual = sum(rest[name] for name in RESIDUALS)
    alpha, beta, alpha_next, beta_next = (per_tile(rest[n]) for n in ("alpha", "beta", "alpha_next", "beta_next"))
    x0 = 0.3 * blurred(z) + tokens + residual + per_tile(context + pooled.mean((1, 2)) / guidance + t / 1e4)
    eps = (z - alpha * x0) / beta
    moved = alpha_next * x0 + beta_next * eps + per_tile(0.01 + 0.02 * sampler) * noise
    change, whole = np.abs(previews[:, 1] - x0).mean((1, 2, 3)), np.abs(previews[:, 1] - preview).mean((1, 2, 3))
    return {"z": moved, "preview": previews[:, 1], "delta": (change / (change + whole))[:, None]}


STEERED = {
    "text": lambda clip_ids, bigg_ids: {
        "context": np.float32(clip_ids.mean((1, 2)) / 100),
        "pooled": np.float32(bigg_ids),
    },
    "encode": lambda image: {"latent": shrunk(image, 8, 4)},
    "start": lambda latent, noise, alpha, beta: {"z": per_tile(alpha) * latent + per_tile(beta) * noise},
    "see": lambda image: {"tokens": mean_of(image), "preview_tokens": mean_of(image) * 2},
    "preview": lambda z, tokens, context, pooled, t, alpha, beta: {
        "previews": np.stack(
            [
                z,
                blurred(z) * per_tile(alpha)
                + tokens * per_tile(beta)
                + per_tile(context - pooled.mean((1, 2)) - t / 1e4),
            ],
            1,
        )
    },
    "aggregate": steered_aggregate,
    "denoise": steered_denoise,
    "decode": lambda latent: {"image": grown(latent, 8)},
}


def steered_reference(image, tile_px, overlap, guidance=7.0, adares=0, sampler=0, steps=30):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile_px, overlap)
    h, w = height // 8, width // 8
    context = np.float64(np.float32(STEERED_CONSTANTS["clip_ids"].mean((1, 2)) / 100))
    asked = {"guidance": np.array([guidance]), "sampler": np.array([sampler])}
    pooled = STEERED_CONSTANTS["bigg_ids"].astype(np.float64)
    y = shrunk(image[None], 8, 4)[0]
    z = 0.086803 * y + 0.996226 * field(0, 0, 4, h, w).astype(np.float64)
    seen = [mean_of(under(image, box)) for box in tiles]
    before = [np.zeros_like(under(y, box, 8)) for box in tiles]
    deltas = [np.ones((1, 1)) for _ in tiles]
    for i, row in enumerate(diffusion(steps, 2, 0.00085, 0.012, 1, "first").astype(np.float64)):
        t, alpha, beta, alpha_next, beta_next = row[:, None]
        noise = field(0, 1 + i, 4, h, w).astype(np.float64)
        moved = []
        for k, box in enumerate(tiles):
            crop = under(z, box, 8)
            previews = STEERED["preview"](crop, seen[k] * 2, context, pooled, t, alpha, beta)["previews"]
            control = (np.array([adares]), np.ones(1))
            residuals = steered_aggregate(under(y, box, 8), previews, pooled, t, deltas[k], *control)
            levels = {"alpha": alpha, "beta": beta, "alpha_next": alpha_next, "beta_next": beta_next}
            job = {"context": context, "pooled": pooled, "t": t}
            tile = {"z": crop, "tokens": seen[k], "previews": previews, "preview": before[k]}
            tile["noise"] = under(noise, box, 8)
            after = steered_denoise(**tile, **job, **asked, **levels, **residuals)
            moved.append(after["z"])
            before[k], deltas[k] = after["preview"], after["delta"]
        z = joined(moved, tiles, overlap, height, width, 8)
    return grown(z[None], 8)[0]


# The private program: batches of tiles, private noise


def private(height, width):
    """Engines for tiles of that size: tokens say nothing of it."""

    def detokenise(tokens, words):
        rows, columns = np.arange(height)[:, None] % 16, np.arange(width) % 32
        mean = words.mean(1)[:, None, None]
        return {"image": np.stack([tokens[:, rows, 0, columns] * (c + 1) + mean for c in range(3)], 1)}

    return {
        "text": lambda ids: {"words": ids.astype(np.float32) / 10, "pooled": ids[:, :2].astype(np.float32) / 10},
        "tokenise": lambda image, words: {
            "tokens": np.broadcast_to(image[:, :1, :1, :32], (len(image), 16, 1, 32)) * per_tile(words[:, 1])
        },
        "step": private_step,
        "detokenise": detokenise,
    }


def private_step(tokens, condition, pooled, guidance, t, alpha, beta, alpha_next, beta_next):
    alpha, beta, alpha_next, beta_next = map(per_tile, (alpha, beta, alpha_next, beta_next))
    x0 = 0.4 * tokens + 0.3 * condition * per_tile(guidance) + per_tile(pooled.max(1) + t / 1e4)
    return {"tokens": alpha_next * x0 + beta_next * (tokens - alpha * x0) / beta}


PRIVATE_CONSTANTS = {"empty_ids": np.arange(77)[None] % 5}


def private_reference(image, tile, overlap, guidance=1.0, steps=25):
    height, width = image.shape[1:]
    tiles = boxes(height, width, tile, overlap)
    engines = private(*tiles[0][2:])
    ids = PRIVATE_CONSTANTS["empty_ids"].astype(np.float64)
    words, pooled = ids / 10, ids[:, :2] / 10
    parts = []
    for index, box in enumerate(tiles):
        tokens = field(1 + index, 0, 16, 1, 32).astype(np.float64)[None]
        condition = engines["tokenise"](under(image, box), words)["tokens"]
        for row in diffusion(steps, 1, 1e-4, 2e-2, 0, "one").astype(np.float64):
            tokens = private_step(tokens, condition, pooled, np.array([guidance]), *row[:, None])["tokens"]
        parts.append(engines["detokenise"](tokens, words)["image"])
    return joined(parts, tiles, overlap, height, width)


def without_noise(function):
    return lambda noise=None, **inputs: function(**inputs)


SYSTEMS = {
    "hitoksr": (HITOKSR, {}, {}),
    "in-token": (IN_TOKEN, IN_TOKEN_CONSTANTS, {}),
    "steered": (STEERED, STEERED_CONSTANTS, {}),
    "private": (private(64, 64), PRIVATE_CONSTANTS, {}),
    "vicr": (VICR, {}, VICR_INPUTS),
}
