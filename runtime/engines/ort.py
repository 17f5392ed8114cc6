"""ONNX Runtime on the CPU, with our own kernels where they are built.

`fast` lets it re-pack the weights for speed, which holds them twice; `low` runs on the mapped files as they are.
ONNX Runtime maps what lies in one folder and is no link out of it; weights that lie otherwise, as in the snapshots of
Hugging Face's cache, are named in the graph by where they are below the folder that holds all.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.external_data import external_data, relocated
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError

__all__ = ["OrtEngine", "missing", "native_library", "open_engine", "open_graph", "version"]

NATIVE = Path(__file__).parents[2] / "kernels" / "native" / "lib" / "libtilewright_cpu.so"  # what `make native` builds


def missing() -> str | None:
    """Why ONNX Runtime cannot run here; none when it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "engine backend 'ort' needs ONNX Runtime: pip install 'tilewright[cpu]'"
    return None


def version() -> str:
    """Name and version of what runs."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}{' with native kernels' if native_library() else ''}"


def native_library() -> Path | None:
    """Our kernels for ONNX Runtime, if built; TILEWRIGHT_NATIVE names another library, or none when it is empty."""
    path = os.environ.get("TILEWRIGHT_NATIVE", str(NATIVE))
    return Path(path) if path and (Path(path).is_file() or "TILEWRIGHT_NATIVE" in os.environ) else None


class OrtEngine:
    """One graph in one session."""

    def __init__(self, session: Any, graph: Path) -> None:
        self.session, self.graph = session, graph

    def run(self, inputs: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
        """The wanted outputs for these inputs."""
        names = list(wanted)
        try:
            return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = one_line(str(error))
            if "allocate memory" in reason:
                raise ResourceError(f"{self.graph}: {reason}; use a smaller --tile or --memory low") from error
            raise BundleError(f"{self.graph}: {version()} failed ({reason}); verify the bundle") from error

    def close(self) -> None:
        """Give the memory back."""
        self.session = None


def open_engine(
    bundle: Bundle, component: str, *, memory: str = "fast", threads: int = 0, weights_dir: Path | None = None
) -> OrtEngine:
    """Open a component of a bundle; weights are read where they lie."""
    engine = next(e for e in bundle.manifest.components[component].engines if e.backend == "ort")
    folder = bundle.weights_folder(component, weights_dir)
    mapped = _spread(bundle, component, folder, weights_dir)
    native = engine.precision == "float32"  # what our kernels compute in
    return open_graph(bundle.path(engine.file), folder, memory=memory, threads=threads, mapped=mapped, native=native)


def _spread(
    bundle: Bundle, component: str, own: Path | None, weights_dir: Path | None
) -> dict[str, tuple[Path, Reference]]:
    """Each initializer's file, or none where all lie in the component's own folder and ONNX Runtime finds them."""
    references = bundle.weights.tensors.get(component, {})
    place = {n: (bundle.weights.folder_name(component, r), r.file) for n, r in references.items()}
    folders = {name: bundle.folder(name, weights_dir) for name in {folder for folder, _ in place.values()}}
    files = {(folder, file): (folders[folder] / file).resolve() for folder, file in set(place.values())}
    real = own.resolve() if own else Path()
    if all(r.folder is None for r in references.values()) and all(f.is_relative_to(real) for f in files.values()):
        return {}
    return {name: (files[place[name]], r) for name, r in references.items()}


def open_graph(
    graph: Path,
    weights: Path | None,
    *,
    memory: str = "fast",
    threads: int = 0,
    mapped: Mapping[str, tuple[Path, Reference]] | None = None,
    native: bool = True,
) -> OrtEngine:
    """Open a graph file whose external data lies in `weights`, or each where `mapped` says; 0 threads: its choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # each component has a thread pool of its own; between runs it must not take the cores of the one that runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever its suffix says
    model: str | bytes = str(graph)
    if mapped:
        model, weights = _with_places(graph, mapped)
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    if native and (library := native_library()):
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise EnvironmentMismatch(
                f"native kernels {library} do not load ({one_line(str(error))}); run make native, or "
                "set TILEWRIGHT_NATIVE= to do without"
            ) from error
    disabled = []
    if memory == "low":
        # folding, pre-packing and the arena each make a copy of what is mapped
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        disabled = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        reason = one_line(str(error))
        raise BundleError(f"{graph}: {version()} refuses the graph ({reason}); rebuild the bundle") from error
    return OrtEngine(session, graph)


def _with_places(graph: Path, mapped: Mapping[str, tuple[Path, Reference]]) -> tuple[bytes, Path]:
    """The graph that names these files, and the folder that it names them from."""
    data = graph.read_bytes()
    used = {name: mapped[name] for name in external_data(data, str(graph))}
    files = {file: file.resolve() for file in {file for file, _ in used.values()}}
    root = Path(os.path.commonpath([file.parent for file in files.values()] or [graph.parent]))
    places = {name: (files[file].relative_to(root).as_posix(), r.offset, r.length) for name, (file, r) in used.items()}
    return relocated(data, places), root
