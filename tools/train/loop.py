"""A stage of training that can be stopped at any time and continues from its last saved state."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Average", "adam", "stage"]

SAVE_EVERY_S = 120.0
Batch = TypeVar("Batch")
Network = TypeVar("Network", bound=nn.Module)


class Average(Generic[Network]):
    """A running mean of a network's weights; `network` holds the mean, which ships."""

    def __init__(self, network: Network, keep: float = 0.998) -> None:
        self.source, self.network, self.keep = network, deepcopy(network), keep
        self.network.requires_grad_(False)
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        keep = min(self.keep, self.steps / (self.steps + 9))
        mine, theirs = ([p.detach() for p in network.parameters()] for network in (self.network, self.source))
        torch._foreach_lerp_(mine, theirs, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.steps = state["steps"]


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every stage."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate: a warm-up of 100 steps, then half a cosine down to a fiftieth of the peak."""
    return peak * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def stage(
    name: str,
    folder: Path,
    steps: int,
    peak: float,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    batch: Callable[[int], Batch],
    losses: Callable[[int, Batch], dict[str, Tensor]],
    after: Callable[[], Any] = lambda: None,
    score: Callable[[], dict[str, float]] = dict,
) -> None:
    """Minimise the sum of the losses for so many steps. `state` and the optimizer are saved from time to time.

    PyTorch's random numbers are seeded by the step's number, so that a stop changes nothing. The log has lines of JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    everything = {**state, "optimizer": optimizer}
    done, spent = _restored(path, everything)
    if done == steps:
        return
    started = saved = time.monotonic()
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(batch, done)
        for step in range(done, steps):
            current = following.result()
            following = ahead.submit(batch, step + 1)
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, peak)
            terms = losses(step, current)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            norm = nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            after()
            seconds = spent + time.monotonic() - started
            last = step + 1 == steps
            if step % 50 == 0 or last:
                line = {"step": step + 1, "seconds": round(seconds, 1), "norm": norm.item()}
                line |= {key: term.item() for key, term in terms.items()}
                line |= score() if step % 500 == 0 or last else {}
                short = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
                with log.open("a") as file:
                    file.write(json.dumps(short) + "\n")
            if last or time.monotonic() - saved > SAVE_EVERY_S:
                _save(path, step + 1, seconds, everything)
                saved = time.monotonic()


def _restored(path: Path, everything: Mapping[str, Any]) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path)
    for name, part in everything.items():
        part.load_state_dict(saved["parts"][name])
    return saved["step"], saved["seconds"]


def _save(path: Path, step: int, seconds: float, everything: Mapping[str, Any]) -> None:
    parts = {name: part.state_dict() for name, part in everything.items()}
    new = path.with_suffix(".new")
    torch.save({"step": step, "seconds": seconds, "parts": parts}, new)
    new.replace(path)
