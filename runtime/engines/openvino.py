"""OpenVINO on the CPU, in float32, or in bfloat16 on CPUs with instructions for it.

OpenVINO reads a graph without its weights. It gets them as constants over the mapped files, and packs them anew for
the CPU as it compiles the graph. So an open engine has a copy of all weights, in its precision.

In bfloat16 an angle of 30 would be off by a tenth. So sines and cosines of times and positions, with all that leads to
them, are a graph of their own in float32, whose outputs are inputs of the other graph. And the best of many scores
would often be equal. So a product that gives the scores of a choice takes bfloat16, and gives float32.
"""

import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, get_ident
from typing import Any

import numpy as np

from tilewright.runtime.bundle.external_data import External, external_data, with_inputs
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.engines import Opening
from tilewright.runtime.engines.explained import DAMAGED, MEMORY, OTHER_GRAPH, OTHER_SIZE, Reason, explained
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, UsageError

__all__ = ["PACKAGES", "OpenvinoEngine", "missing", "open_engine", "open_graph", "version"]

PACKAGES = ("openvino",)
HINTS = {"float32": "f32", "bfloat16": "bf16"}
# OpenVINO divides by half the number of threads where it fuses a gated layer for AMX, and the process dies with one
# thread: github.com/openvinotoolkit/openvino/issues/33300
LEAST_THREADS = 2
PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")  # too much work for float32
MOVES = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")
LARGEST = float(np.finfo(np.float32).max)
WIDTHS = {"bfloat16": np.uint16}  # NumPy has no type for it


# words of OpenVINO's messages, the error that they mean, and what to do; the first that fit count
REASONS: tuple[Reason, ...] = (
    ("failed to allocate|bad_alloc|out of memory|memory descriptor|memory object", ResourceError, MEMORY),
    (
        "no conversion rule",
        EnvironmentMismatch,
        "this version of OpenVINO is too old for the graph: pip install -U openvino",
    ),
    (
        "unable to read the model|conversion is failed|wasn't fully converted",
        BundleError,
        DAMAGED,
    ),
    ("are incompatible|node with name", UsageError, OTHER_SIZE),  # a node refuses its inputs
)
# parts of these messages that help nobody: places in OpenVINO's code
NOISE = re.compile(
    r"(Caught exception: )?Exception from src/\S+:\d+: ?|Check '.*?' failed at src/\S+:\d+: ?"
    r"|FrontEnd API failed with \w+: ?|To facilitate the conversion of unsupported operations.*?\.html"
)


def missing() -> str | None:
    """What is needed to run OpenVINO here, or none."""
    if importlib.util.find_spec("openvino") is None:
        return "needs OpenVINO: pip install 'tilewright[openvino]'"
    return None


def version() -> str:
    """The name and version of OpenVINO."""
    import openvino

    return f"openvino {openvino.__version__.partition('-')[0]}"


_explained = partial(explained, version, REASONS, NOISE)


@dataclass
class _Call:
    """A call that runs."""

    request: Any
    stopped: bool = False


