"""Numbers for Prometheus: the queue, times by size of the result, the use of devices, faults, memory."""

from collections.abc import Iterator, Sized
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tilewright.runtime.restore import Restorer
from tilewright.runtime.serve.bundles import Bundles
from tilewright.runtime.serve.image_request import Answer, ImageRequest
from tilewright.runtime.serve.refusals import refusal_of
from tilewright.runtime.sitting import Restoration

__all__ = ["Metrics"]

SIZES = (0.25, 1, 4, 16, 64)  # megapixels of the result: the classes of sizes
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)


class Watched(Protocol):
    """What is looked at when the numbers are asked for."""

    bundles: Bundles
    places: int
    limit: int  # bytes that everything may take
    held: int  # bytes in the ledger

    @property
    def queue(self) -> Sized:
        """Requests that wait."""
        ...

    @property
    def running(self) -> Sized:
        """Requests that run."""
        ...


class Metrics:
    """The numbers of one service."""

    def __init__(self, service: Watched) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tilewright_requests", "Requests, by the route and the status of the answer.", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.refused = Counter(
            "tilewright_refused", "Requests that were refused for lack of room.", ["reason"], registry=self.registry
        )
        self.seconds = Histogram(
            "tilewright_image_seconds", "Time from the arrival of an image to its result, by megapixels of the result.",
            ["bundle", "megapixels"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.ends = Counter("tilewright_images", "Images that have ended.", ["bundle", "end"], registry=self.registry)
        self.engine_seconds = Counter(
            "tilewright_engine_seconds", "Time inside of engines.", ["bundle", "component"], registry=self.registry
        )
        self.faults = Counter(
            "tilewright_faults", "Failures, and faults of devices that requests survived.", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self.closed_s: dict[tuple[str, str], float] = {}  # bundle, device -> busy time of engines that are closed
        self.registry.register(_Now(self))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """The numbers in Prometheus' format."""
        return generate_latest(self.registry)

    def restored(self, request: ImageRequest, restoration: Restoration) -> None:
        """Count what a restoration took."""
        for component in restoration.engines:
            spent = restoration.seconds.get(component, 0.0)
            self.engine_seconds.labels(request.model, component).inc(spent)
        if restoration.notes:
            self.faults.labels("survived").inc(len(restoration.notes))

    def ended(self, request: ImageRequest, end: Answer | BaseException) -> None:
        """Count a request that has ended."""
        self.ends.labels(request.model, request.state).inc()
        if isinstance(end, Answer):
            self.seconds.labels(request.model, size_class(request)).observe(request.age())
        elif request.state == "failed" and refusal_of(end).status >= 500:
            self.faults.labels(type(end).__name__).inc()

    def forget(self, name: str, restorer: Restorer) -> None:
        """Keep the busy time of the devices of a bundle that is about to be closed."""
        for key, spent in busy(name, restorer).items():
            self.closed_s[key] = self.closed_s.get(key, 0.0) + spent


def size_class(request: ImageRequest) -> str:
    """The class of the size of a result."""
    megapixels = request.width * request.height / 1e6
    return next((f"<={size:g}" for size in SIZES if megapixels <= size), f">{SIZES[-1]:g}")


def busy(name: str, restorer: Restorer) -> dict[tuple[str, str], float]:
    """Bundle and device -> the seconds that it has run calls."""
    executor = restorer.executor
    return {(name, device.name): spent for device, spent in zip(executor.devices, executor.calls.busy_s, strict=True)}


class _Now(Collector):
    """What holds at the moment of a look."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The gauges, and the busy time of devices."""
        service = self.metrics.service
        yield GaugeMetricFamily("tilewright_queue", "Requests that wait.", len(service.queue))
        yield GaugeMetricFamily("tilewright_running", "Requests that run.", len(service.running))
        yield GaugeMetricFamily("tilewright_places", "Requests that may run at once.", service.places)
        yield GaugeMetricFamily("tilewright_memory_limit_bytes", "Memory that the service may take.", service.limit)
        yield GaugeMetricFamily("tilewright_memory_held_bytes", "Memory in the ledger.", service.held)
        opened = GaugeMetricFamily("tilewright_bundle_open", "1 if its engines are open.", labels=["bundle"])
        seconds = dict(self.metrics.closed_s)
        gone = 0
        for served in service.bundles.all():
            restorer = served.restorer  # another thread may put it away
            if not served.outdated:
                opened.add_metric([served.name], float(restorer is not None))
            if restorer is not None:
                for key, spent in busy(served.name, restorer).items():
                    seconds[key] = seconds.get(key, 0.0) + spent
                gone += len(restorer.executor.gone)
        yield opened
        devices = CounterMetricFamily(
            "tilewright_device_busy_seconds", "Time in which a device ran calls.", labels=["bundle", "device"]
        )
        for (bundle, device), spent in sorted(seconds.items()):
            devices.add_metric([bundle, device], spent)
        yield devices
        yield GaugeMetricFamily("tilewright_devices_gone", "Devices that hang or are lost.", gone)
