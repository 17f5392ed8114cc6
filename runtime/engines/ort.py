"""ONNX Runtime on the CPU, with our own kernels where they are installed or built.

With `fast` ONNX Runtime re-packs the weights as float32 for speed; `low` runs on the mapped files.
Graphs name their weights by the paths in a packed bundle. A graph is opened with the real paths, below one folder that
contains all files, because ONNX Runtime maps no file behind a link.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

from tilewright.runtime.bundle.external_data import external_data, relocated
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines import Opening
from tilewright.runtime.engines.arena import give_back, take_shared
from tilewright.runtime.engines.explained import DAMAGED, MEMORY, OTHER_GRAPH, OTHER_SIZE, Reason, explained
from tilewright.runtime.errors import (
    BundleError,
    EnvironmentMismatch,
    ResourceError,
    UsageError,
)

__all__ = ["PACKAGES", "OrtEngine", "missing", "native_library", "open_engine", "open_graph", "version", "with_places"]

PACKAGES = ("onnxruntime",)
LOG = logging.getLogger("tilewright")

# where `make native` puts our kernels in a clone, and where they lie in a platform wheel
NATIVE = Path(__file__).parents[2] / "kernels" / "native" / "lib" / "libtilewright_cpu.so"


def missing() -> str | None:
    """What is needed to run ONNX Runtime here, or none."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "needs ONNX Runtime: pip install 'tilewright[cpu]'"
    return None


