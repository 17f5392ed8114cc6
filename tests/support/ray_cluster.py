"""A cluster of real nodes of Ray on this machine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def running_cluster(nodes: int, cache: Path) -> Iterator[Any]:
    """So many nodes with a core each; their copies of bundles have a cache of their own."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_CACHE_DIR", str(cache))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        running = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(nodes - 1):
            running.add_node(**node)
    yield running
    ray.shutdown()
    running.shutdown()
