"""TensorRT on an NVIDIA GPU, 10.16 and newer. Its plans hold no weights; they are set from the mapped files.

This backend has run only over libraries of tests, with TensorRT's real Python bindings, and never on a GPU.

An engine keeps the inputs and outputs of its last shapes at fixed addresses. The first call with some shapes runs at
once, the second is recorded as a CUDA graph, and all later ones replay it. The values inside of calls lie in one block
of memory, which all engines of the GPU use in turn.
"""

import functools
import importlib.util
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.engines import Opening
from tilewright.runtime.engines.driver import Gpu, Recording, Tensor, first_gpu
from tilewright.runtime.engines.explained import MEMORY, OTHER_GRAPH, Reason, explained
from tilewright.runtime.engines.refit import AGAIN, Refit
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, TilewrightError, UsageError

__all__ = ["PACKAGES", "TensorrtEngine", "logger", "missing", "open_engine", "open_plan", "version"]

PACKAGES = ("tensorrt",)
LOG = logging.getLogger("tilewright")
UNPROVEN = "never run on a GPU by Tilewright's tests"
MOST_SHAPES = 4  # of which an engine keeps buffers and a recording
LEAST_SCRATCH = 256

# words of TensorRT's messages, the error that they mean, and what to do; the first that fit count
REASONS: tuple[Reason, ...] = (
    ("out of ?memory|memory allocation|cuda failure: 2\\b", ResourceError, MEMORY),
    ("version tag|incompatible device|different (device|compute)", EnvironmentMismatch, AGAIN),
    ("plugin", EnvironmentMismatch, "a plugin of the plan is not known here; " + AGAIN),
    ("serialization|magic|corrupt", BundleError, "the plan is damaged; " + AGAIN),
)
NOISE = re.compile(r"\[?\w+\.(cpp|h)::\w+::\d+\]? ?|IExecutionContext::\w+: |IRuntime::\w+: ")


def missing() -> str | None:
    """What is needed to run TensorRT here, or none."""
    if importlib.util.find_spec("tensorrt") is None:
        return f"needs TensorRT and an NVIDIA GPU: pip install 'tilewright[gpu]' ({UNPROVEN})"
    return None


def version() -> str:
    """The name and version of TensorRT."""
    try:
        return f"tensorrt {_tensorrt().__version__} ({UNPROVEN})"
    except EnvironmentMismatch as error:
        return f"tensorrt ({error})"


def _tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # the package without its libraries
        raise EnvironmentMismatch(f"TensorRT does not load ({error}); pip install --force-reinstall tensorrt") from None
    return tensorrt


@functools.cache
def logger() -> Any:
    """A logger for all objects of TensorRT, which keeps the last errors in `told`."""
    trt = _tensorrt()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.told = [*self.told[-2:], msg]
            LOG.debug("TensorRT: %s", msg)

    return Logger()


