"""ONNX Runtime on an NVIDIA GPU. Inputs and outputs are bound to memory of the GPU, where they may stay between calls.

This backend has run only with ONNX Runtime's CPU provider in the place of CUDA's, and never on a GPU.

Each of the first few shapes keeps its inputs and outputs at fixed addresses, and ONNX Runtime records the work of its
calls as a CUDA graph, which later calls replay. Other shapes run without a recording. So does every call if a node runs
on the CPU, or if recording fails.
"""

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines import Opening, ort
from tilewright.runtime.engines.driver import Gpu, Tensor, first_gpu
from tilewright.runtime.engines.explained import OTHER_GRAPH, explained
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, TilewrightError

__all__ = ["PACKAGES", "CudaEngine", "missing", "open_engine", "open_graph", "provider_options", "version"]

PACKAGES = ("onnxruntime",)
LOG = logging.getLogger("tilewright")
LIBRARY = Path("capi", "libonnxruntime_providers_cuda.so")  # in the package of ONNX Runtime
UNPROVEN = "never run on a GPU by Tilewright's tests"
RECORDED = 8  # shapes of an engine; their memory stays as long as the engine
NOT_RECORDED = -1  # the number of a graph that ONNX Runtime neither records nor replays
ON_CPU = ("fallback to CPU EP has been explicitly disabled", "cannot use the graph capture feature")
MEMORY = "use a smaller --tile or --batch"
REASONS = (
    ("cuda.*out of memory|cudaErrorMemoryAllocation|bfc_?arena", ResourceError, MEMORY),
    (
        "failed to load library",
        EnvironmentMismatch,
        "CUDA's libraries are not found: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    ),
    (
        "(cuda|cudnn|cublas) failure",
        EnvironmentMismatch,
        "the GPU refuses: see nvidia-smi, and which CUDA this ONNX Runtime needs",
    ),
    *ort.REASONS,
)
TYPES = {  # of ONNX Runtime -> of NumPy; those of our inputs and outputs
    "tensor(float)": np.float32,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def missing() -> str | None:
    """What is needed to run ONNX Runtime on a GPU here, or none."""
    package = importlib.util.find_spec("onnxruntime")
    if package is None or package.origin is None or not (Path(package.origin).parent / LIBRARY).is_file():
        return f"needs ONNX Runtime for CUDA: pip uninstall onnxruntime; pip install onnxruntime-gpu ({UNPROVEN})"
    return None


def version() -> str:
    """The name and version of ONNX Runtime."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} with CUDA ({UNPROVEN})"


_explained = partial(explained, version, REASONS, ort.NOISE)


def provider_options(stream: int, *, graphs: bool) -> dict[str, str]:
    """The options of ONNX Runtime's CUDA provider. Its work is put into this stream of the driver."""
    return {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",  # powers of two would waste a third of the memory
        "cudnn_conv_algo_search": "HEURISTIC",  # a search for each new size of a tile would take seconds
        "use_tf32": "0",  # float32 has its 24 bits, as the accuracy gate asks
        "enable_cuda_graph": str(int(graphs)),
    }


@dataclass
class _Shape:
    """The buffers of calls with certain shapes, at fixed addresses."""

    number: int  # of their recording, or NOT_RECORDED
    inputs: dict[str, Tensor]
    binding: Any


class CudaEngine:
    """One graph in one session. Calls run one after another.

    `place`: the device of ONNX Runtime whose memory the driver gives: cuda, or cpu in tests.
    """

    def __init__(self, session: Any, graph: Path, gpu: Gpu, *, place: str, graphs: bool) -> None:
        self.session, self.graph, self.gpu, self.place, self.graphs = session, graph, gpu, place, graphs
        self.inputs = {slot.name: TYPES[slot.type] for slot in session.get_inputs()}
        self.outputs = {slot.name: TYPES[slot.type] for slot in session.get_outputs()}
        self.shapes: dict[tuple[Any, ...], _Shape] = {}

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs, as arrays."""
        return {name: tensor.array() for name, tensor in self.run_on(inputs, outputs).items()}

    def run_on(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Tensor]:
        """The same, with outputs that stay on the GPU. Inputs may be tensors there."""
        names = list(outputs)
        self._check(inputs, names)
        with self.gpu:
            try:
                return self._called(inputs, names)
            except TilewrightError:
                raise
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise _explained(self.graph, "failed", error) from error

    def _called(self, inputs: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
        key = self._key(inputs)
        shape = self.shapes.get(key) or self._shape(inputs, self._number())
        if recorded := shape.number != NOT_RECORDED:  # other addresses would need another recording
            self.shapes[key] = shape
        for name, tensor in shape.inputs.items():
            self._fill(tensor, inputs[name])
        shape.binding.synchronize_inputs()
        try:
            self.session.run_with_iobinding(shape.binding, self._options(shape.number))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if not recorded:
                raise
            return self._unrecorded(inputs, names, error)
        tensors = {}
        results = dict(zip(self.outputs, shape.binding.get_outputs(), strict=True))
        for name in names:
            value = results[name]
            tensors[name] = Tensor(self.gpu, tuple(value.shape()), self.outputs[name])
            self.gpu.copy(tensors[name].address, value.data_ptr(), tensors[name].nbytes)
        self.gpu.wait()  # until then inputs and outputs must stay
        if recorded:
            for name, value in results.items():
                shape.binding.bind_ortvalue_output(name, value)  # at the same address next time
        return tensors

    def _unrecorded(self, inputs: Mapping[str, Any], names: list[str], error: Exception) -> dict[str, Tensor]:
        """The outputs of a call that failed with a recording. If it works without, nothing is recorded any more."""
        before, self.shapes, self.graphs = dict(self.shapes), {}, False
        try:
            tensors = self._called(inputs, names)
        except Exception:  # the inputs are at fault
            before.pop(self._key(inputs))
            self.shapes, self.graphs = before, True
            raise
        LOG.warning("%s: calls are not recorded, as ONNX Runtime failed: %s", self.graph, one_line(str(error)))
        return tensors

    def _key(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(tuple(inputs[name].shape) for name in self.inputs)

    def _number(self) -> int:
        """The number of the next recording."""
        return len(self.shapes) + 1 if self.graphs and len(self.shapes) < RECORDED else NOT_RECORDED

    def _shape(self, inputs: Mapping[str, Any], number: int) -> _Shape:
        """New buffers for inputs of these shapes. ONNX Runtime takes the memory of outputs in the first call."""
        binding, tensors = self.session.io_binding(), {}
        for name, kind in self.inputs.items():
            tensor = tensors[name] = Tensor(self.gpu, tuple(inputs[name].shape), kind)
            binding.bind_input(name, self.place, 0, kind, tensor.shape, tensor.address)
        for name in self.outputs:
            binding.bind_output(name, self.place, 0)
        return _Shape(number, tensors, binding)

    def _fill(self, tensor: Tensor, value: Any) -> None:
        if isinstance(value, Tensor):
            self.gpu.copy(tensor.address, value.address, tensor.nbytes)
        else:
            array = np.ascontiguousarray(value)
            self.gpu.fill(tensor.address, array)
            self.gpu.wait()  # until then the array must stay

    def _options(self, number: int) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def _check(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> None:
        """Refuse inputs and outputs that are not the graph's: an address has no type."""
        if differing := sorted(inputs.keys() ^ self.inputs.keys()):
            raise BundleError(f"{self.graph}: input {differing[0]!r} is missing or unknown; {OTHER_GRAPH}")
        if unknown := sorted(set(outputs) - self.outputs.keys()):
            raise BundleError(f"{self.graph}: has no output {unknown[0]!r}; {OTHER_GRAPH}")
        for name, kind in self.inputs.items():
            if inputs[name].dtype != kind:
                raise BundleError(f"{self.graph}: input {name!r} is not of type {np.dtype(kind)}; {OTHER_GRAPH}")

    def close(self) -> None:
        """Free the memory."""
        with self.gpu:
            self.shapes.clear()
            self.session = None


def open_engine(bundle: Bundle, component: str, spec: EngineSpec, opening: Opening) -> CudaEngine:
    """Open an engine of a component. Weights are read from their own files, and copied to the GPU."""
    files = bundle.files_of(spec.weights or component, opening.weights_dir)
    return open_graph(bundle.path(spec.graph), files, first_gpu())


def open_graph(
    graph: Path, files: Mapping[str, Path], gpu: Gpu, *, place: str = "cuda", graphs: bool = True
) -> CudaEngine:
    """Open a graph. `files`: path of weights in the graph -> real path. `graphs`: record calls."""
    import onnxruntime

    if place == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EnvironmentMismatch(f"{graph}: this ONNX Runtime has no CUDA; it {missing()}")
    # ONNX Runtime itself refuses to record if more runs on the CPU than the arithmetic of shapes
    tries = [(True, graphs), (False, graphs), (False, False)] if place == "cuda" else [(False, graphs)]
    for strict, recorded in dict.fromkeys(tries):
        try:
            with gpu:
                session = _session(graph, files, gpu, place, strict=strict, graphs=recorded)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if (strict or recorded) and any(words in str(error) for words in ON_CPU):
                continue
            raise _explained(graph, "refuses the graph", error) from error
        break
    if place == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise EnvironmentMismatch(
            f"{version()} does not load the CUDA libraries; pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    if place == "cuda" and not strict and not recorded:
        LOG.warning("%s: some nodes have no CUDA kernel and run on the CPU, and calls are not recorded", graph)
    return CudaEngine(session, graph, gpu, place=place, graphs=recorded)


def _session(graph: Path, files: Mapping[str, Path], gpu: Gpu, place: str, *, strict: bool, graphs: bool) -> Any:
    """A session of ONNX Runtime. `strict`: no node may run on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    model: str | bytes = str(graph)
    options.log_severity_level = 2 if LOG.isEnabledFor(logging.DEBUG) else 4
    options.add_session_config_entry("session.load_model_format", "ONNX")  # for any suffix of the file
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(strict)))
    if files:
        model, folder = ort.with_places(graph, files)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    provider: Any = ("CUDAExecutionProvider", provider_options(gpu.stream, graphs=graphs))
    providers = [provider if place == "cuda" else "CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, options, providers=providers)