def version() -> str:
    """The name and version of ONNX Runtime, and whether native kernels are used."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}{' with native kernels' if native_library() else ''}"


def native_library() -> Path | None:
    """The library of our kernels, if there is one. TILEWRIGHT_NATIVE names another one, or none if it is empty."""
    path = os.environ.get("TILEWRIGHT_NATIVE", str(NATIVE))
    return Path(path) if path and (Path(path).is_file() or "TILEWRIGHT_NATIVE" in os.environ) else None


NEWER_GRAPH = "this version of ONNX Runtime is too old for the graph: pip install -U onnxruntime"

# words of ONNX Runtime's messages, the error that they mean, and what to do; the first that fit count
REASONS: tuple[Reason, ...] = (
    (
        "allocate|bad_alloc|out of memory|size overflowed|exceeds the supported maximum of",
        ResourceError,
        MEMORY,
    ),
    ("invalid (dimensions|rank) for input", UsageError, OTHER_SIZE),
    ("unexpected input data type|required inputs|invalid (input|output) name", BundleError, OTHER_GRAPH),
    (
        "unsupported model ir version|opset .*(under development|not supported)|could not find an implementation"
        '|, \\w+, "(?!tilewright)[^"]*", -?\\d+\\).* no op registered'
        r"|fatal error: (?!tilewright)\S+ is not a registered",
        EnvironmentMismatch,
        NEWER_GRAPH,
    ),
    (
        "not a registered function/op|no op registered|fatal error: tilewright",
        EnvironmentMismatch,
        "the graph needs our kernels: run make native in a clone, or install Tilewright's wheel",
    ),
    (
        "protobuf|invalid.graph|invalid model|type error",
        BundleError,
        DAMAGED,
    ),
    (
        "external (data|initializer)|no such file|out of bounds",
        BundleError,
        "a file is damaged or has moved: name the folder with --weights-dir, or rebuild the bundle",
    ),
    (
        "out of data bounds",
        UsageError,
        "a number among the inputs is no index of the network: give ids of this bundle's own tokenizers",
    ),
    ("while running", UsageError, OTHER_SIZE),  # a node refuses its inputs
)
# parts of these messages that help nobody: codes, the place of the graph, places in ONNX Runtime's code
NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed: ?|Non-zero status code returned while (?=running)"
    r"|/onnxruntime_src/\S+ .*?\) (?=\S)|\b\w+\.(cc|h):\d+ \w+ "
)
_explained = partial(explained, version, REASONS, NOISE)


class OrtEngine:
    """One graph in one session."""

    def __init__(self, session: Any, graph: Path) -> None:
        self.session, self.graph = session, graph
        self.running: dict[int, Any] = {}  # thread -> the options of its call

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        import onnxruntime as ort

        names, options = list(outputs), ort.RunOptions()
        self.running[get_ident()] = options
        try:
            values = self.session.run(names, dict(inputs), options)
            # a value lies in the arena, and as long as it is kept, its block of the arena stays in pieces
            return {name: value.copy() for name, value in zip(names, values, strict=True)}
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if options.terminate:
                raise CancelledError from error
            raise _explained(self.graph, "failed", error) from error
        finally:
            del self.running[get_ident()]

    def stop(self, thread: int) -> None:
        """End the call of this thread, if it is in one, before the next node of the graph. The call then raises."""
        if options := self.running.get(thread):
            options.terminate = True

    def close(self) -> None:
        """Free the memory."""
        self.session = None
        give_back()


def open_engine(bundle: Bundle, component: str, spec: EngineSpec, opening: Opening) -> OrtEngine:
    """Open an engine of a component. Weights are read from their own files. It takes any number of calls at once."""
    files = bundle.files_of(spec.weights or component, opening.weights_dir)
    native = spec.precision == "float32"  # our kernels compute in float32 only
    graph = bundle.path(spec.graph)
    return open_graph(
        graph, files, precision=spec.precision, memory=opening.memory, threads=opening.threads, native=native
    )


def open_graph(
    graph: Path,
    files: Mapping[str, Path],
    *,
    precision: str = "float32",
    memory: str = "fast",
    threads: int = 0,
    native: bool = True,
    profile: Path | None = None,
) -> OrtEngine:
    """Open a graph. `files`: path of weights in the graph -> real path. `threads` 0: ONNX Runtime chooses.

    `profile`: how the names of profiles begin that the session writes.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # errors come as exceptions too, so nothing is logged except with --verbose
    options.log_severity_level = 2 if LOG.isEnabledFor(logging.DEBUG) else 4
    take_shared(options)
    # a pattern is one block for all values of a call, beside the blocks of the first call: twice the memory, same speed
    options.enable_mem_pattern = False
    # each component has its own threads, which must not occupy cores while another component runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # for any suffix of the file
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if precision == "fp8":  # it would fuse 8-bit floats into products of integers, and then refuse them
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    model: str | bytes = str(graph)
    if files:
        model, folder = with_places(graph, files)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if native and (library := native_library()):
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise EnvironmentMismatch(
                f"native kernels {library} do not load ({one_line(str(error))}); run make native in a clone, "
                "install Tilewright anew, or set TILEWRIGHT_NATIVE= to do without"
            ) from error
    disabled = list[str]()
    if memory == "low":
        # folding and pre-packing would each copy the mapped weights
        options.add_session_config_entry("session.disable_prepacking", "1")
        disabled = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
    if precision == "int8":
        disabled += ["MatMulAddFusion"]  # the sum would be a Gemm, which has no form for integers with a float bias
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _explained(graph, "refuses the graph", error) from error
    give_back()  # re-packing leaves a fifth of the weights' size in free blocks
    return OrtEngine(session, graph)


def with_places(graph: Path, files: Mapping[str, Path]) -> tuple[bytes, Path]:
    """The graph with the real paths of its weights, and the folder that they are relative to."""
    data = graph.read_bytes()
    weights = external_data(data, str(graph))
    real = {name: files[name].resolve() for name in {weight.location for weight in weights.values()}}
    folder = Path(os.path.commonpath([file.parent for file in real.values()] or [graph.parent.resolve()]))
    places = {
        name: (real[weight.location].relative_to(folder).as_posix(), weight.offset, weight.length)
        for name, weight in weights.items()
    }
    return relocated(data, places), folder
