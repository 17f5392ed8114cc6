"""What the components of a bundle take and give while it restores a small picture."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tilewright.export.verify.sample import example_inputs, sample_photo
from tilewright.runtime import load
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.inputs import gather

Calls = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # component -> inputs, outputs


class _Recording:
    """An engine that keeps its first call, with all outputs."""

    def __init__(self, engine: Any, outputs: Iterable[str]) -> None:
        self.engine, self.outputs, self.call = engine, list(outputs), None

    def run(self, inputs: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        given = dict(inputs)
        outputs = self.engine.run(given, self.outputs)
        self.call = self.call or (given, outputs)
        return {name: outputs[name] for name in wanted}


def recorded(root: Path) -> Calls:
    """The first call of every component."""
    with load(root, threads=1) as restorer:
        bundle = restorer.bundle
        program, components = bundle.program, bundle.manifest.components
        engines = {name: _Recording(restorer.engines[name], components[name].outputs) for name in components}
        fixed = min((px for p in program.passes if p.tiles for px in p.tiles.fixed_px), default=None)
        side = fixed or 6 * program.multiple_px
        image = Enlarged(sample_photo(side, side, program.scale), program.scale, program.multiple_px, fixed or 1)
        overlap = None if fixed else 2 * program.multiple_px
        job = Job(image, tile_px=side, overlap_px=overlap, inputs=gather(bundle, example_inputs(bundle)))
        run(program, engines, restorer.constants, job)
    return {name: engine.call for name, engine in engines.items() if engine.call}
