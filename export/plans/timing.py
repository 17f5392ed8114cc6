"""Timing caches: what TensorRT measured of its kernels. One belongs to a GPU and a version, and says so in its head."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, writing
from tilewright.runtime.errors import EnvironmentMismatch, InputError

__all__ = ["Card", "default_place", "read_timings", "write_timings"]

AGAIN = "remove the file, or name another with --timing-cache"


@dataclass(frozen=True)
class Card:
    """The GPU and the TensorRT that plans and timings belong to."""

    gpu: str  # its name
    capability: tuple[int, int]
    tensorrt: str

    @property
    def architecture(self) -> str:
        """`sm90`, for capability 9.0."""
        return "sm{}{}".format(*self.capability)

    def __str__(self) -> str:
        return f"{self.gpu} ({self.architecture}) with TensorRT {self.tensorrt}"


def default_place(card: Card) -> Path:
    """The file for the timings of a card."""
    key = sha256_of_bytes(str(card).encode())[:12]
    return cache_dir() / "tensorrt" / f"{card.architecture}-{card.tensorrt}-{key}.timings"


def read_timings(path: Path, card: Card) -> bytes:
    """The timings in a file; nothing if there is none. Those of another card, and damaged ones, are refused."""
    if not path.exists():
        return b""
    try:
        head, _, timings = path.read_bytes().partition(b"\n")
        facts = json.loads(head)
        other = Card(str(facts["gpu"]), (int(facts["capability"][0]), int(facts["capability"][1])), facts["tensorrt"])
        digest = facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: no timing cache of Tilewright ({type(error).__name__}); {AGAIN}") from None
    if other != card:
        raise EnvironmentMismatch(f"{path}: timings of {other}, and here is {card}; {AGAIN}")
    if sha256_of_bytes(timings) != digest:
        raise InputError(f"{path}: the timing cache is damaged; {AGAIN}")
    return timings


def write_timings(path: Path, card: Card, timings: bytes) -> None:
    """Write timings with their head, completely or not at all."""
    head = json.dumps(asdict(card) | {"sha256": sha256_of_bytes(timings)}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        temporary.write_bytes(head + b"\n" + timings)
