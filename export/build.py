"""The stages of a build, each keyed by the digest of everything it depends on.

A stage fills a directory that appears in the cache, complete, under its key; one that is there is never made again. So
a repeated build does nothing, a killed one loses only the stage it was in, and a changed input runs what it touches.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.export.systems import Source, system
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
    read,
    seal,
    write_manifest,
)
from tilewright.runtime.digests import cache_dir, sha256_of_bytes, sha256_of_file, writing
from tilewright.runtime.errors import BuildError, BundleError, ResourceError, TilewrightError, UsageError
from tilewright.runtime.memory import available_bytes, peak_bytes
from tilewright.runtime.strict import encode, from_json, to_json

__all__ = ["VERIFY_MODES", "Request", "Stage", "build", "changes", "clean", "forecast", "stages", "up_to_date"]

HOUSE = Path(__file__).parent.parent  # export/, kernels/ and runtime/ lie here, installed or not
TRACERS = ("torch", "transformers", "onnxscript", "onnx-ir", "onnx")
VERIFY_MODES = ("always", "never")
GRAPH_BYTES = 5_000_000  # all graphs of a system, at most
STORED = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32"}
TRACE_BYTES = 1_200_000_000  # what tracing holds at its peak, measured on the full presets


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
    whole = _code("export/build.py", module, "runtime/program.py", "runtime/bundle.py", "runtime/strict.py")
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


def build(
    request: Request, on_stage: Callable[[str, str, float], None] = lambda name, event, seconds: None
) -> dict[str, dict[str, float]]:
    """Run what is not done yet and put the bundle in place; seconds and peak bytes of each stage that ran."""
    plan = stages(request)
    if up_to_date(request, plan):
        return {}
    forecast(request, plan, check=True)
    cost: dict[str, dict[str, float]] = {}
    for stage in plan:
        if stage.name != "seal" and stage.directory.is_dir():
            os.utime(stage.directory)  # so that `clean --older-than` spares what is in use
            on_stage(stage.name, "cached", 0.0)
            continue
        on_stage(stage.name, "started", 0.0)
        start = time.perf_counter()
        _reset_peak()
        if stage.name == "seal":
            with _staging(request.out) as staging:
                stage.work(staging)
        else:
            with _staging(stage.directory) as staging:
                stage.work(staging)
                staging.rename(stage.directory)
        cost[stage.name] = {"seconds": time.perf_counter() - start, "peak_bytes": float(_peak())}
        on_stage(stage.name, "done", cost[stage.name]["seconds"])
    _write(request.out / "reports" / "build.json", json.dumps(cost, indent=2, sort_keys=True) + "\n")
    _write(_note(request.out), json.dumps({s.name: s.inputs for s in plan}, sort_keys=True))
    return cost


def up_to_date(request: Request, plan: list[Stage]) -> bool:
    """Whether the bundle in place is what this plan would make, and whole."""
    try:
        made = json.loads(_note(request.out).read_text())
        return bool(made == {s.name: s.inputs for s in plan}) and bool(read(request.out))
    except (OSError, ValueError, BundleError):
        return False


def changes(request: Request, plan: list[Stage]) -> dict[str, list[str]]:
    """For each stage that would run, the inputs that differ from the last build of this output."""
    try:
        made = json.loads(_note(request.out).read_text())
    except (OSError, ValueError):
        made = {}
    reasons: dict[str, list[str]] = {}
    for stage in plan:
        before = made.get(stage.name)
        if before is None:
            reasons[stage.name] = ["no earlier build of this output"]
        elif before != stage.inputs:
            reasons[stage.name] = sorted(
                k for k in before.keys() | stage.inputs.keys() if before.get(k) != stage.inputs.get(k)
            )
        elif not (request.out / "bundle.json").is_file():
            reasons[stage.name] = ["the bundle is not in place"]
    return reasons


def forecast(request: Request, plan: list[Stage], check: bool = False) -> dict[str, Any]:
    """Which stages would run, and the disk and memory they would take; optionally refuse what cannot fit."""
    run = [s.name for s in plan if s.name == "seal" or not s.directory.is_dir()]
    run = [] if up_to_date(request, plan) else run
    if request.weights:
        weights = sum(r.length for r in find(request.weights).tensors.values())
    else:
        weights = 4 * _parameter_count(request) if "attach" in run else 0
    copied = weights if request.pack or not request.weights else 0
    disk = (GRAPH_BYTES + copied) * len({"attach", "optimise", "seal"} & set(run))
    peaks = {"trace": TRACE_BYTES, "verify": 8 * weights + TRACE_BYTES}
    memory = max(peaks.get(stage, 0) for stage in [*run, ""])
    if check:
        free = shutil.disk_usage(_existing(request.out)).free
        if disk > free:
            raise ResourceError(f"{request.out}: needs {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room")
        there = available_bytes()
        if there is not None and memory > there:
            raise ResourceError(
                f"stages {', '.join(run)} need about {memory / 2**30:.1f} GiB of memory,"
                f" {there / 2**30:.1f} GiB are free; use --verify never, or a larger machine"
            )
    return {"stages": run, "disk_bytes": disk, "peak_memory_bytes": memory}


def clean(older_than_days: float = 0.0) -> int:
    """Remove cached stages, all or those not used for some days; how many bytes that freed."""
    freed = 0
    limit = time.time() - older_than_days * 86_400
    for folder in sorted((cache_dir() / "build").glob("*/*")):
        if folder.stat().st_mtime <= limit:
            freed += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            shutil.rmtree(folder)
    return freed


def _trace(request: Request, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.trace import trace

    shapes = {}
    for name, source in system(request.system).components(request.preset).items():
        try:
            model = trace(source)
        except TilewrightError:
            raise
        except Exception as error:  # anything torch.export or the exporter may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BuildError(f"trace of {request.system}.{name} failed ({reason}); see --verbose") from error
        ir.save(model, directory / f"{name}.onnx")
        shapes[name] = _parameters(model)
    _write(directory / "parameters.json", json.dumps(shapes, indent=1, sort_keys=True))


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
    _write(directory / "weights.json", to_json(weights))


def _optimise(request: Request, traced: Path, attached: Path, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.footprint import footprint
    from tilewright.export.rewrites.cast import cast
    from tilewright.export.rewrites.fold import fold
    from tilewright.export.targets.ort import prepare

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
        prepare(model)
        ir.save(model, directory / name / "ort.onnx")
    _write(directory / "memory.json", json.dumps(encode(memory), indent=1, sort_keys=True))


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
    """Everything of the bundle but packed weights and reports."""
    module = system(request.system)
    for name in _components(request):
        shutil.copytree(optimised / name, root / name)
    shutil.copyfile(attached / "weights.json", root / "weights.json")
    _write(root / "program.json", to_json(module.program(request.preset)))
    memory = json.loads((optimised / "memory.json").read_text())
    components = {
        name: Component(
            f"{name}/model.onnx",
            source.inputs,
            source.outputs,
            (Engine("ort", "float32", f"{name}/ort.onnx"),),
            Memory(**memory[name]),
        )
        for name, source in _components(request).items()
    }
    weights = "given" if request.weights else f"random, seed {request.seed}"
    packed = "yes" if request.pack or not request.weights else "no"
    manifest = Manifest(
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
    write_manifest(root, manifest)
    return manifest


def _verify(request: Request, attached: Path, optimised: Path, directory: Path) -> None:
    from tilewright.export.verify import require, verify

    _assemble(request, attached, optimised, directory / "bundle")
    report = verify(directory / "bundle", weights_dir=attached / "weights")
    shutil.rmtree(directory / "bundle")
    _write(directory / "accuracy.json", json.dumps(report, indent=2, sort_keys=True) + "\n")
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
    _write(staging / "README.md", _card(request, manifest, report))
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


def _parameter_count(request: Request) -> int:
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


def _note(out: Path) -> Path:
    """Where the inputs of the last build of an output are remembered."""
    return cache_dir() / "built" / f"{sha256_of_bytes(str(out.resolve()).encode())[:32]}.json"


def _write(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A sibling directory to fill; what is left of it, and of earlier killed builds, is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*.part"):
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return peak_bytes()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
