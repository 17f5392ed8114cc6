"""The verbs of `tilewright export`: those that build bundles, look into them, and write them for other tools."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.cli.dry_run import dry_run
from tilewright.cli.eight_bits import add_calibrate, add_eight_bits, add_recipe, eight_bit_inputs, split_precisions
from tilewright.cli.explain import explain
from tilewright.cli.lint import add_lint
from tilewright.cli.plans import add_plan_options, batches, plan_options
from tilewright.cli.space import space
from tilewright.cli.terminal import Progress, answer, expect_argument, verb
from tilewright.runtime.errors import UsageError, amount

if TYPE_CHECKING:
    pass

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs of the group."""
    verb(verbs, "list", "systems and presets that can be built", _list)

    build = verb(verbs, "build", "build a bundle from a system's weights", _build)
    build.add_argument("system", help="a name that 'export list' shows")
    build.add_argument(
        "--preset", help="sizes for random weights (default: full); weights from files bring their own sizes"
    )
    build.add_argument(
        "--weights", type=Path, metavar="DIR", help="folder with the system's files, or ORG/NAME; not copied"
    )
    build.add_argument(
        "--random-weights", type=int, metavar="SEED", help="seeded random ones for all that is not given"
    )
    build.add_argument("-o", "--out", type=Path, metavar="DIR", help="the bundle's directory; --dry-run needs none")
    build.add_argument("--pack", action="store_true", help="copy the weights into the bundle")
    build.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare engines with eager PyTorch (default: where memory allows and weights are real)",
    )
    build.add_argument(
        "--ops",
        choices=("tilewright", "standard"),
        default="tilewright",
        help="keep our ops as nodes with functions, or inline them as standard ONNX",
    )
    _engine_options(build)
    add_plan_options(build, builds=True)
    add_calibrate(build)
    build.add_argument("--allow-nonfinite", action="store_true", help="build from weights that hold NaN or infinity")
    build.add_argument(
        "--dry-run", action="store_true", help="check all files, predict stages, disk, memory and time; build nothing"
    )
    build.add_argument("--gpu", metavar="NAME", help="with --dry-run: predict engines for sm90, which need not be here")
    build.add_argument("--explain", action="store_true", help="say which inputs changed since the last build")

    build.set_defaults(more_arguments=_system_options)

    more = verb(verbs, "compile", "add engines to a bundle", _compile)
    more.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(more)
    _engine_options(more, "openvino", "float32,bfloat16")
    add_plan_options(more)

    stand_in = verb(verbs, "stand-in", "write zeros in the place of a system's published files", _stand_in)
    stand_in.add_argument("system", help="a name that 'export list' shows")
    stand_in.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder")

    inspect = verb(verbs, "inspect", "what a bundle holds and where every byte lives", _inspect)
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(inspect)
    inspect.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")

    sizes = verb(verbs, "space", "the bytes of each component and file, and what a copy would take", space)
    sizes.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(sizes)
    sizes.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")

    why = verb(verbs, "explain", "what decided each stage of a build, what runs again, and which engines", explain)
    why.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(why)

    onnx = verb(verbs, "onnx", "write the graphs and copies of the weights into a folder, for other ONNX tools", _onnx)
    onnx.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(onnx)
    onnx.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    onnx.add_argument("--component", metavar="NAME", help="only this component (default: all)")
    onnx.add_argument(
        "--fold", action="store_true", help="standard operators, and weights as initializers that quantizers find"
    )
    onnx.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")

    add_lint(verbs)

    triton = verb(verbs, "triton-repo", "write a model repository for NVIDIA Triton Inference Server", _triton_repo)
    triton.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(triton)
    triton.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    triton.add_argument("--pack", action="store_true", help="copy the bundle and its weights into it")
    triton.add_argument(
        "--devices", default="cpu:0", metavar="NAMES", help="run tiles at once on cpu:0,cpu:1,... (default: cpu:0)"
    )
    triton.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")

    verify = verb(verbs, "verify", "compare a bundle's engines with eager PyTorch; exit 7 on a miss", _verify)
    verify.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory")
    expect_argument(verify)
    verify.add_argument("--size", type=int, metavar="PX", help="side of the picture (default: small, in small tiles)")
    verify.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")

    clean = verb(verbs, "clean", "remove cached build stages; bundles stay", _clean)
    clean.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="keep what is younger")
    clean.add_argument(
        "--converted", action="store_true", help="also weights converted from .pt and .bin, which bundles may point at"
    )