class OpenvinoEngine:
    """One compiled graph. Calls that run at the same time have a request each."""

    def __init__(
        self, compiled: Any, maps: list[Any], graph: Path, *, low: bool, angles: "OpenvinoEngine | None" = None
    ) -> None:
        self.compiled, self.maps, self.graph, self.low, self.angles = compiled, maps, graph, low, angles
        computed = set(angles.outputs) if angles else set()
        # a port also has the names of values that equal it
        ports = {port.get_node().get_friendly_name(): port for port in compiled.inputs}
        self.inputs = {name: port.get_element_type().to_dtype() for name, port in ports.items() if name not in computed}
        self.outputs: dict[str, int] = {name: i for i, port in enumerate(compiled.outputs) for name in port.get_names()}
        self.free: list[Any] = []  # requests
        self.running: dict[int, _Call] = {}  # thread -> its call
        self.lock = Lock()

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        names, feed = list(outputs), dict(inputs)
        self._check(inputs, names)
        if self.angles:
            feed |= self.angles.run({name: inputs[name] for name in self.angles.inputs}, self.angles.outputs)
        with self.lock:
            call = _Call(self.free.pop() if self.free else self.compiled.create_infer_request())
            self.running[get_ident()] = call
        try:
            call.request.start_async(feed, share_inputs=True)
            if call.stopped:  # before it began
                call.request.cancel()
            call.request.wait()
            # copies, because the next call of the request writes over them
            return {name: np.array(call.request.get_output_tensor(self.outputs[name]).data) for name in names}
        except Exception as error:
            if call.stopped:
                raise CancelledError from error
            raise _explained(self.graph, "failed", error) from error
        finally:
            self._end(call)

    def _check(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> None:
        """Refuse inputs and outputs that are not the graph's. OpenVINO would compute something without a word."""
        if unknown := sorted(inputs.keys() - self.inputs.keys()):
            raise BundleError(f"{self.graph}: has no input {unknown[0]!r}; {OTHER_GRAPH}")
        if unknown := sorted(set(outputs) - self.outputs.keys()):
            raise BundleError(f"{self.graph}: has no output {unknown[0]!r}; {OTHER_GRAPH}")
        if lacking := sorted(self.inputs.keys() - inputs.keys()):
            raise BundleError(f"{self.graph}: input {lacking[0]!r} is missing; {OTHER_GRAPH}")
        for name, array in inputs.items():
            if array.dtype != self.inputs[name]:
                raise BundleError(f"{self.graph}: {name!r} is {array.dtype}, not {self.inputs[name]}; {OTHER_GRAPH}")

    def _end(self, call: _Call) -> None:
        with self.lock:
            del self.running[get_ident()]
            if not self.low:
                self.free.append(call.request)
            elif not self.running:
                call.request = None
                self.compiled.release_memory()

    def stop(self, thread: int) -> None:
        """End the call of this thread, if it is in one, before the next node of the graph. The call then raises."""
        if call := self.running.get(thread):
            call.stopped = True
            call.request.cancel()

    def close(self) -> None:
        """Free the memory."""
        self.free.clear()
        self.compiled = self.angles = None
        self.maps.clear()


def open_engine(bundle: Bundle, component: str, spec: EngineSpec, opening: Opening) -> OpenvinoEngine:
    """Open an engine of a component. Weights are read from their own files."""
    files = bundle.files_of(spec.weights or component, opening.weights_dir)
    graph = bundle.path(spec.graph)
    precision = spec.form.rest if spec.form else spec.precision
    return open_graph(
        graph, files, precision=precision, memory=opening.memory, threads=opening.threads, calls=opening.calls
    )


def open_graph(
    graph: Path,
    files: Mapping[str, Path],
    *,
    precision: str = "float32",
    memory: str = "fast",
    threads: int = 0,
    calls: int = 1,
) -> OpenvinoEngine:
    """Open a graph. `files`: path of weights in the graph -> real path. `threads` 0: OpenVINO chooses.

    A call in bfloat16 has two threads at least.
    """
    data = graph.read_bytes()
    weights = external_data(data, str(graph))
    if precision == "bfloat16" and threads == 1:  # see LEAST_THREADS
        threads, calls = LEAST_THREADS, max(1, calls // LEAST_THREADS)
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "NUM_STREAMS": calls,
        "INFERENCE_NUM_THREADS": threads * calls,
        "ENABLE_CPU_PINNING": False,  # other components and processes use the same cores
    }
    try:
        model = _core().read_model(with_inputs(data))
        maps = _attach(model, {name: files[weight.location] for name, weight in weights.items()}, weights)
        angles = None
        if precision == "bfloat16":
            angles = _without_angles(model)
            _keep_scores(model)
        exact = settings | {"INFERENCE_PRECISION_HINT": HINTS["float32"]}
        before = angles and OpenvinoEngine(_core().compile_model(angles, "CPU", exact), [], graph, low=memory == "low")
        compiled = _core().compile_model(model, "CPU", settings)
    except Exception as error:
        raise _explained(graph, "refuses the graph", error) from error
    return OpenvinoEngine(compiled, maps, graph, low=memory == "low", angles=before)


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _attach(model: Any, files: Mapping[str, Path], weights: Mapping[str, External]) -> list[Any]:
    """Replace inputs of a model by constants over the mapped files; returns the maps, which must stay open."""
    import openvino

    maps = {file: np.memmap(file, np.uint8, mode="c") for file in set(files.values())}
    for parameter in model.get_parameters():
        name = next((name for name in parameter.output(0).get_names() if name in weights), None)
        if name is None:
            continue
        w = weights[name]
        data = maps[files[name]][w.offset : w.offset + w.length].view(WIDTHS.get(w.dtype, w.dtype))
        kind = openvino.Type.bf16 if w.dtype == "bfloat16" else openvino.Type(data.dtype)
        tensor = openvino.Tensor(data, openvino.Shape(w.shape), kind)
        constant = openvino.opset13.constant(tensor, shared_memory=True)
        parameter.output(0).replace(constant.output(0))
        model.remove_parameter(parameter)
    return list(maps.values())


def _without_angles(model: Any) -> Any:
    """Cut the sines and cosines of angles off a model, and return the model that computes them; none without angles."""
    import openvino

    copy = model.clone()
    copies = {op.get_friendly_name(): op for op in copy.get_ordered_ops()}
    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for op in model.get_ordered_ops():
        names = op.output(0).get_names() if op.get_type_name() in ("Sin", "Cos") else ()
        before = _before(copies[op.get_friendly_name()]) if names else {}
        if not names or any(each.get_type_name() in PRODUCTS for each in before.values()):
            continue
        name = min(names)
        outputs[name] = openvino.opset13.result(copies[op.get_friendly_name()].output(0))
        inputs |= {n: each for n, each in before.items() if each.get_type_name() == "Parameter"}
        shape, kind = op.output(0).get_partial_shape(), op.output(0).get_element_type()
        parameter = openvino.opset13.parameter(shape, kind, name=name)
        op.output(0).replace(parameter.output(0))
        model.add_parameters([parameter])
    return openvino.Model(list(outputs.values()), list(inputs.values())) if outputs else None


def _keep_scores(model: Any) -> None:
    """Let a product give float32, if the best of its results are chosen.

    OpenVINO computes behind the last product in float32, and a product gives what the operator behind it, which it
    takes in, would give. A bias is taken in earlier and does not count. So the operator is one that changes nothing.
    """
    import openvino

    for op in model.get_ordered_ops():
        if op.get_type_name() != "TopK":
            continue
        read = op.input(0)
        while (before := read.get_source_output().get_node()).get_type_name() in MOVES:
            read = before.input(0)
        same = openvino.opset13.clamp(read.get_source_output(), -LARGEST, LARGEST)
        read.replace_source_output(same.output(0))


def _before(node: Any) -> dict[str, Any]:
    """All nodes that a node depends on, by name."""
    nodes, pending = {}, [node]
    while pending:
        for source in (value.get_node() for value in pending.pop().input_values()):
            if source.get_friendly_name() not in nodes:
                nodes[source.get_friendly_name()] = source
                pending.append(source)
    return nodes
