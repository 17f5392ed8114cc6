"""The engines of a component beside its eager network: all calls on the same inputs, and how far the results differ."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tilewright.export.verify.eager import Eager
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import AccuracyError

__all__ = ["Paired", "difference"]

UNDECIDED = 4.0  # a choice may differ if its scores differ by fewer roundings
Floats = npt.NDArray[np.floating[Any]]


class Paired:
    """Runs the engines of a component and its eager network on the same inputs, and returns the network's outputs."""

    def __init__(self, engines: Mapping[str, Engine], eager: Eager) -> None:
        self.engines, self.eager = engines, eager
        self.exact = copy.deepcopy(eager.network).double() if hasattr(eager.network, "winners") else None
        self.pairs: dict[str, dict[str, list[tuple[Floats, Floats]]]] = {name: {} for name in engines}
        self.choices = {name: dict.fromkeys(("total", "undecided", "differ", "wrong"), 0) for name in engines}

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        theirs = self.eager.run(inputs, self.eager.names)
        exact = self._exact(inputs)
        for engine, its_engine in self.engines.items():
            ours = its_engine.run(inputs, self.eager.names)
            same = self._compare_choices(engine, exact, ours, theirs)
            for name, array in ours.items():
                if array.dtype.kind == "f":
                    compared = np.broadcast_to(same, array.shape) if same is not None else np.ones(array.shape, bool)
                    self.pairs[engine].setdefault(name, []).append((array[compared], theirs[name][compared]))
        return {name: theirs[name] for name in outputs}

    def _exact(self, inputs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The choices in float64, and where they are decided; none for a component without choices."""
        if self.exact is None:
            return None
        image = torch.from_numpy(*inputs.values())
        with torch.no_grad():
            scores, exact = self.eager.network.winners(image)[0], self.exact.winners(image.double())
        rounding = float((scores.double() - exact[0]).abs().max())
        if not math.isfinite(rounding):  # no choice would be decided, and any engine would pass
            raise AccuracyError("the scores of the choices are not finite in eager PyTorch; check the weights")
        return exact[1].numpy(), (exact[0][..., 0] - exact[0][..., 1] > UNDECIDED * rounding).numpy()

    def _compare_choices(
        self, engine: str, exact: tuple[Any, Any] | None, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> npt.NDArray[np.bool_] | None:
        """Where all choices at a position agree [B, 1, rows, columns]; none for a component without choices."""
        if exact is None:
            return None
        (chosen, decided), counts = exact, self.choices[engine]
        name = next(n for n, array in ours.items() if array.dtype.kind == "i")
        counts["total"] += decided.size
        counts["undecided"] += int((~decided).sum())
        counts["differ"] += int((ours[name] != theirs[name]).sum())
        counts["wrong"] += int(((ours[name] != chosen) & decided).sum())
        return np.asarray((ours[name] == theirs[name]).all(1, keepdims=True))

    def report(self, engine: str) -> dict[str, Any]:
        """The differences of an engine over all calls."""
        pairs = self.pairs[engine].items()
        both = {name: [np.concatenate(side) for side in zip(*calls, strict=True)] for name, calls in pairs}
        report: dict[str, Any] = {"outputs": {name: difference(*sides) for name, sides in both.items()}}
        return report | ({"choices": self.choices[engine]} if self.exact is not None else {})

    def close(self) -> None:
        """Nothing to free: the engines belong to the restorers."""


def difference(ours: Floats, reference: Floats) -> dict[str, float]:
    """The largest error, the relative L2 and the PSNR of floats against others."""
    if not reference.size:  # every choice differed, so nothing could be compared, and the engine must not pass
        return {"max_abs": 0.0, "relative_l2": 1.0, "psnr_db": 0.0}
    error = ours.astype(np.float64) - reference
    norm, peak = float(np.linalg.norm(reference.astype(np.float64))), float(np.ptp(reference))
    mean_square = float(np.mean(error**2))
    return {
        "max_abs": float(np.abs(error).max()),
        "relative_l2": float(np.linalg.norm(error)) / max(norm, 1e-30),
        "psnr_db": min(200.0, 10 * float(np.log10(max(peak, 1e-15) ** 2 / max(mean_square, 1e-60)))),
    }
