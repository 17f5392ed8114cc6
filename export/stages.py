"""The five stages of a build: what each depends on, and the work that fills its directory.

trace: networks to graphs that wait for weights. attach: where each weight's bytes are. optimise: graphs rewritten, with
references to the weights, and how much memory they need. verify: engines against eager PyTorch. seal: the bundle.
"""

import importlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.export.systems import Source, system
from tilewright.export.targets import TARGETS
from tilewright.export.weights import Tensors, attach, copy_tensors, find, random_weights
from tilewright.runtime.bundle import (
    SCHEMA_VERSION,
    Component,
    Engine,
    File,
    Folder,
    Manifest,
    Memory,
    Reference,
    Weights,
    seal,
    write_manifest,
)
from tilewright.runtime.digests import cache_dir, sha256_of_bytes, sha256_of_file, writing
from tilewright.runtime.errors import BuildError, TilewrightError, UsageError
from tilewright.runtime.strict import encode, from_json, to_json

__all__ = ["VERIFY_MODES", "Request", "Stage", "parameter_count", "stages", "write"]

HOUSE = Path(__file__).parent.parent  # export/, kernels/ and runtime/ lie here, installed or not
TRACERS = ("torch", "transformers", "onnxscript", "onnx-ir", "onnx")
VERIFY_MODES = ("always", "never")
STORED = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32"}


@dataclass(frozen=True)
class Request:
    """What to build and where."""

    system: str
    preset: str
    out: Path
    weights: Path | None = None  # none: random ones from the seed
    seed: int = 0
    pack: bool = False  # copy the weights into the bundle
    verify: str = "always"

    def __post_init__(self) -> None:
        presets = system(self.system).PRESETS
        if self.preset not in presets:
            raise UsageError(f"preset {self.preset!r} of {self.system} is not one of {', '.join(presets)}")
        if self.verify not in VERIFY_MODES:
            raise UsageError(f"verify={self.verify!r} is not one of {', '.join(VERIFY_MODES)}")


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
    found = find(request.weights) if request.weights else None
    module = f"export/systems/{request.system}.py"
    asked = {"system": request.system, "preset": request.preset}
    sources = _code(module, "export/networks/*.py", "kernels/*.py", "export/trace.py", "export/systems/__init__.py")
    trace = Stage("trace", asked | sources | _versions(*TRACERS), lambda d: _trace(request, d))
    given = {"weights": f"random, seed {request.seed}", "packed": "yes"}
    if found:
        digests = {f"weights {name}": sha256_of_file(found.folder / name) for name in found.sources}
        given = {"packed": str(request.pack), "folder": str(found.folder)} | digests
    attached = Stage(
        "attach",
        {"trace": trace.key} | given | _code(module, "export/weights.py", "runtime/bundle.py"),
        lambda d: _attach(request, found, trace.directory, d),
    )
    optimised = Stage(
        "optimise",
        {"attach": attached.key}
        | _code("export/rewrites/*.py", "export/targets/*.py", "export/footprint.py")
        | _versions("onnxscript", "onnx-ir"),
        lambda d: _optimise(request, trace.directory, attached.directory, d),
    )
    results = [trace, attached, optimised]
    documents = (f"runtime/{name}.py" for name in ("bundle", "check", "program", "strict"))
    whole = _code("export/stages.py", module, *documents)
    if request.verify == "always":
        checks = _code("export/verify.py", "runtime/scheduler.py", "runtime/restore.py", "runtime/engines/ort.py")
        verified = Stage(
            "verify",
            {"optimise": optimised.key} | checks | whole | _versions("torch", "onnxruntime"),
            lambda d: _verify(request, attached.directory, optimised.directory, d),
        )
        results.append(verified)
    last = {results[-1].name: results[-1].key, "optimise": optimised.key, "version": _version("tilewright")} | whole
    verified_at = results[-1].directory if request.verify == "always" else None
    results.append(
        Stage(
            "seal",
            last,
            lambda d: _seal(request, attached.directory, optimised.directory, verified_at, d),
        )
    )
    return results


def _trace(request: Request, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.trace import trace

    shapes = {}
    for name, source in _components(request).items():
        try:
            model = trace(source)
        except TilewrightError:
            raise
        except Exception as error:  # anything torch.export or the exporter may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BuildError(f"trace of {request.system}.{name} failed ({reason}); see --verbose") from error
        ir.save(model, directory / f"{name}.onnx")
        shapes[name] = _parameters(model)
    write(directory / "parameters.json", json.dumps(shapes, indent=1, sort_keys=True))


def _components(request: Request) -> dict[str, Source]:
    made: dict[str, Source] = system(request.system).components(request.preset)
    return made


def _parameters(model: Any) -> dict[str, list[int]]:
    """The shapes of the weights a traced graph waits for."""
    import onnx_ir as ir

    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: list(t.shape.numpy()) for name, t in tensors if isinstance(t, ir.ExternalTensor)}


