"""The engines and devices for a bundle on this machine, and how they are opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.measured import on_processor
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.engines import Engine, Opening, backend
from tilewright.runtime.engines.choose import choose_all, largest_batch, require, tile_sides
from tilewright.runtime.engines.driver import first_gpu
from tilewright.runtime.engines.machine import this_machine, usable_cores
from tilewright.runtime.engines.trust import strangers
from tilewright.runtime.execute.cuda import CudaDevice
from tilewright.runtime.execute.devices import CpuDevice, Device, OpenEngines, device_names
from tilewright.runtime.inputs import whole
from tilewright.runtime.memory.estimate import all_on_gpu, all_open
from tilewright.runtime.memory.machine import available_bytes

__all__ = ["Opened", "Setup", "open_here", "set_up"]

MOST_THREADS = 1024


@dataclass(frozen=True)
class Setup:
    """The engines and devices for a bundle on this machine. Nothing is open."""

    bundle: Bundle  # with the batch that is asked for
    specs: dict[str, EngineSpec]  # component -> its engine
    devices: list[str]
    threads: int  # of a device; 0: all cores

    @property
    def shared(self) -> bool:
        """Whether the devices share their engines."""
        return self.threads == 1


def set_up(
    bundle: Bundle,
    *,
    engine: str | None = None,
    devices: Sequence[str] = ("cpu:0",),
    threads: int = 0,
    batch: int | None = None,
    tile: int | None = None,
) -> Setup:
    """Choose engines and devices; options as for `load`."""
    threads = whole("threads", threads, 0, MOST_THREADS)
    side = None if tile is None else whole("tile", tile, 0)
    names = device_names(devices)
    if len(names) > 1 and not threads:
        threads = max(1, usable_cores() // len(names))
    components = {name: bundle.manifest.components[name] for name in sorted(bundle.program.components())}
    packages = {package for c in components.values() for spec in c.engines for package in spec.needs.packages}
    machine = this_machine(packages, {name.partition(":")[0] for name in names})
    known, sides = on_processor(bundle.root, machine.processor), tile_sides(bundle.program, side)
    strange = strangers(bundle.manifest)
    specs = require(choose_all(components, machine, engine, measured=known, sides=sides, strange=strange))
    program = bundle.program.cut(min(spec.profile.side_px.most for spec in specs.values()))
    if program != bundle.program:
        bundle = replace(bundle, program=program)
    most = largest_batch(specs.values())
    if batch is not None:
        bundle = replace(bundle, program=bundle.program.batched(whole("batch", batch, 1, most)))
    elif any(p.tiles.batch > most for p in bundle.program.passes if p.tiles):
        bundle = replace(bundle, program=bundle.program.batched(most))
    return Setup(bundle, specs, names, threads)


@dataclass(frozen=True)
class Opened:
    """Devices that run the same engines."""

    devices: Sequence[Device]
    engines: OpenEngines  # of the first device; it is empty if other processes run them
    bundle: Bundle  # with the program for these engines
    specs: dict[str, EngineSpec]
    threads: int  # of a device
    fits: bool  # all engines are open at once


def open_here(
    setup: Setup, memory: str, weights_dir: Path | None, limit: int | None = None, copies: int | None = None
) -> Opened:
    """The devices of this machine. Their engines are open, if they all fit in memory, or in `limit` bytes.

    `copies`: how many devices of this machine have engines of their own, also in other processes.
    """
    bundle, specs, names = setup.bundle, setup.specs, setup.devices
    opening = Opening(memory, setup.threads, len(names) if setup.shared else 1, weights_dir)

    def open_engine(name: str) -> Engine:
        engine: Engine = backend(specs[name].backend).open_engine(bundle, name, specs[name], opening)
        return engine

    # engines of one thread run on the thread that calls them, so devices of one thread can share them
    shared = OpenEngines(bundle.program.components(), open_engine)
    engines_of_device = [shared] + [
        shared if setup.shared else OpenEngines(shared.names, open_engine) for _ in names[1:]
    ]
    free = available_bytes()
    free = limit if free is None or (limit is not None and limit < free) else free
    if names == ["cuda:0"]:
        fits = all_on_gpu(bundle, specs, memory, first_gpu().memory()[0])
    else:
        fits = all_open(bundle, specs, memory, free, copies or (1 if setup.shared else len(names)))
    devices = [_device(name, engines) for name, engines in zip(names, engines_of_device, strict=True)]
    if fits:
        for engines in engines_of_device:
            for name in engines:
                engines[name]
    return Opened(devices, shared, bundle, specs, setup.threads or usable_cores(), fits)


def _device(name: str, engines: Mapping[str, Engine]) -> Device:
    """The device of this name."""
    return CpuDevice(name, engines) if name.startswith("cpu") else CudaDevice(name, engines, first_gpu())
