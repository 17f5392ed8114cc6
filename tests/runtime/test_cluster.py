"""Devices of a Ray cluster: three real nodes of Ray on this machine, one of which is lost in the middle of an image."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.ray_cluster import running_cluster
from support.scenes import difference, expected, scene
from tilewright.runtime import load
from tilewright.runtime.cluster import join
from tilewright.runtime.cluster.channel import Channel, connected
from tilewright.runtime.cluster.devices import LARGE, RemoteDevice
from tilewright.runtime.cluster.worker import Worker
from tilewright.runtime.errors import BundleError, DeviceError, EnvironmentMismatch, ResourceError, UsageError
from tilewright.runtime.execute.devices import Device

pytestmark = pytest.mark.slow
ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tilewright[cluster]'")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of three nodes with a core each; their copies of bundles have a cache of their own."""
    with running_cluster(3, tmp_path_factory.mktemp("of-the-nodes")) as running:
        yield running


def here(bundle: Path, picture: np.ndarray, **options: Any) -> np.ndarray:
    """What this process alone makes of the picture."""
    with load(bundle) as restorer:
        return restorer(picture, **options)


@pytest.fixture
def picture() -> np.ndarray:
    return scene(150, 170)


def test_all_nodes_restore_one_image(cluster: Any, bundle: Path, picture: np.ndarray, kernels: np.ndarray) -> None:
    with load(bundle, cluster=cluster.address) as restorer:
        restoration = restorer.restore(picture)
        assert len(set(restoration.devices)) == 3 and all(name.endswith("/cpu:0") for name in restoration.devices)
        assert restorer.estimate(170, 150).needed_bytes < load(bundle).estimate(170, 150).needed_bytes
    np.testing.assert_array_equal(restoration.image, here(bundle, picture))
    assert difference(restoration.image, expected(picture, kernels)).max() <= 1  # blended tiles round twice


