"""Joining a cluster: a worker is started for each device of each machine, and all of them open the same engines."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.cluster.answers import answers_of, last_line
from tilewright.runtime.cluster.channel import Channel, connected
from tilewright.runtime.cluster.copies import provide
from tilewright.runtime.cluster.devices import RemoteDevice
from tilewright.runtime.cluster.worker import Place, Worker
from tilewright.runtime.engines import Engine
from tilewright.runtime.errors import EnvironmentMismatch, UsageError
from tilewright.runtime.execute.devices import OpenEngines
from tilewright.runtime.setup import Opened, Setup

__all__ = ["join"]

LOG = logging.getLogger("tilewright")

ANSWERS_S = 5.0  # an address that is there accepts a connection within so many seconds


def join(
    address: str,
    bundle: Bundle,
    *,
    devices: Sequence[str],
    memory: str,
    weights_dir: Path | None,
    **options: Any,
) -> Opened:
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
    workers: Mapping[str, Place],
    bundle: Bundle,
    memory: str,
    weights_dir: Path | None,
    options: Mapping[str, Any],
) -> Opened:
    """The devices, with open engines."""
    versions = answers_of(ray, {name: place.worker.version.remote() for name, place in workers.items()}, begins=True)
    for name, version in versions.items():
        if version != metadata.version("tilewright"):
            ours = metadata.version("tilewright")
            raise EnvironmentMismatch(f"{name} has Tilewright {version}, and this machine {ours}; install the same")
    provide(ray, workers, bundle, weights_dir)
    chosen: dict[str, Setup] = answers_of(
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
    fits = answers_of(
        ray, {name: place.worker.open.remote(memory, on_node[place.node]) for name, place in workers.items()}
    )
    channels = _channels(ray, workers)
    joined = [RemoteDevice(name, ray, place.worker, channels[name]) for name, place in workers.items()]
    program, threads = first.bundle.program, max(place.threads for place in workers.values())
    engines = OpenEngines((), _elsewhere)
    return Opened(joined, engines, replace(bundle, program=program), first.specs, threads, all(fits.values()))


def _channels(ray: ModuleType, workers: Mapping[str, Place]) -> dict[str, Channel | None]:
    """A connection to each worker that this machine can reach."""
    keys = {name: secrets.token_bytes(32) for name in workers}
    addresses = answers_of(ray, {name: place.worker.listen.remote(keys[name]) for name, place in workers.items()})

    def connect(name: str) -> Channel | None:
        try:
            return connected(addresses[name], keys[name])
        except OSError as error:
            host, port = addresses[name]
            LOG.warning("no connection to %s at %s:%d (%s); its values go through Ray", name, host, port, error)
            return None

    with ThreadPoolExecutor() as pool:
        return dict(zip(workers, pool.map(connect, workers), strict=True))


def _elsewhere(name: str) -> Engine:
    raise EnvironmentMismatch(f"the engine of {name} is open on the machines of the cluster only; leave out cluster=")


def _connected(address: str) -> Any:
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
        hint = "; if the cluster wants a token, set RAY_AUTH_MODE=token" if isinstance(error, ConnectionError) else ""
        raise EnvironmentMismatch(f"cluster={address!r}: {last_line(error)}{hint}") from None
    return ray


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
