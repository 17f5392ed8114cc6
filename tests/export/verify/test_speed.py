"""The speed of engines is measured for every component, with all cores, and nobody's tiles but the bundle's."""

from pathlib import Path

import pytest

from tilewright.export.verify.sample import sample_photo
from tilewright.export.verify.speed import ROUNDS, seconds_of
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines.machine import usable_cores
from tilewright.runtime.execute.walk import Job
from tilewright.runtime.images.canvas import Enlarged


@pytest.mark.slow
def test_each_component_has_a_time_and_the_engines_have_all_cores(hitoksr_tiny: Path) -> None:
    bundle, seen = read_bundle(hitoksr_tiny), []
    program = bundle.program
    side = program.passes[0].tiles.px
    image = Enlarged(sample_photo(side, side, program.scale), program.scale, program.multiple_px, 1)
    job = Job(image, on_progress=lambda name, done, total: seen.append((done, total)))
    threads, seconds = seconds_of(bundle, ["ort-float32"], job, None)
    assert threads == usable_cores() and not job.seconds
    assert seconds.keys() == {"ort-float32"} and seconds["ort-float32"].keys() == program.components()
    assert all(value > 0 for value in seconds["ort-float32"].values())
    assert seen.count((1, 1)) == ROUNDS + 1  # a run is one tile