def doubling_worker() -> Any:
    """A worker whose device doubles. Its classes are inside of this function, as nodes cannot import this file."""

    class Doubling:
        seen: list[Any]

        def __init__(self) -> None:
            self.seen = []

        def put(self, array: Any) -> Any:
            return array

        get = put

        def run(self, component: str, inputs: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
            self.seen += [array for array in inputs.values() if not any(array is other for other in self.seen)]
            if component == "fail":
                raise ResourceError(f"{len(self.seen)} arrays came")
            return {name: 2 * array for name, array in inputs.items()}

    class DoublingWorker(Worker):
        def __init__(self) -> None:
            super().__init__()
            self.device = Doubling()  # type: ignore[assignment]

        def kept_numbers(self) -> list[int]:
            return list(self.kept)

    return ray.remote(DoublingWorker).remote()


@pytest.mark.parametrize("direct", [True, False])
def test_arrays_come_to_a_node_as_they_are_and_large_ones_once(cluster: Any, direct: bool) -> None:
    ray.init(cluster.address, logging_level="ERROR", ignore_reinit_error=True)
    worker = doubling_worker()
    key = bytes(32)
    channel = connected(ray.get(worker.listen.remote(key)), key) if direct else None
    device: Device = RemoteDevice("there", ray, worker, channel)
    arrays = {"small": np.arange(6, dtype=np.float32), "large": np.arange(LARGE, dtype=np.float32).reshape(2, -1)}
    held = {name: device.put(array) for name, array in arrays.items()}
    assert {name: buffer.shape for name, buffer in held.items()} == {n: a.shape for n, a in arrays.items()}
    for _ in range(2):
        outputs = device.run("double", held, ["small", "large"])
        for name, array in arrays.items():
            np.testing.assert_array_equal(device.get(held[name]), array)
            result = device.get(outputs[name])
            np.testing.assert_array_equal(result, 2 * array)
            result[:] = np.nan
            assert not device.finite(result) and device.finite(held[name])
    with pytest.raises(ResourceError, match="4 arrays came"):  # the small one of three calls, and the large one
        device.run("fail", held, [])
    del held["large"]
    device.run("double", {"x": arrays["small"]}, ["x"])
    assert ray.get(worker.kept_numbers.remote()) == []
    ray.kill(worker)
    for _ in range(2):
        with pytest.raises(DeviceError, match="there is lost"):
            for _ in range(100_000):  # Ray takes its time to end a process
                device.run("double", {"x": arrays["small"]}, ["x"])
    device.close()


def test_values_go_through_ray_to_a_node_that_takes_no_connection(
    cluster: Any,
    bundle: Path,
    picture: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(address: tuple[str, int], key: bytes) -> Channel:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(join, "connected", refused)
    with load(bundle, cluster=cluster.address) as restorer:
        np.testing.assert_array_equal(restorer(picture), here(bundle, picture))
    assert caplog.text.count("its values go through Ray") == 3


def test_a_node_that_does_not_have_the_bundle_gets_a_copy_and_keeps_it(
    cluster: Any, bundle: Path, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    folder = os.open(bundle, os.O_RDONLY)
    mine = f"/proc/self/fd/{folder}"  # a path that only this process has
    try:
        with load(mine, cluster=cluster.address) as restorer:
            np.testing.assert_array_equal(restorer(picture), here(bundle, picture))
        assert "do not have the bundle" in caplog.text and "are sent to each" in caplog.text
        caplog.clear()
        with load(mine, cluster=cluster.address) as restorer:
            np.testing.assert_array_equal(restorer(picture), here(bundle, picture))
        assert caplog.text == ""
        copies = Path(os.environ["TILEWRIGHT_CACHE_DIR"])  # of this test, not of the nodes
        assert not copies.joinpath("cluster").exists()
    finally:
        os.close(folder)


def test_errors_of_a_node_are_those_that_this_machine_would_give(cluster: Any, bundle: Path) -> None:
    with pytest.raises(UsageError, match="engine='int8' is none of this bundle's engines: ort-float32"):
        load(bundle, cluster=cluster.address, engine="int8")
    with pytest.raises(UsageError, match=r"gives 1 cores, and 2 devices of 1 threads need more; use fewer"):
        load(bundle, cluster=cluster.address, devices=["cpu:0", "cpu:1"])


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def test_a_lost_node_takes_no_pixel_with_it(cluster: Any, bundle: Path, picture: np.ndarray) -> None:
    lost: list[Any] = []

    def lose(name: str, done: int, total: int) -> None:
        if done == 3:
            lost.append(cluster.list_all_nodes()[-1])
            (raylet,) = (info.process.pid for info in lost[0].all_processes["raylet"])
            workers = children(raylet)
            cluster.remove_node(lost[0], allow_graceful=False)
            for worker in workers:  # they notice only later that their node has gone, and answer until then
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    with load(bundle, cluster=cluster.address) as restorer:
        restoration = restorer.restore(picture, tile=32, overlap=8, on_progress=lose)
        again = restorer.restore(picture, tile=32, overlap=8)
    assert len(lost) == 1 and len(restoration.devices) == 3
    assert [note for note in restoration.notes if "is lost" in note and "its tiles run elsewhere" in note]
    for restored in (restoration, again):
        np.testing.assert_array_equal(restored.image, here(bundle, picture, tile=32, overlap=8))


@pytest.mark.parametrize("address", ["hier", "ray://", "127.0.0.1:port", ":6379"])
def test_what_is_no_address_is_refused(bundle: Path, address: str) -> None:
    ray.shutdown()
    with pytest.raises(UsageError, match="is no address; use auto, HOST:PORT or ray://HOST:PORT"):
        load(bundle, cluster=address)


def test_an_address_where_nothing_answers_is_refused_at_once(bundle: Path) -> None:
    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EnvironmentMismatch, match="does not answer"):
            load(bundle, cluster=address)


def test_a_folder_that_is_no_bundle_is_refused_before_a_cluster_is_asked(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        load(tmp_path, cluster="auto")