def _engine_options(parser: argparse.ArgumentParser, targets: str = "", precisions: str = "") -> None:
    """Add the options that say which engines to make. Without defaults, `usual_engines` decides."""
    targets_text = "backends to make engines for, of ort, openvino, cuda, tensorrt and aoti"
    for name, default, text, here in (
        ("target", targets, targets_text, "ort, and openvino if installed"),
        (
            "precision",
            precisions,
            "precisions of the engines, of float32, bfloat16, float16, fp8 and int8",
            "those that run here",
        ),
    ):
        value = _names(default) if default else ()
        help_text = f"{text} (default: {default or here})"
        parser.add_argument(f"--{name}", type=_names, default=value, metavar="NAMES", help=help_text)
    add_recipe(parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _system_options(build: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Add the options that only some systems have."""
    from tilewright.export.systems import names, system

    takers: dict[str, dict[str, list[str]]] = {}  # option -> help -> systems
    options = {}
    for s in names():
        for name, option in system(s).options.items():
            options[name] = option
            takers.setdefault(name, {}).setdefault(option.help, []).append(s)
    group = build.add_argument_group("options of some systems")
    for name, option in options.items():
        help_text = "; ".join(f"{text} ({', '.join(systems)})" for text, systems in takers[name].items())
        flag = f"--{name.replace('_', '-')}"
        if option.flag:
            group.add_argument(flag, action="store_const", const=True, help=help_text)
        else:
            choices = option.choices or None
            group.add_argument(
                flag, type=option.kind, choices=choices, metavar=None if choices else "X", help=help_text
            )


def _option_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the system's options that the user set."""
    from tilewright.export.systems import names, system

    options = dict.fromkeys(name for s in names() for name in system(s).options)
    values = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    paths = {origin.argument for origin in system(arguments.system).origins.values()}
    return {name: _local(value) if name in paths else value for name, value in values.items()}


def _local(value: str) -> str:
    """The local path for a repo id, with the strength behind it if there is one."""
    from tilewright.export.weights.hub import local
    from tilewright.export.weights.lora import path_and_strength

    path = str(path_and_strength(value)[0])
    return str(local(path)) + value.removeprefix(path)


def _stand_in(arguments: argparse.Namespace) -> None:
    from tilewright.export.systems import system
    from tilewright.export.weights.stand_in import stand_in

    with Progress(arguments) as progress:
        report = stand_in(system(arguments.system), arguments.out, progress.tiles)
    answer(
        arguments,
        report,
        f"{report['folder']}: {len(report['files'])} files, {report['tensors']} tensors of zeros,"
        f" {amount(report['apparent_bytes'])} that take {amount(report['disk_bytes'])}",
    )


def _list(arguments: argparse.Namespace) -> None:
    from tilewright.export.systems import names, system

    rows = [
        {"system": s.name, "presets": list(s.presets), "title": s.title, "licence": s.licence}
        for s in map(system, names())
    ]
    text = "\n".join(f"{r['system']:<12} {', '.join(r['presets']):<20} {r['title']}" for r in rows)
    answer(arguments, rows, text)


def _build(arguments: argparse.Namespace) -> None:
    from tilewright.export.build.compile import compile_engines, split
    from tilewright.export.build.history import remember_added, usual_seconds
    from tilewright.export.build.preflight import check_request
    from tilewright.export.build.request import Request
    from tilewright.export.build.run import build, changes
    from tilewright.export.build.stage_list import all_remembered, list_stages, quick_digest
    from tilewright.export.targets import check_makeable, target_module, usual_engines
    from tilewright.export.weights.hub import local
    from tilewright.runtime.bundle.digests import sha256_of_file
    from tilewright.runtime.bundle.read import read_bundle
    from tilewright.runtime.engines.machine import this_machine

    floats, eight_bits = split_precisions(arguments)
    precisions = floats or (("float32",) if eight_bits else ())
    asked = usual_engines(this_machine(kinds=("cpu",)), arguments.target, precisions)
    graphs, compiled = split(*asked)
    if eight_bits and not floats:  # the bundle is made in float32, and needs no compiled engine in it
        compiled = (), ()
    engines = {target: [p for p in target_module(target).PRECISIONS if p in compiled[1]] for target in compiled[0]}
    if eight_bits and "tensorrt" in asked[0]:
        engines["tensorrt"] = [*engines.get("tensorrt", ()), *eight_bits]
    if arguments.gpu and not arguments.dry_run:
        raise UsageError(f"--gpu {arguments.gpu} predicts only; add --dry-run, or compile on the machine with the GPU")
    if not arguments.gpu:
        check_makeable(asked[0])
    if not arguments.out and not arguments.dry_run:
        raise UsageError("-o/--out is not given; it names the bundle's directory")
    request = Request(
        arguments.system,
        arguments.preset,
        arguments.out or Path(arguments.system),
        arguments.weights and local(str(arguments.weights)),
        arguments.random_weights,
        arguments.pack,
        arguments.verify,
        arguments.ops,
        _option_values(arguments),
        arguments.allow_nonfinite,
        *graphs,
        arguments.tile,
        batches(arguments),
    )
    start, usual, explained = time.perf_counter(), cache(partial(usual_seconds, request)), dict[str, Any]()
    with Progress(arguments) as progress:

        def digest(path: Path) -> str:
            return sha256_of_file(path, on_read=partial(progress.bytes, f"reading {path.name}"))

        def tell(stage: str, event: str, seconds: float) -> None:
            progress.stage(stage, event, seconds, usual().get(stage))

        if arguments.explain:
            if not all_remembered(request):
                check_request(request)
            explained = {
                "changed": changes(request, list_stages(request, quick_digest if arguments.dry_run else digest))
            }
        if explained and not arguments.json:
            lines = [f"{stage} runs, changed: {', '.join(reasons)}" for stage, reasons in explained["changed"].items()]
            progress.say("\n".join(lines or ["nothing changed since the last build"]))
        added = eight_bit_inputs(arguments, eight_bits[0], asked[0]) if eight_bits else None
        cost = {} if arguments.dry_run else build(request, tell, digest, added)
        if compiled[0] and not arguments.dry_run:
            progress.doing("compiling engines")
            compile_engines(arguments.out, *compiled, options=plan_options(arguments))
    if arguments.dry_run:
        dry_run(arguments, request, explained, engines)
        return
    if added and cost:
        add_eight_bits(arguments, arguments.out, eight_bits[0], asked[0], plan_options(arguments))
        remember_added(arguments.out, added, read_bundle(arguments.out).digest)
        return
    seconds = time.perf_counter() - start
    done = f"{arguments.out}: built in {seconds:.1f} s" if cost else f"{arguments.out}: up to date, nothing to do"
    answer(arguments, {"bundle": str(arguments.out), "built": bool(cost), "stages": cost} | explained, done)


def _compile(arguments: argparse.Namespace) -> None:
    from tilewright.export.build.compile import compile_engines

    floats, eight_bits = split_precisions(arguments)
    if eight_bits:
        if floats:
            raise UsageError("--recipe is for --precision int8 or fp8 alone; add engines in float by another command")
        add_eight_bits(arguments, arguments.bundle, eight_bits[0], arguments.target, plan_options(arguments))
        return
    done = compile_engines(
        arguments.bundle,
        arguments.target,
        arguments.precision,
        expect=arguments.expect,
        options=plan_options(arguments),
    )
    answer(
        arguments,
        asdict(done),
        f"{arguments.bundle}: has {', '.join(done.engines)}, digest {done.digest[:12]}\n"
        f"next: tilewright export verify {shlex.quote(str(arguments.bundle))}, which measures all engines",
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from tilewright.export.inspect import inspect, summary

    report = inspect(arguments.bundle, arguments.weights_dir, arguments.expect)
    answer(arguments, report, summary(report))


def _onnx(arguments: argparse.Namespace) -> None:
    from tilewright.export.onnx_folder import onnx_folder

    with Progress(arguments) as progress:
        written = onnx_folder(
            arguments.bundle,
            arguments.out,
            component=arguments.component,
            fold=arguments.fold,
            weights_dir=arguments.weights_dir,
            expect=arguments.expect,
            on_bytes=partial(progress.bytes, "weights"),
        )
    total = amount(sum(written["files"].values()))
    answer(arguments, written, f"{written['folder']}: {', '.join(written['graphs'])}; {total} with weights")


def _triton_repo(arguments: argparse.Namespace) -> None:
    from tilewright.export.triton_repo import triton_repo

    with Progress(arguments) as progress:
        written = triton_repo(
            arguments.bundle,
            arguments.out,
            pack=arguments.pack,
            devices=arguments.devices.split(","),
            weights_dir=arguments.weights_dir,
            expect=arguments.expect,
            on_bytes=partial(progress.bytes, "copying"),
        )
    copied = f"{amount(written['copied_bytes'])} copied" if arguments.pack else f"refers to {arguments.bundle}"
    answer(
        arguments,
        written,
        f"{written['folder']}: model {written['model']}; inputs {', '.join(written['inputs'])};"
        f" outputs {', '.join(written['outputs'])}; {copied}",
    )


def _verify(arguments: argparse.Namespace) -> None:
    from tilewright.runtime.bundle.read import require_bundle

    require_bundle(arguments.bundle)  # before PyTorch is loaded

    from tilewright.export.verify.engines import PARTS, verify
    from tilewright.export.verify.gate import measurement, require
    from tilewright.runtime.bundle.digests import writing
    from tilewright.runtime.bundle.measured import remember
    from tilewright.runtime.errors import AccuracyError

    with Progress(arguments, PARTS) as progress:
        progress.doing("reading the files")
        report = verify(
            arguments.bundle,
            weights_dir=arguments.weights_dir,
            size_px=arguments.size,
            expect=arguments.expect,
            on_progress=progress.tiles,
        )
    path = arguments.bundle / "reports" / "accuracy.json"
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    lines = [f"against {report['reference']}, {report['image']}"]
    for engine, judged in report["engines"].items():
        lines.append(f"{engine}, {judged['version']}:")
        for name, component in judged["components"].items():
            for output, d in component["outputs"].items():
                lines.append(f"  {name}.{output}: relative L2 {d['relative_l2']:.1e}, max {d['max_abs']:.1e}")
            if choices := component.get("choices"):
                counts = ", ".join(f"{count} {what}" for what, count in choices.items())
                lines.append(f"  {name}: {counts} choices")
        lines.append(f"  picture: PSNR {judged['restore']['psnr_db']:.1f} dB")
        if judged["fault"]:
            lines.append(f"  misses its gate: {judged['fault']}")
    lines += [f"{engine} was not judged: it {reason}" for engine, reason in report["skipped"].items()]
    lines.append("seams: " + ", ".join(f"{picture} {excess:+.0%}" for picture, excess in report["seams"].items()))
    fault = None
    try:
        require(report, root=arguments.bundle)
    except AccuracyError as error:
        fault = error
    remember(arguments.bundle, measurement(report))
    answer(arguments, report, "\n".join([*lines, f"written to {path}"]), fault=fault)


def _clean(arguments: argparse.Namespace) -> None:
    from tilewright.export.build.clean import clean

    cleaned = clean(arguments.older_than, converted=arguments.converted)
    lines = [f"freed {amount(cleaned.freed_bytes)}"]
    if cleaned.converted_bytes:
        lines.append(f"{amount(cleaned.converted_bytes)} of converted weights stay; --converted removes them too")
    if cleaned.bundles:
        state = "no longer find their weights; build them again" if arguments.converted else "read converted weights"
        lines.append(f"{', '.join(cleaned.bundles)} {state}")
    answer(arguments, asdict(cleaned), "\n".join(lines))
