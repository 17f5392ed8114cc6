"""What the choices of a recipe rest on: how large numbers were at each step, and how close measured pictures were."""

from dataclasses import dataclass, field

__all__ = ["Evidence", "Group", "Point"]


@dataclass(frozen=True)
class Group:
    """Layers that are judged together, alone in 8 bits."""

    name: str
    layers: tuple[str, ...]
    share: float  # of the multiplications of all layers
    mean_db: float
    worst_db: float


@dataclass(frozen=True)
class Point:
    """A point of the frontier."""

    kept: tuple[str, ...]  # groups that stay in float
    share: float  # of the multiplications of all layers in 8 bits
    linear: float  # of those of linear layers alone
    mean_db: float
    worst_db: float
    changed: float | None = None  # share of choices that differ


@dataclass(frozen=True)
class Evidence:
    """What the choices of a recipe rest on. Engines do not depend on it; the report shows it."""

    largest: dict[str, tuple[float, ...]] = field(default_factory=dict)  # input -> largest magnitude at each step
    groups: tuple[Group, ...] = ()
    frontier: tuple[Point, ...] = ()
    budget_db: float | None = None
