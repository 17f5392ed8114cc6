"""Devices on the machines of a Ray cluster. Each is a process there, in which a `Worker` opens engines.

Between two calls all values are here, so that a lost machine takes none with it. Constants are sent to a machine once.
"""

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import (
    BundleError,
    DeviceError,
    EnvironmentMismatch,
    ResourceError,
    TilewrightError,
    UsageError,
    amount,
)
from tilewright.runtime.estimate import all_on_gpu, all_open, available_bytes
from tilewright.runtime.execute.devices import Device, OpenEngines, finite_only
from tilewright.runtime.setup import Setup, device_of, opener, set_up

__all__ = ["Joined", "RemoteDevice", "Worker", "join"]

LOG = logging.getLogger("tilewright")

ANSWERS_S = 5.0  # an address that is there accepts a connection within so many seconds
BEGINS_S = 120.0  # a machine starts a process within so many seconds, unless it has no free cores
LARGE = 64 * 1024  # bytes; smaller arrays travel inside of a call
CHUNK = 16 * 2**20  # bytes of a file that are sent at once


class Worker:
    """One device of a machine, in a process of its own."""

    def __init__(self) -> None:
        self.bundle: Bundle | None = None
        self.weights: Path | None = None  # the folder of the weights, if they are not where the bundle says
        self.setup: Setup | None = None
        self.device: Device | None = None

    def version(self) -> str:
        """The version of Tilewright on this machine."""
        return metadata.version("tilewright")

    def find(self, root: str, digest: str, weights: str | None) -> bool:
        """Whether the bundle and its weights lie on this machine: where the caller has them, or as an earlier copy."""
        copy = _copy_of(digest)
        for place, folder in ((Path(root), weights and Path(weights)), (copy, None)):
            try:
                bundle = read_bundle(place, expect=digest)
                for name in bundle.weights.folders:
                    bundle.folder(name, folder or None)
            except (TilewrightError, OSError):
                continue
            self.bundle, self.weights = bundle, folder or None
            return True
        return False

    def receive(self, digest: str, token: str, name: str, data: bytes) -> None:
        """Add bytes to a file of a copy that is not complete yet."""
        file = _copy_of(digest, token) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            opened.write(data)

    def end(self, digest: str, token: str, *, complete: bool) -> None:
        """Put a copy in its place, or throw it away."""
        copy = _copy_of(digest)
        if complete:
            shutil.rmtree(copy, ignore_errors=True)  # `find` refused it
            _copy_of(digest, token).rename(copy)
        else:
            shutil.rmtree(_copy_of(digest, token), ignore_errors=True)

    def choose(self, device: str, options: Mapping[str, Any]) -> Setup:
        """Choose engines for this machine."""
        assert self.bundle is not None
        self.setup = set_up(self.bundle, devices=[device], **options)
        return self.setup

    def open(self, memory: str, workers: int) -> bool:
        """Open the engines, if those of all workers of this machine fit in its memory; whether they do."""
        setup = self.setup
        assert setup is not None
        opened = opener(setup, memory, weights_dir=self.weights)
        engines = OpenEngines(setup.bundle.program.components(), opened)
        self.device = device_of(setup.devices[0], engines)
        gpu = getattr(self.device, "gpu", None)
        if gpu is not None:
            fits = all_on_gpu(setup.bundle, setup.specs, memory, gpu.memory()[0])
        else:
            fits = all_open(setup.bundle, setup.specs, memory, available_bytes(), workers)
        if fits:
            for name in engines:
                engines[name]
        return fits

    def run(self, component: str, names: Sequence[str], outputs: Sequence[str], *values: Any) -> dict[str, Any]:
        """The outputs of a component, as arrays."""
        device = self.device
        assert device is not None
        feed = {name: device.put(value) for name, value in zip(names, values, strict=True)}
        return {name: device.get(buffer) for name, buffer in device.run(component, feed, outputs).items()}

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        if stop := getattr(self.device, "stop", None):
            stop()

    def close(self, components: Sequence[str]) -> None:
        """Close engines."""
        if self.device is not None:
            self.device.close(components)


def _copy_of(digest: str, token: str = "") -> Path:
    """The place on a machine of a bundle that was sent there, or is being sent."""
    return cache_dir() / "cluster" / (f".{digest}.{token}.part" if token else digest)


