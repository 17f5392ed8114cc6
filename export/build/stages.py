"""The stages of a build: what each depends on, and the work that fills its directory.

trace: networks to graphs that wait for weights. attach: where each weight's bytes are. constants: what networks that
need no image give, computed now. optimise: graphs rewritten, with references to the weights, and how much memory they
need. verify: engines against eager PyTorch. seal: the bundle.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.export.build.attach import attach_weights
from tilewright.export.build.request import Request
from tilewright.export.system import ComponentSpec, part_of
from tilewright.export.systems import SYSTEMS, licence, system
from tilewright.export.targets import TARGETS
from tilewright.export.weights.files import write_tensors
from tilewright.runtime.bundle import (
    SCHEMA_VERSION,
    Component,
    Engine,
    Manifest,
    Memory,
    Reference,
    Weights,
    seal,
    write_manifest,
)
from tilewright.runtime.digests import cache_dir, sha256_of_bytes, sha256_of_file, writing
from tilewright.runtime.errors import BuildError, TilewrightError
from tilewright.runtime.program import TensorSpec
from tilewright.runtime.strict import encode, from_json, to_json

__all__ = ["Stage", "stages", "staging", "write"]

HOUSE = Path(__file__).parent.parent.parent  # export/, kernels/ and runtime/ lie here, installed or not
TOKENIZER_FILES = ("vocab.json", "merges.txt", "*token*.json")  # beside a text encoder
TRACERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnx")
OP_FILES = ("codebook*", "concat_project", "face", "*_attention", "qkv_norm_rope")  # what graphs are made of
TRACED = (
    "export/networks/*.py",
    *(f"kernels/{name}.py" for name in OP_FILES),
    "export/graph/ops.py",
    "export/graph/trace.py",
)
STORED = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32"}


@dataclass(frozen=True)
class Stage:
    """A step of a build: what it depends on, and the work that fills its directory."""

    name: str
    inputs: dict[str, str]
    work: Callable[[Path], None] = field(compare=False)

    @property
    def key(self) -> str:
        """Digest of the inputs."""
        return sha256_of_bytes(json.dumps([self.name, self.inputs], sort_keys=True).encode())

    @property
    def directory(self) -> Path:
        """Where its results are, once they are."""
        return cache_dir() / "build" / self.name / self.key[:32]


def stages(request: Request) -> list[Stage]:
    """The stages of a request, in order; nothing is run, weights are only hashed."""
    module = SYSTEMS[request.system].removeprefix("tilewright.").replace(".", "/") + ".py"
    settings = json.dumps(request.settings, sort_keys=True)
    asked = {"system": request.system, "preset": request.preset, "settings": settings}
    parts = getattr(system(request.system), "PARTS", ())
    systems = _code(module, "export/systems/__init__.py", *(f"export/systems/{part}" for part in parts))
    trace = Stage("trace", asked | systems | _code(*TRACED) | _versions(*TRACERS), lambda d: _trace(request, d))
    random = "none" if request.seed is None else f"random, seed {request.seed}"
    given = {"weights": random, "packed": str(request.pack)}
    for name, tensors in request.used.items():
        given[f"folder {name}"] = str(tensors.folder)
        given |= {f"weights {name}/{file}": sha256_of_file(tensors.folder / file) for file in tensors.sources}
    attached = Stage(
        "attach",
        {"trace": trace.key}
        | given
        | systems
        | _code("export/build/attach.py", "export/weights/files.py", "export/weights/lora.py", "runtime/bundle.py"),
        lambda d: attach_weights(request, trace.directory, d),
    )
    files = {
        f"file {name}": sha256_of_file(Path(value))
        for name, value in request.options.items()
        if _is(Path.is_file, value)
    }
    made = Stage(
        "constants",
        {"attach": attached.key, "options": json.dumps(request.options, sort_keys=True)}
        | files
        | _tokenizer_files(request)
        | _code("export/build/streamed.py", "export/tokenizers.py", "runtime/schedules.py"),
        lambda d: _constants(request, attached.directory, d),
    )
    optimised = Stage(
        "optimise",
        {"attach": attached.key, "ops": request.ops}
        | _code("export/graph/rewrites/*.py", "export/targets/*.py", "export/graph/footprint.py")
        | _versions("onnxscript", "onnx-ir"),
        lambda d: _optimise(request, trace.directory, attached.directory, d),
    )
    results = [trace, attached, made, optimised]
    parts = _Parts(request, attached.directory, made.directory, optimised.directory)
    documents = (f"runtime/{name}.py" for name in ("bundle", "check", "program", "strict"))
    whole = _code("export/build/stages.py", *documents) | systems
    if request.verify != "never":
        checks = _code("export/verify/engines.py", "export/verify/seams.py", "runtime/*.py", "runtime/engines/ort.py")
        verified = Stage(
            "verify",
            {"optimise": optimised.key, "constants": made.key} | checks | whole | _versions("torch", "onnxruntime"),
            lambda d: _verify(parts, d),
        )
        results.append(verified)
    last = {stage.name: stage.key for stage in results} | {"version": _version("tilewright")} | whole
    verified_at = results[-1].directory if request.verify != "never" else None
    results.append(Stage("seal", last, lambda d: _seal(parts, verified_at, d)))
    return results


def _is(kind: Callable[[Path], bool], value: Any) -> bool:
    try:
        return isinstance(value, str) and kind(Path(value))
    except OSError:  # words too long for a name
        return False


def _tokenizer_files(request: Request) -> dict[str, str]:
    files = sorted(request.folder.glob("tokenizer*/*")) if request.folder else []
    given = (Path(value) for value in request.options.values() if _is(Path.is_dir, value))
    files += [file for folder in given for name in TOKENIZER_FILES for file in sorted(folder.glob(name))]
    return {f"tokenizer {file.parent.name}/{file.name}": sha256_of_file(file) for file in files if file.is_file()}


def _trace(request: Request, directory: Path) -> None:
    from tilewright.export.graph.trace import parameter_specs

    shapes = {}
    for name, source in request.components.items():
        graph = _graph(request, name, source)
        shutil.copyfile(graph / "traced.onnx", directory / f"{name}.onnx")
        shapes[name] = json.loads((graph / "parameters.json").read_text())
    for name, source in request.build_time.items():
        shapes[name] = {key: [int(d) for d in spec.shape] for key, spec in parameter_specs(source).items()}
    write(directory / "parameters.json", json.dumps(shapes, indent=1, sort_keys=True))


def _graph(request: Request, name: str, source: ComponentSpec) -> Path:
    """The directory with a component's graph as traced; one that any system or preset has traced is taken."""
    import onnx_ir as ir

    from tilewright.export.graph.trace import trace

    inputs = {"recipe": source.recipe} | _code(*TRACED) | _versions(*TRACERS)
    directory = Stage("graph", inputs, lambda d: None).directory
    if directory.is_dir():
        return directory
    try:
        model = trace(source)
    except TilewrightError:
        raise
    except Exception as error:  # anything torch.export or the exporter may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(f"trace of {request.system}.{name} failed ({reason}); see --verbose") from error
    with staging(directory) as folder:
        ir.save(model, folder / "traced.onnx")
        write(folder / "parameters.json", json.dumps(_parameters(model), indent=1, sort_keys=True))
        folder.rename(directory)
    return directory


