"""The command `tilewright`: groups of verbs, one verb one function call."""

import argparse
import errno
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tilewright.export import kernels_cli
from tilewright.runtime import cli as runtime_cli
from tilewright.runtime.errors import TilewrightError, UsageError
from tilewright.runtime.strict import one_line

__all__ = ["main", "parser"]

EXIT_CODES = """exit codes: 0 ok, 1 internal error, 2 usage, 3 bundle invalid, 4 missing dependency or environment
mismatch, 5 not enough memory or disk, 6 build failed, 7 accuracy gate, 8 bad input image or weights, 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything here does; a bundle's own arguments are no abbreviations of ours."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Every group and verb."""
    root = _Parser(prog="tilewright", description=__doc__, epilog=EXIT_CODES)
    groups = root.add_subparsers(metavar="GROUP", required=True)
    export = groups.add_parser("export", help="build, inspect and verify bundles", epilog=EXIT_CODES)
    _export_verbs(export.add_subparsers(metavar="VERB", required=True))
    runtime = groups.add_parser("runtime", help="restore images with a bundle", epilog=EXIT_CODES)
    runtime_cli.add_verbs(runtime.add_subparsers(metavar="VERB", required=True))
    kernels = groups.add_parser("kernels", help="list, check and time the ops", epilog=EXIT_CODES)
    kernels_cli.add_verbs(kernels.add_subparsers(metavar="VERB", required=True))
    return root


def _export_verbs(verbs: Any) -> None:
    runtime_cli.verb(verbs, "list", "systems and presets that can be built", _list)

    build = runtime_cli.verb(verbs, "build", "build a bundle from a system's weights", _build)
    build.add_argument("system", help="a name that 'export list' shows")
    build.add_argument("--preset", default="full", help="sizes of the networks (default: full)")
    build.add_argument("--weights", type=Path, metavar="DIR", help="folder with the system's .safetensors; not copied")
    build.add_argument(
        "--random-weights", type=int, metavar="SEED", help="seeded random ones for all that is not given"
    )
    build.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="the bundle's directory")
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
    build.add_argument("--dry-run", action="store_true", help="predict stages, disk and memory; build nothing")
    build.add_argument("--explain", action="store_true", help="say which inputs changed since the last build")

    _system_options(build)

    stand_in = runtime_cli.verb(verbs, "stand-in", "write zeros in the place of a system's published files", _stand_in)
    stand_in.add_argument("system", help="a name that 'export list' shows")
    stand_in.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder")

    inspect = runtime_cli.verb(verbs, "inspect", "what a bundle holds and where every byte lives", _inspect)
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--weights-dir", type=Path, help="where the weights are, if they moved")

    verify = runtime_cli.verb(
        verbs, "verify", "compare a bundle's engines with eager PyTorch; exit 7 on a miss", _verify
    )
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--size", type=int, metavar="PX", help="side of the picture (default: small, in small tiles)")
    verify.add_argument("--weights-dir", type=Path, help="where the weights are, if they moved")

    clean = runtime_cli.verb(verbs, "clean", "remove cached build stages; bundles stay", _clean)
    clean.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="keep what is younger")


def _system_options(build: argparse.ArgumentParser) -> None:
    from tilewright.export.systems import SYSTEMS, system

    takers: dict[str, dict[str, list[str]]] = {}  # option -> what it does -> systems
    options = {}
    for s in SYSTEMS:
        for name, option in system(s).OPTIONS.items():
            options[name] = option
            takers.setdefault(name, {}).setdefault(option.help, []).append(s)
    group = build.add_argument_group("options of some systems")
    for name, option in options.items():
        help_text = "; ".join(f"{text} ({', '.join(of)})" for text, of in takers[name].items())
        flag = f"--{name.replace('_', '-')}"
        if option.flag:
            group.add_argument(flag, action="store_const", const=True, help=help_text)
        else:
            choices = option.choices or None
            group.add_argument(
                flag, type=option.kind, choices=choices, metavar=None if choices else "X", help=help_text
            )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The system's own options that were given."""
    from tilewright.export.systems import SYSTEMS, system

    names = dict.fromkeys(name for s in SYSTEMS for name in system(s).OPTIONS)
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _stand_in(arguments: argparse.Namespace) -> None:
    from tilewright.export.weights.stand_in import stand_in

    made = stand_in(arguments.system, arguments.out)
    runtime_cli.answer(
        arguments,
        made,
        f"{made['folder']}: {len(made['files'])} files, {made['tensors']} tensors of zeros,"
        f" {made['apparent_bytes'] / 1e9:.1f} GB that take {made['disk_bytes'] / 1e6:.1f} MB",
    )