def _attach(request: Request, found: Tensors | None, traced: Path, directory: Path) -> None:
    shapes = json.loads((traced / "parameters.json").read_text())
    wanted = {c: {name: tuple(shape) for name, shape in s.items()} for c, s in shapes.items()}
    module = system(request.system)
    folder = next(iter(_components(request).values())).folder
    packed = directory / "weights" / folder
    if found is None:
        named = {module.keys(c, name)[0]: shape for c, s in wanted.items() for name, shape in s.items()}
        random_weights(named, request.seed, packed / f"{folder}.safetensors")
        found = find(packed)
    references = attach(wanted, found, module.keys, module.ignored)
    if request.pack and request.weights:
        key_at = {(r.file, r.offset): key for key, r in found.tensors.items()}
        read_once = {key_at[r.file, r.offset]: r for refs in references.values() for r in refs.values()}
        moved = copy_tensors(found.folder, read_once, packed / f"{folder}.safetensors")
        references = {
            c: {name: moved[key_at[r.file, r.offset]] for name, r in refs.items()} for c, refs in references.items()
        }
        found = find(packed)
    used = {r.file for refs in references.values() for r in refs.values()}
    files = {f: File((found.folder / f).stat().st_size, sha256_of_file(found.folder / f)) for f in sorted(used)}
    path = None if packed.is_dir() else str(found.folder)
    weights = Weights({folder: Folder(path, files)}, dict.fromkeys(references, folder), references)
    write(directory / "weights.json", to_json(weights))


def _optimise(request: Request, traced: Path, attached: Path, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.footprint import footprint
    from tilewright.export.rewrites.cast import cast
    from tilewright.export.rewrites.fold import fold

    weights = from_json(Weights, (attached / "weights.json").read_bytes(), str(attached / "weights.json"))
    memory = {}
    for name, source in _components(request).items():
        model = ir.load(traced / f"{name}.onnx")
        fold(model)
        _refer(model, weights.tensors[name])
        cast(model)
        (directory / name).mkdir(parents=True)
        ir.save(model, directory / name / "model.onnx")
        memory[name] = footprint(model, partial(_sizes, source))
        for target, module in TARGETS.items():
            copy = ir.load(directory / name / "model.onnx")
            importlib.import_module(module).prepare(copy)
            ir.save(copy, directory / name / f"{target}.onnx")
    write(directory / "memory.json", json.dumps(encode(memory), indent=1, sort_keys=True))


def _refer(model: Any, references: dict[str, Reference]) -> None:
    import onnx_ir as ir

    for name, r in references.items():
        if name in model.graph.initializers:  # folding may have found a parameter without effect
            dtype, shape = STORED[r.dtype], ir.Shape(r.shape)
            value = ir.ExternalTensor(r.file, r.offset, r.length, ir.DataType[dtype], shape=shape, name=name)
            model.graph.initializers[name].const_value = value


def _sizes(source: Source, side: int) -> dict[str, int]:
    """The free sizes of a component for a square of that many output pixels."""
    specs = (*source.inputs.values(), *source.outputs.values())
    named = {d for spec in specs for d in spec.shape if isinstance(d, str)}
    sizes = {name: side // source.px[name] if name in source.px else 1 for name in named}
    return sizes | {f"{name}_units": sizes[name] // multiple for name, multiple in source.multiples.items()}


def _assemble(request: Request, attached: Path, optimised: Path, root: Path) -> Manifest:
    """Everything of the bundle but packed weights, reports and the manifest, which is returned."""
    module = system(request.system)
    for name in _components(request):
        shutil.copytree(optimised / name, root / name)
    shutil.copyfile(attached / "weights.json", root / "weights.json")
    write(root / "program.json", to_json(module.program(request.preset)))
    memory = json.loads((optimised / "memory.json").read_text())
    components = {
        name: Component(
            f"{name}/model.onnx",
            source.inputs,
            source.outputs,
            tuple(Engine(target, "float32", f"{name}/{target}.onnx") for target in TARGETS),
            Memory(**memory[name]),
        )
        for name, source in _components(request).items()
    }
    weights = "given" if request.weights else f"random, seed {request.seed}"
    packed = "yes" if request.pack or not request.weights else "no"
    return Manifest(
        SCHEMA_VERSION,
        request.system,
        request.preset,
        "float32",
        module.LICENCE,
        components,
        {},
        {package: _version(package) for package in (*TRACERS, "tilewright")},
        {"weights": weights, "packed": packed},
    )


def _verify(request: Request, attached: Path, optimised: Path, directory: Path) -> None:
    from tilewright.export.verify import require, verify

    trial = directory / "bundle"
    write_manifest(trial, _assemble(request, attached, optimised, trial))
    report = verify(trial, weights_dir=attached / "weights")
    shutil.rmtree(trial)
    write(directory / "accuracy.json", json.dumps(report, indent=2, sort_keys=True) + "\n")
    require(report)


def _seal(request: Request, attached: Path, optimised: Path, verified: Path | None, staging: Path) -> None:
    manifest = _assemble(request, attached, optimised, staging)
    if (attached / "weights").is_dir():
        shutil.copytree(attached / "weights", staging / "weights")
    report = None
    if verified:
        (staging / "reports").mkdir()
        shutil.copyfile(verified / "accuracy.json", staging / "reports" / "accuracy.json")
        report = json.loads((verified / "accuracy.json").read_text())
    write(staging / "README.md", _card(request, manifest, report))
    seal(staging, manifest, request.out)


def _card(request: Request, manifest: Manifest, report: dict[str, Any] | None) -> str:
    measured = "not verified against eager PyTorch (--verify never)"
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


def parameter_count(request: Request) -> int:
    """Parameters of the request's networks, counted without making them."""
    from tilewright.export.trace import network_on_meta

    networks = [network_on_meta(source) for source in _components(request).values()]
    return sum(p.numel() for network in networks for p in network.parameters())


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