def _parameters(model: Any) -> dict[str, list[int]]:
    """The shapes of the weights a traced graph waits for."""
    import onnx_ir as ir

    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: list(t.shape.numpy()) for name, t in tensors if isinstance(t, ir.ExternalTensor)}


def _constants(request: Request, attached: Path, directory: Path) -> None:
    """What the program reads but no engine gives; tokenizers."""
    module, weights = system(request.system), _read_weights(attached)
    folders = {n: attached / "weights" / n if f.path is None else Path(f.path) for n, f in weights.folders.items()}

    def run(component: str, **inputs: Any) -> dict[str, Any]:
        from tilewright.export.build.streamed import run_streamed  # PyTorch, where there is something to run

        refs = {n: (folders[weights.folder_name(component, r)], r) for n, r in weights.tensors[component].items()}
        return run_streamed(request.build_time[component], refs, inputs)

    made = module.constants(request.preset, run, request.options, request.folder, **request.settings)
    if made:
        specs = {name: TensorSpec(str(array.dtype), array.shape) for name, array in sorted(made.items())}
        write_tensors(directory / "constants.safetensors", specs, (made[n].tobytes() for n in specs), "made at build")
    for name, text in module.tokenizers(request.preset, request.options, request.folder, **request.settings).items():
        write(directory / name, text)