@dataclass(frozen=True)
class Sent:
    """An array that Ray's object store holds, where each machine fetches it once."""

    array: Any
    reference: Any
    holder: "RemoteDevice"

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the array."""
        shape: tuple[int, ...] = self.array.shape
        return shape


class RemoteDevice:
    """A worker on a machine of the cluster."""

    def __init__(self, name: str, ray: ModuleType, worker: Any) -> None:
        self.name, self.ray, self.worker = name, ray, worker

    def put(self, array: Any) -> Any:
        """The array, in the cluster's object store if it is large."""
        return Sent(array, self.ray.put(array), self) if array.nbytes >= LARGE else array

    def get(self, buffer: Any) -> Any:
        """The array."""
        return buffer.array if isinstance(buffer, Sent) else buffer

    def finite(self, buffer: Any) -> bool:
        """Whether all numbers are finite."""
        return finite_only(self.get(buffer))

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component there. Arrays of the object store cannot be written, so they are copied."""
        values = [value.reference if isinstance(value, Sent) else value for value in inputs.values()]
        answer = self.worker.run.remote(component, list(inputs), list(outputs), *values)
        return {name: array.copy() for name, array in _answers(self.ray, {self.name: answer})[self.name].items()}

    def stop(self) -> None:
        """End the call that runs, if its engine can."""
        self.worker.stop.remote()

    def close(self, components: Iterable[str] | None = None) -> None:
        """Close engines; without names, end the process."""
        if components is None:
            self.ray.kill(self.worker)
        elif names := list(components):
            self.worker.close.remote(names)


@dataclass(frozen=True)
class Joined:
    """Devices that run the same engines."""

    devices: Sequence[Device]
    engines: OpenEngines  # of the first device; it is empty if other processes run them
    bundle: Bundle  # with the program for these engines
    specs: dict[str, EngineSpec]
    threads: int  # of a device
    fits: bool  # all engines are open at once


def join(
    address: str,
    bundle: Bundle,
    *,
    devices: Sequence[str],
    memory: str,
    weights_dir: Path | None,
    **options: Any,
) -> Joined:
    """Start these devices on every machine of a cluster; options as for `set_up`. All machines run the same engines."""
    ray = _connected(address)
    workers: dict[str, Place] = {}
    try:
        for name, place in _started(ray, devices, options["threads"]):
            workers[name] = place
        return _opened(ray, workers, bundle, memory, weights_dir, options)
    except BaseException:
        for place in workers.values():
            ray.kill(place.worker)
        raise


def _opened(
    ray: ModuleType,
    workers: Mapping[str, "Place"],
    bundle: Bundle,
    memory: str,
    weights_dir: Path | None,
    options: Mapping[str, Any],
) -> Joined:
    """The devices, with open engines."""
    versions = _answers(ray, {name: place.worker.version.remote() for name, place in workers.items()}, begins=True)
    for name, version in versions.items():
        if version != metadata.version("tilewright"):
            ours = metadata.version("tilewright")
            raise EnvironmentMismatch(f"{name} has Tilewright {version}, and this machine {ours}; install the same")
    _provide(ray, workers, bundle, weights_dir)
    chosen: dict[str, Setup] = _answers(
        ray,
        {
            name: place.worker.choose.remote(place.device, {**options, "threads": place.threads})
            for name, place in workers.items()
        },
    )
    first = next(iter(chosen.values()))
    for name, setup in chosen.items():
        for component, spec in setup.specs.items():
            if spec.name != first.specs[component].name:
                theirs = f"{spec.name} for {component}, and others {first.specs[component].name}"
                raise EnvironmentMismatch(
                    f"{name} chooses engine {theirs}; name one that runs on all machines with engine="
                )
    on_node = {place.node: sum(p.node == place.node for p in workers.values()) for place in workers.values()}
    fits = _answers(
        ray, {name: place.worker.open.remote(memory, on_node[place.node]) for name, place in workers.items()}
    )
    joined = [RemoteDevice(name, ray, place.worker) for name, place in workers.items()]
    program, threads = first.bundle.program, max(place.threads for place in workers.values())
    engines = OpenEngines((), _elsewhere)
    return Joined(joined, engines, replace(bundle, program=program), first.specs, threads, all(fits.values()))


def _elsewhere(name: str) -> Engine:
    raise EnvironmentMismatch(f"the engine of {name} is open on the machines of the cluster only; leave out cluster=")


def _connected(address: str) -> ModuleType:
    """Ray, connected to the cluster at this address."""
    try:
        import ray
    except ImportError:
        raise EnvironmentMismatch("--cluster needs Ray; pip install 'tilewright[cluster]'") from None
    if ray.is_initialized():  # by the caller, or for another bundle
        return ray
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"cluster={address!r} is no address; use auto, HOST:PORT or ray://HOST:PORT")
        try:
            socket.create_connection((host, int(port)), ANSWERS_S).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise EnvironmentMismatch(
                f"cluster={address!r} does not answer ({reason}); start it with 'ray start --head'"
            ) from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns about its default
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        if address == "auto":
            raise EnvironmentMismatch(
                "cluster='auto': no cluster runs on this machine; start it with 'ray start --head'"
            ) from None
        raise EnvironmentMismatch(f"cluster={address!r}: {_last_line(error)}") from None
    return ray


@dataclass(frozen=True)
class Place:
    """A worker, and where it is."""

    worker: Any
    node: str
    device: str  # its name on the node
    threads: int


def _started(ray: ModuleType, devices: Sequence[str], threads: int) -> Iterator[tuple[str, Place]]:
    """Workers that are being started: their names, as 10.0.0.7/cpu:0."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise EnvironmentMismatch("no machine of the cluster has a CPU to give; 'ray status' lists them")
    addresses = [node["NodeManagerAddress"] for node in nodes]
    for number, node in enumerate(nodes):
        address = node["NodeManagerAddress"]
        name = address if addresses.count(address) == 1 else f"{address}#{addresses[:number].count(address)}"
        cores, gpus = int(node["Resources"]["CPU"]), int(node["Resources"].get("GPU", 0))
        on_gpus = list(devices) == ["cuda:0"]  # each process sees one GPU, and calls it cuda:0
        here = [f"cuda:{gpu}" for gpu in range(gpus)] if on_gpus else list(devices)
        of_each = threads or max(1, cores // max(1, len(here)))
        for device in here:
            if of_each * len(here) > cores:
                raise UsageError(
                    f"{name} gives {cores} cores, and {len(here)} devices of {of_each} threads need more; use fewer"
                )
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            worker = ray.remote(Worker).options(
                num_cpus=of_each, num_gpus=int(on_gpus), scheduling_strategy=strategy, max_concurrency=2
            )
            yield f"{name}/{device}", Place(worker.remote(), name, "cuda:0" if on_gpus else device, of_each)


def _provide(ray: ModuleType, workers: Mapping[str, Place], bundle: Bundle, weights_dir: Path | None) -> None:
    """Let every worker read the bundle; machines that do not have it get a copy."""
    root, weights = str(bundle.root.absolute()), None if weights_dir is None else str(weights_dir.absolute())

    def found() -> dict[str, bool]:
        asked = {name: place.worker.find.remote(root, bundle.digest, weights) for name, place in workers.items()}
        answers: dict[str, bool] = _answers(ray, asked)
        return answers

    lacking = [name for name, here in found().items() if not here]
    if not lacking:
        return
    receivers = {workers[name].node: workers[name].worker for name in lacking}
    files = dict(_files(bundle, weights_dir))
    size = sum(path.stat().st_size for path in files.values())
    LOG.warning("%d machines do not have the bundle; %s are sent to each", len(receivers), amount(size))
    tokens = {node: secrets.token_hex(4) for node in receivers}  # two machines may share a disk
    complete = False
    try:
        for name, path in files.items():
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    sent = ray.put(data)
                    receiving = {
                        node: worker.receive.remote(bundle.digest, tokens[node], name, sent)
                        for node, worker in receivers.items()
                    }
                    _answers(ray, receiving)
        complete = True
    finally:
        for node, worker in receivers.items():
            _answers(ray, {node: worker.end.remote(bundle.digest, tokens[node], complete=complete)})
    for name, here in found().items():
        if not here:
            raise BundleError(f"{name} cannot read the copy of {bundle.root} that was sent; is its disk full?")


def _files(bundle: Bundle, weights_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """The files of a bundle and of its weights: their places in a copy, and here."""
    for name in ("bundle.json", *bundle.manifest.files):
        yield name, bundle.path(name)
    for name, folder in bundle.weights.folders.items():
        for file in folder.files:
            yield f"weights/{name}/{file}", bundle.folder(name, weights_dir) / file


def _answers(ray: ModuleType, asked: Mapping[str, Any], *, begins: bool = False) -> dict[str, Any]:
    """What workers answer. Their errors are raised as they are; a lost machine is a DeviceError."""
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=BEGINS_S if begins else None)
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(
                f"{name} started no process within {BEGINS_S:.0f} s; 'ray status' tells whether its cores are taken"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else DeviceError(_first_line(error))) from None
        except ray.exceptions.RayError as error:
            if begins:
                raise EnvironmentMismatch(
                    f"{name} cannot start a process ({_last_line(error)}); install tilewright there, with"
                    f" Ray {ray.__version__}"
                ) from None
            raise DeviceError(f"{name} is lost ({type(error).__name__})") from None
    return answers


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
