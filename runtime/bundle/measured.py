"""reports/measured.json: the accuracy and speed of a bundle's engines, on the machines where they were verified.

The file is not sealed: another run takes another time, and the same inputs must build the same bundle.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.strict import check_limits, from_json, one_line, to_json
from tilewright.runtime.errors import BundleError

__all__ = ["PSNR_GATE", "Measured", "Measurement", "Measurements", "measurements", "on_processor", "remember"]

PSNR_GATE = 40.0  # an engine in another precision than float32 must restore the picture so closely, in dB
PLACE = "reports/measured.json"
LOG = logging.getLogger("tilewright")


@dataclass(frozen=True)
class Measured:
    """One engine's error and speed."""

    relative_l2: float = field(metadata={"minimum": 0})  # of its worst output, against eager PyTorch in float32
    seconds_per_megapixel: float = field(metadata={"minimum": 0})  # of the result, for all calls of the component
    psnr_db: float | None = None  # of the picture that engines of this name restore, against eager PyTorch's in float32

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Measurement:
    """The engines that were measured in one run."""

    processor: str
    threads: int
    versions: dict[str, str]  # backend -> its version
    components: dict[str, dict[str, Measured]]  # component -> engine -> its error and speed


@dataclass(frozen=True)
class Measurements:
    """The content of the file, the latest last."""

    measurements: tuple[Measurement, ...] = ()


def measurements(root: Path) -> Measurements:
    """The measurements that lie in a bundle. A file that cannot be read counts as none, with a warning."""
    path = root / PLACE
    try:
        return from_json(Measurements, path.read_bytes(), str(path)) if path.is_file() else Measurements()
    except (OSError, BundleError) as error:
        LOG.warning("%s; engines count as not measured", one_line(str(error)))
        return Measurements()


def on_processor(root: Path, processor: str) -> dict[str, dict[str, Measured]]:
    """The engines of each component that were measured on such a processor, with the threads of the last measurement.

    The latest numbers of an engine count. Times with other threads are not compared with them.
    """
    here = [each for each in measurements(root).measurements if each.processor == processor]
    return _latest(each for each in here if each.threads == here[-1].threads)


def _latest(measured: Iterable[Measurement]) -> dict[str, dict[str, Measured]]:
    latest: dict[str, dict[str, Measured]] = {}
    for each in measured:
        for component, engines in each.components.items():
            latest.setdefault(component, {}).update(engines)
    return latest


def remember(root: Path, new: Measurement) -> None:
    """Add a measurement to those of a bundle. It replaces numbers of the same processor, threads and versions."""
    known = measurements(root).measurements
    same = [m for m in known if (m.processor, m.threads, m.versions) == (new.processor, new.threads, new.versions)]
    others = [m for m in known if m not in same]
    new = replace(new, components=_latest([*same, new]))
    path = root / PLACE
    path.parent.mkdir(exist_ok=True)
    with writing(path) as temporary:
        temporary.write_text(to_json(Measurements((*others, new))))