def _list(arguments: argparse.Namespace) -> None:
    from tilewright.export.systems import SYSTEMS, system

    files = {name: system(name) for name in SYSTEMS}
    rows = [
        {"system": name, "presets": list(file.PRESETS), "title": file.TITLE, "licence": file.LICENCE}
        for name, file in files.items()
    ]
    text = "\n".join(f"{r['system']:<12} {', '.join(r['presets']):<20} {r['title']}" for r in rows)
    runtime_cli.answer(arguments, rows, text)


def _build(arguments: argparse.Namespace) -> None:
    from tilewright.export.build import run as b
    from tilewright.export.build.request import Request
    from tilewright.export.build.stages import stages

    request = Request(
        arguments.system,
        arguments.preset,
        arguments.out,
        arguments.weights,
        arguments.random_weights,
        arguments.pack,
        arguments.verify,
        arguments.ops,
        _given(arguments),
    )
    plan = stages(request)
    if arguments.explain:
        changed = b.changes(request, plan)
        lines = [f"{stage} runs, changed: {', '.join(reasons)}" for stage, reasons in changed.items()]
        print("\n".join(lines or ["nothing changed since the last build"]), file=sys.stderr)
    if arguments.dry_run:
        predicted = b.forecast(request, plan)
        runtime_cli.answer(
            arguments,
            predicted,
            f"stages: {', '.join(predicted['stages']) or 'none, the bundle is up to date'}\n"
            f"disk: {predicted['disk_bytes'] / 1e6:.1f} MB\n"
            f"peak memory: {predicted['peak_memory_bytes'] / 1e9:.1f} GB",
        )
        return
    start = time.perf_counter()
    with runtime_cli.Progress() as progress:
        cost = b.build(request, lambda name, event, seconds: progress.stage(name, event, seconds))
    seconds = time.perf_counter() - start
    done = f"{arguments.out}: built in {seconds:.1f} s" if cost else f"{arguments.out}: up to date, nothing to do"
    runtime_cli.answer(arguments, {"bundle": str(arguments.out), "built": bool(cost), "stages": cost}, done)


def _inspect(arguments: argparse.Namespace) -> None:
    from tilewright.export.inspect import inspect, text

    found = inspect(arguments.bundle, arguments.weights_dir)
    runtime_cli.answer(arguments, found, text(found))


def _verify(arguments: argparse.Namespace) -> None:
    from tilewright.export.verify.engines import require, verify
    from tilewright.runtime.digests import writing

    report = verify(arguments.bundle, weights_dir=arguments.weights_dir, size_px=arguments.size)
    path = arguments.bundle / "reports" / "accuracy.json"
    with writing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    lines = [f"{report['engine']} against {report['reference']}, {report['image']}"]
    for name, component in report["components"].items():
        for output, d in component["outputs"].items():
            lines.append(f"{name}.{output}: relative L2 {d['relative_l2']:.1e}, max {d['max_abs']:.1e}")
        if choices := component.get("choices"):
            lines.append(f"{name}: " + ", ".join(f"{count} {what}" for what, count in choices.items()) + " choices")
    lines.append(f"picture: PSNR {report['restore']['psnr_db']:.1f} dB")
    lines.append("seams: " + ", ".join(f"{picture} {excess:+.0%}" for picture, excess in report["seams"].items()))
    runtime_cli.answer(arguments, report, "\n".join([*lines, f"written to {path}"]))
    require(report)


def _clean(arguments: argparse.Namespace) -> None:
    from tilewright.export.build.run import clean

    freed = clean(arguments.older_than)
    runtime_cli.answer(arguments, {"freed_bytes": freed}, f"freed {freed / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    verbose = "--verbose" in words
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("tilewright").setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        words, own = runtime_cli.split_inputs(words)
        arguments, extra = parser().parse_known_args(words)
        if extra:
            raise UsageError(f"unknown argument {extra[0]!r}; see --help")
        arguments.extra = own
        arguments.run(arguments)
        return 0
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if verbose:
            traceback.print_exc()
        said, code = _ending(error)
        print(f"tilewright: {said}", file=sys.stderr)
        return code


def _ending(error: BaseException) -> tuple[str, int]:
    """What to say of an error, in one line, and the exit code."""
    if isinstance(error, TilewrightError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; finished stages are kept", 130
    if isinstance(error, ModuleNotFoundError):
        needed = "cpu" if error.name == "onnxruntime" else "export"
        return f"{error.name} is not installed; pip install 'tilewright[{needed}]'", 4
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --tile or --memory low", 5
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{error.filename or 'a file'}: {error.strerror}; check space and permissions", 5 if full else 4
    said = one_line(f"internal error, {type(error).__name__}: {error}")
    return f"{said}; repeat with --verbose and report it", 1


if __name__ == "__main__":
    sys.exit(main())