@dataclass
class _Shape:
    """All that a call with certain shapes needs."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    scratch_bytes: int
    scratch: int = 0  # the address in the context and in the recording
    recording: Recording | None = None
    ran: bool = False


class TensorrtEngine:
    """One plan with its weights. Calls run one after another."""

    def __init__(self, engine: Any, plan: Path, gpu: Gpu, weights: Refit) -> None:
        self.trt, self.engine, self.plan, self.gpu, self.weights = _tensorrt(), engine, plan, gpu, weights
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        takes = self.trt.TensorIOMode.INPUT
        self.inputs = {n: self._type(n) for n in names if engine.get_tensor_mode(n) == takes}
        self.outputs = {n: self._type(n) for n in names if n not in self.inputs}
        self.profiles = [
            {name: engine.get_tensor_profile_shape(name, i) for name in self.inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        self.shapes: OrderedDict[tuple[Any, ...], _Shape] = OrderedDict()

    def _type(self, name: str) -> Any:
        return np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs, as arrays."""
        names = list(outputs)
        with self.gpu:
            shape = self._called(inputs, names)
            arrays = {name: np.empty(shape.outputs[name].shape, self.outputs[name]) for name in names}
            for name, array in arrays.items():
                self.gpu.read(shape.outputs[name].address, array)
            self.gpu.wait()
            return arrays

    def run_on(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Tensor]:
        """The same, with outputs that stay on the GPU. Inputs may be tensors there."""
        names = list(outputs)
        with self.gpu:
            shape = self._called(inputs, names)
            tensors = {name: Tensor(self.gpu, shape.outputs[name].shape, self.outputs[name]) for name in names}
            for name, tensor in tensors.items():  # copies, because the next call writes over the outputs
                self.gpu.copy(tensor.address, shape.outputs[name].address, tensor.nbytes)
            self.gpu.wait()  # until then the inputs must stay
            return tensors

    def change_weights(self, weights: Mapping[str, Any]) -> None:
        """Give some weights other values, for a LoRA. All others have the values of the files again."""
        with self.gpu:
            self.weights.change(weights)

    def close(self) -> None:
        """Free the memory."""
        with self.gpu:
            while self.shapes:
                self._forget()
            self.engine = self.weights.refitter = None  # both hold what is on the GPU

    def _called(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> _Shape:
        """Run a call, and return its buffers."""
        self._check(inputs, outputs)
        key = tuple(tuple(inputs[name].shape) for name in self.inputs)
        shape = self.shapes[key] if key in self.shapes else self._prepared(inputs)
        self.shapes[key] = shape
        self.shapes.move_to_end(key)
        if len(self.shapes) > MOST_SHAPES:
            self._forget()
        for name, tensor in shape.inputs.items():
            value = inputs[name]
            if isinstance(value, Tensor):
                self.gpu.copy(tensor.address, value.address, tensor.nbytes)
            else:
                self.gpu.fill(tensor.address, np.ascontiguousarray(value))
        self._launch(shape)
        return shape

    def _launch(self, shape: _Shape) -> None:
        scratch = self.gpu.shared(max(shape.scratch_bytes, LEAST_SCRATCH))
        if shape.scratch != scratch:
            if shape.recording:
                shape.recording.free()
            shape.context.set_device_memory(scratch, shape.scratch_bytes)
            shape.scratch, shape.recording, shape.ran = scratch, None, False
        if shape.recording is None and shape.ran:
            shape.recording = self.gpu.record(lambda: self._execute(shape))
        if shape.recording:
            shape.recording.run()
        else:
            self._execute(shape)
            shape.ran = True

    def _execute(self, shape: _Shape) -> None:
        if not shape.context.execute_async_v3(self.gpu.stream):
            raise _explained(self.plan, "failed")

    def _prepared(self, inputs: Mapping[str, Any]) -> _Shape:
        """A context for the shapes of these inputs."""
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(self._profile(inputs), self.gpu.stream):
            raise _explained(self.plan, "makes no context")
        if not all(context.set_input_shape(name, tuple(inputs[name].shape)) for name in self.inputs):
            raise _explained(self.plan, "refuses the shapes")
        if lacking := context.infer_shapes():
            raise BundleError(f"{self.plan}: the shape of {lacking[0]!r} does not follow from the inputs; {AGAIN}")
        taken = {n: Tensor(self.gpu, tuple(inputs[n].shape), kind) for n, kind in self.inputs.items()}
        given = {n: Tensor(self.gpu, tuple(context.get_tensor_shape(n)), kind) for n, kind in self.outputs.items()}
        for name, tensor in (taken | given).items():
            if not context.set_tensor_address(name, tensor.address):
                raise _explained(self.plan, f"refuses the memory of {name!r}")
        return _Shape(context, taken, given, context.update_device_memory_size_for_shapes())

    def _profile(self, inputs: Mapping[str, Any]) -> int:
        """The first profile that takes the shapes of these inputs."""
        misfits = []
        for number, ranges in enumerate(self.profiles):
            fits = {name: _within(inputs[name].shape, *ranges[name]) for name in self.inputs}
            if all(fits.values()):
                return number
            name = next(name for name, fit in fits.items() if not fit)
            misfits.append(f"{name} of {tuple(ranges[name][0])} to {tuple(ranges[name][2])}")
        name = next(iter(misfits), "").partition(" ")[0] or next(iter(self.inputs))
        raise UsageError(
            f"{self.plan}: {name} of shape {tuple(inputs[name].shape)} is in no profile of the plan, which takes"
            f" {' or '.join(misfits)}; use the bundle's own --tile and --batch, or compile with another --tile"
        )

    def _check(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> None:
        """Refuse inputs and outputs that are not the plan's."""
        if unknown := sorted(inputs.keys() ^ self.inputs.keys()):
            what = "is missing" if unknown[0] in self.inputs else "is no input of the plan"
            raise BundleError(f"{self.plan}: input {unknown[0]!r} {what}; {OTHER_GRAPH}")
        if unknown := sorted(set(outputs) - self.outputs.keys()):
            raise BundleError(f"{self.plan}: has no output {unknown[0]!r}; {OTHER_GRAPH}")
        for name, kind in self.inputs.items():
            if np.dtype(inputs[name].dtype) != kind:
                raise BundleError(f"{self.plan}: input {name!r} is {inputs[name].dtype}, not {kind}; {OTHER_GRAPH}")

    def _forget(self) -> None:
        """Drop the shapes that were not used for the longest time."""
        _, shape = self.shapes.popitem(last=False)
        self.gpu.wait()
        if shape.recording:
            shape.recording.free()


def _within(shape: Iterable[int], least: Iterable[int], usual: Iterable[int], most: Iterable[int]) -> bool:
    sizes = tuple(shape)
    least, most = tuple(least), tuple(most)
    return len(sizes) == len(least) and all(a <= n <= b for a, n, b in zip(least, sizes, most, strict=True))


def open_engine(bundle: Bundle, component: str, spec: EngineSpec, opening: Opening) -> TensorrtEngine:
    """Open an engine of a component. `low` leaves weights in the host's memory, if the plan can do that."""
    table = spec.weights or component
    files = bundle.files_of(table, opening.weights_dir)
    with first_gpu() as gpu:
        engine = open_plan(bundle.path(spec.graph), gpu, low=opening.memory == "low")
        engine.weights.load(bundle.weights.tensors.get(table, {}), files)
    return engine


def open_plan(plan: Path, gpu: Gpu, *, low: bool = False) -> TensorrtEngine:
    """Open a plan, still without its weights. The caller has the GPU."""
    trt = _tensorrt()
    engine = trt.Runtime(logger()).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise _explained(plan, "refuses the plan")
    if low and engine.streamable_weights_size:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return TensorrtEngine(engine, plan, gpu, Refit(plan, trt.Refitter(engine, logger()), gpu))


def _explained(plan: Path, what: str) -> TilewrightError:
    """An error with the last words of TensorRT, and what to do about it."""
    told = logger().told[-1:] or ["without a message"]
    return explained(_numbered, REASONS, NOISE, plan, what, RuntimeError(told[0]))


def _numbered() -> str:
    return f"tensorrt {_tensorrt().__version__}"
