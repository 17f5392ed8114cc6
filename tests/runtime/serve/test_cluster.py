"""A service whose devices are those of a Ray cluster: it uses all machines, and one bundle at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.bundles import tint_bundle
from support.ray_cluster import running_cluster
from support.scenes import scene
from support.served import pixels_of, served, until
from support.stepped import stepped
from tilewright.runtime import load

pytestmark = pytest.mark.slow
ray: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tilewright[cluster]'")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    with running_cluster(2, tmp_path_factory.mktemp("of-the-nodes")) as running:
        yield running.address


def test_a_service_restores_with_all_machines_and_opens_one_bundle_at_a_time(address: str, tmp_path: Path) -> None:
    image, bundles = scene(40, 52), {"steps": stepped(tmp_path / "steps"), "tint": tint_bundle(tmp_path / "tint")}
    expected = {}
    for name, bundle in bundles.items():
        with load(bundle, threads=1) as restorer:
            expected[name] = restorer(image)
    with served(*bundles.values(), engines={"threads": 1, "cluster": address}) as service:
        assert service.service.places == 4  # two for each machine
        for name in ("steps", "tint", "steps"):
            assert np.array_equal(pixels_of(service.edit(image, model=name)), expected[name])
            models = service.client.get("/v1/models").json()["data"]
            assert [model["id"] for model in models if model["open"]] == [name]
        numbers = service.client.get("/metrics").text
        assert numbers.count('tilewright_device_busy_seconds_total{bundle="steps"') == 2


def test_a_service_without_any_machine_says_that_it_must_be_started_anew(address: str, tmp_path: Path) -> None:
    image, bundle = scene(40, 52), tint_bundle(tmp_path / "tint")
    with served(bundle, engines={"threads": 1, "cluster": address}) as service:

        def health(path: str) -> tuple[int, str]:
            answer = service.client.get(path)
            return answer.status_code, answer.text

        assert health("/v2/health/live") == (200, "live\n") and health("/v2/health/ready") == (200, "ready\n")
        first, second = service.service.bundles.served["tint"].restorer.executor.devices
        ray.kill(first.worker)
        until(lambda: first.lost, "nobody noticed a lost worker")
        assert health("/v2/health/ready") == (200, "ready\n") and service.edit(image).status_code == 200
        ray.kill(second.worker)
        until(lambda: second.lost, "nobody noticed a lost worker")
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert health(path) == (503, "no device of tint answers; start the service anew\n")
        answer = service.edit(image)
        assert answer.status_code == 503 and "no device answers; start anew" in answer.text
        assert "tilewright_devices_gone 2.0" in service.client.get("/metrics").text