def _read_weights(attached: Path) -> Weights:
    return from_json(Weights, (attached / "weights.json").read_bytes(), str(attached / "weights.json"))


def _optimise(request: Request, traced: Path, attached: Path, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.graph.footprint import footprint
    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.rewrites.cast import cast
    from tilewright.export.graph.rewrites.fold import fold

    weights = _read_weights(attached)
    memory = {}
    for name, source in request.components.items():
        model = ir.load(traced / f"{name}.onnx")
        fold(model)
        memory[name] = footprint(model, partial(_sizes, source))
        if request.ops == "standard":
            inline(model)
            fold(model)
        _refer(model, weights.tensors.get(name, {}))
        cast(model)
        (directory / name).mkdir(parents=True)
        ir.save(model, directory / name / "model.onnx")
        for target, module in TARGETS.items():
            copy = ir.load(directory / name / "model.onnx")
            if importlib.import_module(module).prepare(copy):
                ir.save(copy, directory / name / f"{target}.onnx")
    write(directory / "memory.json", json.dumps(encode(memory), indent=1, sort_keys=True))


def _refer(model: Any, references: Mapping[str, Reference]) -> None:
    import onnx_ir as ir

    for name, r in references.items():
        if name in model.graph.initializers:  # folding may have found a parameter without effect
            dtype, shape = STORED[r.dtype], ir.Shape(r.shape)
            file = r.file if r.folder is None else f"{r.folder}/{r.file}"
            value = ir.ExternalTensor(file, r.offset, r.length, ir.DataType[dtype], shape=shape, name=name)
            model.graph.initializers[name].const_value = value


def _sizes(source: ComponentSpec, side: int) -> dict[str, int]:
    """The free sizes of a component for a square of that many output pixels."""
    specs = (*source.inputs.values(), *source.outputs.values())
    named = {d for spec in specs for d in spec.shape if isinstance(d, str)}
    wholes = {whole: side // source.px[whole] if whole in source.px else 1 for whole, _ in map(part_of, named)}
    sizes = {name: wholes[part_of(name)[0]] // part_of(name)[1] for name in named}
    return sizes | {f"{name}_units": wholes[name] // multiple for name, multiple in source.multiples.items()}


@dataclass(frozen=True)
class _Parts:
    """Where the finished stages of a request are."""

    request: Request
    attached: Path
    constants: Path
    optimised: Path

    def weights(self) -> Weights:
        """What the bundle's graphs refer to: not what ran at build only."""
        every = _read_weights(self.attached)
        tensors = {name: refs for name, refs in every.tensors.items() if name in self.request.components}
        used = {every.folder_name(name, r) for name, refs in tensors.items() for r in refs.values()}
        folders = {name: folder for name, folder in every.folders.items() if name in used}
        return Weights(folders, {name: every.folder_of[name] for name in tensors}, tensors)

    def assemble(self, root: Path, verified: str) -> Manifest:
        """Everything of the bundle but packed weights, reports and the manifest, which is returned."""
        request, module = self.request, system(self.request.system)
        for name in request.components:
            shutil.copytree(self.optimised / name, root / name)
        write(root / "weights.json", to_json(self.weights()))
        shutil.copytree(self.constants, root, dirs_exist_ok=True)
        write(root / "program.json", to_json(module.program(request.preset, **request.settings)))
        memory = json.loads((self.optimised / "memory.json").read_text())
        components = {
            name: Component(
                f"{name}/model.onnx",
                source.inputs,
                source.outputs,
                tuple(Engine(target, "float32", _engine_file(root, name, target)) for target in TARGETS),
                Memory(**memory[name]),
            )
            for name, source in request.components.items()
        }
        folders = self.weights().folders
        random = folders.keys() - request.used.keys() - {"merged"}
        but = f", but for {', '.join(sorted(folders.keys() - random))}" if folders.keys() - random else ""
        given = "stand-in, zeros" if request.stand_in else "given"
        weights = f"random, seed {request.seed}{but}" if random else given
        packed = "yes" if all(folder.path is None for folder in folders.values()) else "no"
        settings = json.dumps(request.settings, sort_keys=True)
        return Manifest(
            SCHEMA_VERSION,
            request.system,
            request.preset,
            "float32",
            licence(request.system, request.preset),
            components,
            {},
            {package: _version(package) for package in (*TRACERS, "tilewright")},
            {"weights": weights, "packed": packed, "ops": request.ops, "settings": settings, "verified": verified},
            constants="constants.safetensors" if (root / "constants.safetensors").is_file() else None,
            tokenizers=tuple(f"tokenizers/{file.name}" for file in sorted((root / "tokenizers").glob("*.json"))),
        )


def _engine_file(root: Path, component: str, target: str) -> str:
    """A target's own graph, or the portable one where it had nothing to change."""
    own = f"{component}/{target}.onnx"
    return own if (root / own).is_file() else f"{component}/model.onnx"


def _verify(parts: _Parts, directory: Path) -> None:
    from tilewright.export.verify.engines import require, verify

    trial = directory / "bundle"
    write_manifest(trial, parts.assemble(trial, "being verified"))
    report = verify(trial, weights_dir=parts.attached / "weights")
    shutil.rmtree(trial)
    write(directory / "accuracy.json", json.dumps(report, indent=2, sort_keys=True) + "\n")
    require(report)


def _seal(parts: _Parts, verified: Path | None, folder: Path) -> None:
    request, done = parts.request, verified is not None and (verified / "accuracy.json").is_file()
    manifest = parts.assemble(folder, "yes" if done else "no")
    for name, kept in parts.weights().folders.items():
        if kept.path is None:
            shutil.copytree(parts.attached / "weights" / name, folder / "weights" / name)
    (folder / "reports").mkdir()
    shutil.copyfile(parts.attached / "accounts.json", folder / "reports" / "weights.json")
    report = None
    if verified is not None and done:
        shutil.copyfile(verified / "accuracy.json", folder / "reports" / "accuracy.json")
        report = json.loads((verified / "accuracy.json").read_text())
    write(folder / "README.md", _card(request, manifest, report))
    seal(folder, manifest, request.out)


def _card(request: Request, manifest: Manifest, report: dict[str, Any] | None) -> str:
    measured = "not verified against eager PyTorch"
    if report:
        measured = f"engine against eager PyTorch: PSNR {report['restore']['psnr_db']:.1f} dB on {report['image']}"
    lines = [
        f"# {request.system}, preset {request.preset}",
        "",
        system(request.system).TITLE + ".",
        "",
        f"- weights: {manifest.options['weights']}; licence: {manifest.licence}",
        f"- precision: {manifest.precision}; {measured}",
        f"- made with {', '.join(f'{k} {v}' for k, v in sorted(manifest.made_with.items()))}",
        "",
        "    tilewright runtime restore in.png out.png --bundle THIS_DIRECTORY",
        "",
    ]
    return "\n".join(lines)


def _code(*patterns: str) -> dict[str, str]:
    files = sorted(file for pattern in patterns for file in HOUSE.glob(pattern))
    return {f"code {file.relative_to(HOUSE)}": sha256_of_file(file) for file in files}


def _versions(*packages: str) -> dict[str, str]:
    return {f"version {package}": _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(path: Path, text: str) -> None:
    """Put a text in a file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A sibling directory to fill; what is left of it, and of earlier killed builds, is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.part"):
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
