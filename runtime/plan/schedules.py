"""Sampling schedules. Each is a function that gives float32 tables with one row for each step.

A program names its schedule, so all have the signature `(count, tokens, **options)`; only `flow_shift` uses `tokens`.
Tables are computed in float64 and rounded once.
"""

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from tilewright.runtime.errors import UsageError

__all__ = ["SCHEDULES", "ddim", "ddpm", "flow_shift"]

Tables = dict[str, npt.NDArray[np.float32]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TRAINING_STEPS = 1000
LARGEST_MU = 100  # sigmas of a larger shift are all 1 as float32
BETA_EXPONENTS = {"linear": 1.0, "scaled_linear": 0.5}  # betas ** exponent rises linearly
FINAL_ALPHAS = "first", "one"  # alpha-bar after the last step: that of the first training step, or 1


def flow_shift(
    count: int,
    tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    min_mu: float | None = None,
    max_mu: float | None = None,
) -> Tables:
    """Flow matching's sigmas, shifted towards noise as the number of tokens grows (the FLUX family).

    The shift mu is a line through `base_shift` at `base_tokens` and `max_shift` at `max_tokens`.
    """
    _check_count(count)
    if tokens < 1:
        raise UsageError(f"tokens={tokens} is no token count; use 1 or more")
    if not 0 < base_tokens < max_tokens:
        raise UsageError(f"base_tokens={base_tokens}, max_tokens={max_tokens} give no line; use 0 < base < max")
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = mu if min_mu is None else max(mu, min_mu)
    mu = mu if max_mu is None else min(mu, max_mu)
    if not abs(mu) <= LARGEST_MU:
        raise UsageError(f"a shift of {mu} leaves no steps; bound it between -{LARGEST_MU} and {LARGEST_MU}")
    shift = np.exp(mu)
    base = np.linspace(1, 1 / count, count)
    sigma = shift / (shift + (1 / base - 1))
    return _tables(sigma=sigma, sigma_next=np.append(sigma[1:], 0))


def ddim(
    count: int, tokens: int, *, betas: str, beta_start: float, beta_end: float, spacing_offset: int, final_alpha: str
) -> Tables:
    """DDIM with eta 0: x0 = (z - beta eps) / alpha, then z' = alpha_next x0 + beta_next eps."""
    bar = _alpha_bar(betas, beta_start, beta_end)
    _check_choice("final_alpha", final_alpha, FINAL_ALPHAS)
    t = _timesteps(count, spacing_offset)
    following = _lookup(bar, t - TRAINING_STEPS // count, 1.0 if final_alpha == "one" else bar[0])
    return _tables(t=t, **_levels(bar[t]), alpha_next=np.sqrt(following), beta_next=np.sqrt(1 - following))


def ddpm(
    count: int, tokens: int, *, betas: str, beta_start: float, beta_end: float, spacing_offset: int, final_alpha: str
) -> Tables:
    """Ancestral DDPM: z' = x0_weight x0 + z_weight z + noise_weight n.

    It always ends at alpha 1. `final_alpha` has no effect; it is accepted so that a program can replace `ddim`.
    """
    bar = _alpha_bar(betas, beta_start, beta_end)
    _check_choice("final_alpha", final_alpha, FINAL_ALPHAS)
    t = _timesteps(count, spacing_offset)
    following = _lookup(bar, np.append(t[1:], -1), 1.0)
    step = bar[t] / following
    remaining = (1 - following) / (1 - bar[t])
    return _tables(
        t=t,
        **_levels(bar[t]),
        x0_weight=np.sqrt(following) * (1 - step) / (1 - bar[t]),
        z_weight=np.sqrt(step) * remaining,
        noise_weight=np.sqrt(remaining * (1 - step)),
    )


SCHEDULES: dict[str, Callable[..., Tables]] = {"flow_shift": flow_shift, "ddim": ddim, "ddpm": ddpm}


def _tables(**columns: Floats | Ints) -> Tables:
    return {name: column.astype(np.float32) for name, column in columns.items()}


def _levels(bar: Floats) -> dict[str, Floats]:
    return {"alpha": np.sqrt(bar), "beta": np.sqrt(1 - bar)}


def _alpha_bar(betas: str, start: float, end: float) -> Floats:
    _check_choice("betas", betas, BETA_EXPONENTS)
    exponent = BETA_EXPONENTS[betas]
    if not 0 < start <= end < 1:
        raise UsageError(f"beta_start={start}, beta_end={end} is no noise schedule; use 0 < beta_start <= beta_end < 1")
    rising: Floats = np.linspace(start**exponent, end**exponent, TRAINING_STEPS) ** (1 / exponent)
    return np.cumprod(1 - rising, dtype=np.float64)


def _timesteps(count: int, offset: int) -> Ints:
    """Falling time steps with leading spacing: multiples of the stride plus the offset."""
    _check_count(count, TRAINING_STEPS)
    stride = TRAINING_STEPS // count
    largest = TRAINING_STEPS - 1 - (count - 1) * stride
    if not 0 <= offset <= largest:
        raise UsageError(f"spacing_offset={offset} with {count} steps leaves the schedule; use 0 to {largest}")
    return np.arange(count - 1, -1, -1) * stride + offset


def _lookup(bar: Floats, t: Ints, final: float) -> Floats:
    return np.where(t >= 0, bar[np.maximum(t, 0)], final)


def _check_count(count: int, largest: int | None = None) -> None:
    if count < 1 or (largest is not None and count > largest):
        raise UsageError(f"count={count} is no number of steps; use {f'1 to {largest}' if largest else '1 or more'}")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r} is not one of {', '.join(choices)}")
