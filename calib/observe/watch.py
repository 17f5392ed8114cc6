"""Engines and a device that run a bundle's program and look at the tensors inside its networks."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from tilewright.calib.observe.observers import Observations
from tilewright.calib.observe.pieces import Piece, observed_tensors, piece_model, pieces
from tilewright.calib.scales.histograms import NotFinite
from tilewright.runtime.engines.ort import OrtEngine, open_graph
from tilewright.runtime.errors import AccuracyError
from tilewright.runtime.execute.devices import CpuDevice, OpenEngines

__all__ = ["WatchedEngine", "WatchingDevice"]

AT_ONCE = 4  # tensors that a piece hands out; they are all in memory when it ends
Look = Callable[[str, Any, int | None], None]  # the name of a tensor, its numbers, the axis of its channels


class WatchedEngine:
    """A graph in pieces, each in a session of its own, that hands each observed tensor to `look`."""

    def __init__(self, graph: Path, files: Mapping[str, Path], look: Look, *, memory: str, threads: int) -> None:
        self.model = onnx.load(graph, load_external_data=False)
        self.observed = observed_tensors(self.model.graph)
        self.pieces = pieces(self.model.graph, self.observed, AT_ONCE)
        self.results = [value.name for value in self.model.graph.output]
        self.files, self.look, self.memory, self.threads = files, look, memory, threads
        self.opened: dict[int, OrtEngine] = {}
        self.running: OrtEngine | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="tilewright-")

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        values = dict(inputs)
        self._show(values)
        for place, piece in enumerate(self.pieces):
            self.running = engine = self._open(place, piece, values)
            written = engine.run({name: values[name] for name in piece.reads}, piece.writes)
            self._show(written)
            values |= written
            del written
            for name in piece.ended & values.keys():
                del values[name]
        self.running = None
        return {name: values[name] for name in outputs}

    def _show(self, values: Mapping[str, Any]) -> None:
        for name in values.keys() & self.observed.keys():
            if values[name].dtype.kind == "f":
                self.look(name, values[name], self.observed[name])

    def _open(self, place: int, piece: Piece, values: Mapping[str, Any]) -> OrtEngine:
        """The session of a piece. It is opened on its first run, when the types of the tensors it reads are known."""
        if place not in self.opened:
            kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype) for name in piece.reads}
            path = Path(self.folder.name) / f"{place}.onnx"
            path.write_bytes(piece_model(self.model, piece, kinds).SerializeToString())
            self.opened[place] = open_graph(path, self.files, memory=self.memory, threads=self.threads)
        return self.opened[place]

    def stop(self, thread: int) -> None:
        """End the call of this thread before the next node of the graph. The call then raises."""
        if engine := self.running:
            engine.stop(thread)

    def close(self) -> None:
        """Free the memory."""
        for engine in self.opened.values():
            engine.close()
        self.opened.clear()


class WatchingDevice(CpuDevice):
    """A CPU that observes the engines that it runs, by tensor and step."""

    def __init__(self, name: str, engines: OpenEngines) -> None:
        super().__init__(name, engines)
        self.opened = engines
        self.observations = Observations()
        self.step = 0

    def begin(self, rows: Sequence[tuple[int, int]]) -> None:
        """Take the step of the call that comes next."""
        ((self.step, _),) = rows  # one tile at a time

    def look(self, component: str) -> Look:
        """The function that the engine of a component hands its tensors to."""

        def look(tensor: str, numbers: Any, channels: int | None) -> None:
            try:
                self.observations.add(f"{component}/{tensor}", self.step, numbers, channels)
            except NotFinite as error:
                raise AccuracyError(
                    f"{component}: tensor {tensor!r} at step {self.step + 1} holds {error}; check the weights with"
                    " 'tilewright export verify'"
                ) from None

        return look

    def taken(self) -> Observations:
        """What was observed since the last time."""
        taken, self.observations = self.observations, Observations()
        return taken
