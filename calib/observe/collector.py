"""Collecting statistics: restore the images of a folder with a bundle, and observe the tensors inside its networks.

After each image, all that was observed is kept beside the statistics. A collection that was stopped goes on from there,
and ends with the statistics of one that was not stopped.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.calib.networks import networks_digest
from tilewright.calib.observe.observers import Observations, read_observations
from tilewright.calib.observe.watch import WatchedEngine, WatchingDevice
from tilewright.calib.pictures import IMAGES, evenly, images_in
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import checked_folder
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import AccuracyError, DeviceError, InputError, ResourceError, UsageError
from tilewright.runtime.execute.devices import OpenEngines, cpu_names
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.images.read import image_size
from tilewright.runtime.images.write import check_place
from tilewright.runtime.inputs import gather, read_tensors, whole
from tilewright.runtime.memory.estimate import all_open
from tilewright.runtime.memory.machine import available_bytes
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.restore import Restorer
from tilewright.runtime.resume.checkpoint import beside, plain
from tilewright.runtime.setup import set_up

__all__ = ["VIAS", "Collected", "collect"]

VIAS = ("engines", "torch")
LEAST_IMAGES = 2  # one picture says little of others
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Collected:
    """What was observed of which images."""

    observations: Observations
    facts: Mapping[str, Any]  # as in the file
    finished_before: int  # images that an earlier collection had observed


def collect(
    bundle: str | os.PathLike[str] | Bundle,
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    images: int = IMAGES,
    steps: int | None = None,
    tile: int | None = None,
    seed: int = 0,
    via: str = "engines",
    memory: str = "fast",
    devices: Sequence[str] = ("cpu:0",),
    threads: int = 0,
    weights_dir: str | os.PathLike[str] | None = None,
    expect: str | None = None,
    on_progress: Report = lambda done, images, share: None,
    **arguments: Any,
) -> Collected:
    """Restore images of a folder, which are as they come, and write statistics of the tensors that were seen.

    At most `images` are taken, evenly from the sorted names of the folder. The first one gets the noise of `seed`, the
    next one that of `seed + 1`. `steps`: sampling steps, where the system has any. `tile`: the side of the tiles,
    instead of the bundle's. `via`: "engines" are the bundle's graphs in ONNX Runtime, "torch" the networks that they
    were traced from. `arguments` are the bundle's, as for `Restorer.sitting`. `on_progress` gets how many images are
    done, how many there are, and the share of the work that is done. Other options as for `load`.
    """
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle, expect=expect)
    images, seed = whole("images", images, LEAST_IMAGES), whole("seed", seed, 0, WORD_MAX)
    side = max((p.tiles.px for p in bundle.program.passes if p.tiles), default=1) if tile is None else tile
    paths, target = _images(Path(folder), images, bundle.program.scale, side), Path(output)
    check_place(target)
    if via not in VIAS:
        raise UsageError(f"via={via!r} is not one of {', '.join(VIAS)}")
    restorer, watching = _open(bundle, via, memory, devices, threads, checked_folder(weights_dir))
    options = {"steps": steps, "tile": tile, **arguments}
    with restorer:
        sitting = restorer.sitting(paths[0], **options)  # refuses wrong options
        gather(restorer.bundle, sitting.arguments)
        facts = {
            "bundle": bundle.digest,
            "networks": networks_digest(bundle),
            "system": bundle.manifest.system,
            "folder": str(Path(folder).absolute()),
            "seed": seed,
            "options": {name: plain(value) for name, value in options.items()},
            "images": [{"name": path.name, "sha256": sha256_of_file(path)} for path in paths],
        }
        seen, done = _begun(beside(target), facts)
        before = done
        for place in range(done, len(paths)):
            on_progress(place, len(paths), place / len(paths))

            def share(name: str, tiles: int, total: int, place: int = place) -> None:
                passes = [p.name for p in bundle.program.passes]
                part = (passes.index(name) + tiles / max(1, total)) / len(passes)
                on_progress(place, len(paths), (place + part) / len(paths))

            noise = (seed + place) % (WORD_MAX + 1)
            _observe(restorer, paths[place], {**options, "seed": noise, "on_progress": share})
            for device in watching:
                seen.merge(device.taken())
            done = place + 1
            if done < len(paths):
                seen.write(beside(target), {**facts, "done": done})
        on_progress(len(paths), len(paths), 1.0)
    seen.write(target, facts)
    beside(target).unlink(missing_ok=True)
    return Collected(seen, facts, before)


def _images(folder: Path, most: int, scale: int, tile: int) -> list[Path]:
    """The images to restore, in the order of their names."""
    paths = images_in(folder)
    if len(paths) < LEAST_IMAGES:
        count = f"only {paths[0].name}" if paths else "no image"
        raise InputError(f"{folder} holds {count}; calibration needs {LEAST_IMAGES} images or more, 16 are usual")
    chosen = evenly(paths, most)
    for path in chosen:
        width, height = image_size(path)
        if scale * min(width, height) < tile:
            least = -(-tile // scale)
            raise InputError(
                f"{path} has {width}x{height} px and does not fill a tile of {tile} px; leave it out, or take a picture"
                f" of {least}x{least} px or more"
            )
    return chosen


def _open(
    bundle: Bundle, via: str, memory: str, names: Sequence[str], threads: int, weights_dir: Path | None
) -> tuple[Restorer, list[WatchingDevice]]:
    """A restorer whose engines are watched, and its devices. Each call takes one tile, so it has one step."""
    setup = set_up(bundle, devices=cpu_names(names), threads=threads, batch=1)
    bundle = setup.bundle

    def watching(name: str) -> WatchingDevice:
        def open_engine(component: str) -> Engine:
            look = device.look(component)
            if via == "torch":
                from tilewright.calib.observe.eager import EagerEngine

                return EagerEngine(bundle, component, weights_dir, look)
            graph, files = bundle.manifest.components[component].graph, bundle.files_of(component, weights_dir)
            return WatchedEngine(bundle.path(graph), files, look, memory=memory, threads=setup.threads)

        device = WatchingDevice(name, OpenEngines(bundle.program.components(), open_engine))
        return device

    devices = [watching(name) for name in setup.devices]
    fits = all_open(bundle, setup.specs, memory, available_bytes(), len(devices))
    executor = Executor(devices, pass_by_pass=not fits, signatures=bundle.manifest.components)
    constants = read_tensors(bundle.path(bundle.manifest.constants)) if bundle.manifest.constants else {}
    engines = devices[0].opened
    return Restorer(bundle, engines, executor, setup.specs, constants, memory, threads=setup.threads), devices


def _observe(restorer: Restorer, path: Path, options: Mapping[str, Any]) -> None:
    """Restore one image."""

    def too_large() -> None:
        raise ResourceError(f"{path}: too little memory for a tile; use --memory low, or a bundle with smaller tiles")

    try:
        ticket = restorer.submit(path, **options)
        ticket.before_smaller = too_large  # the tensors of smaller tiles have other ranges
        notes = ticket.result().notes
    except AccuracyError as error:
        raise AccuracyError(f"{path}: {error}") from error
    if notes:  # tiles ran again elsewhere, and were counted twice
        raise DeviceError(f"{path}: {notes[0]}; run the same command again, it goes on from here")


def _begun(path: Path, facts: Mapping[str, Any]) -> tuple[Observations, int]:
    """What a collection that was stopped has observed, and of how many images."""
    if not path.exists():
        return Observations(), 0
    seen, before = read_observations(path)
    done = before.pop("done", 0)
    if changed := [name for name in facts if before.get(name) != facts[name]]:
        raise UsageError(
            f"{path} is of a collection with other {' and '.join(changed)}; ask for the same as before, or remove it to"
            " begin anew"
        )
    return seen, done
