"""The card of a bundle: its README.md, with front matter for model hubs."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from tilewright.export.build.request import Request
from tilewright.runtime.bundle.arguments import Argument, arguments_of, flag
from tilewright.runtime.bundle.manifest import Manifest

__all__ = ["card"]

LICENCES = ("Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-NC-4.0")  # names that hubs know
TAGS = ("image-restoration", "super-resolution", "onnx")
WORDS = "a stone bridge"


def card(request: Request, manifest: Manifest, report: Mapping[str, Any] | None) -> str:
    """The text of the card: front matter, title, commands that run, arguments, measurements."""
    name, arguments = request.out.name, arguments_of(request.program)
    needed = {n: _example(n, argument) for n, argument in arguments.items() if argument.needed}
    words = ["runtime", "restore", "in.png", "out.png", "--bundle", name]
    words += [word for n, value in needed.items() for word in (flag(n), str(value))]
    keywords = "".join(f", {n}={json.dumps(value)}" for n, value in needed.items())
    files = [str(value) for n, value in needed.items() if arguments[n].kind == "tensors"]
    return "\n".join(
        [
            *_front_matter(request, manifest),
            f"# {request.name}, {f'preset {request.preset}' if request.preset else 'sizes from its files'}",
            "",
            f"{request.system.title}.",
            "",
            f"- weights: {manifest.options['weights']}; licence: {manifest.licence}",
            f"- engines: {', '.join(sorted({e.name for c in manifest.components.values() for e in c.engines}))}",
            f"- made with {', '.join(f'{k} {v}' for k, v in sorted(manifest.made_with.items()))}",
            "",
            "## Restore a picture",
            "",
            f"`{name}` is the folder of this card, by the name it was built under; `{'`, `'.join(['in.png', *files])}`"
            f" {'lie' if files else 'lies'} beside it.",
            "",
            "```sh",
            f"tilewright {shlex.join(words)}",
            "```",
            "",
            "```python",
            "from tilewright.runtime import load, write_image",
            "",
            f"with load({json.dumps(name)}) as restorer:",
            f'    image = restorer("in.png"{keywords})',
            'write_image("out.png", image)',
            "```",
            "",
            *_arguments(name, arguments),
            "## Measured",
            "",
            *_measured(report),
            "",
        ]
    )


def _front_matter(request: Request, manifest: Manifest) -> list[str]:
    """The front matter in YAML, where JSON strings are strings too."""
    licence = manifest.licence.partition(":")[0]
    lines = [f"license: {licence.lower()}"] if licence in LICENCES else ["license: other"]
    if licence not in LICENCES:
        lines.append(f"license_name: {json.dumps(manifest.licence, ensure_ascii=False)}")
    real = manifest.options["weights"] == "given" and manifest.licence == request.system.licence
    if real and request.system.base_models:
        lines += ["base_model:", *(f"- {model}" for model in request.system.base_models)]
    lines += ["library_name: tilewright", "pipeline_tag: image-to-image", "tags:"]
    return ["---", *lines, *(f"- {tag}" for tag in (*TAGS, request.name)), "---", ""]


def _example(name: str, argument: Argument) -> str | int | float:
    """An allowed value of an argument."""
    if argument.kind in ("words", "tensors"):
        return WORDS if argument.kind == "words" else f"{name}.safetensors"
    if argument.choices:
        return argument.choices[0]
    return next((bound for bound in (argument.least, argument.most) if bound is not None), 1)


def _arguments(name: str, arguments: Mapping[str, Argument]) -> list[str]:
    more = f"`tilewright runtime restore --bundle {shlex.quote(name)} --help` lists all options."
    if not arguments:
        return ["## Arguments", "", f"None of its own. {more}", ""]
    rows = [
        f"| `{flag(n)}` | `{n}` | {a.takes} | {a.otherwise.removeprefix('default: ')} | {a.help.replace('|', '/')} |"
        for n, a in arguments.items()
    ]
    head = ["| option | keyword | takes | default | what it does |", "|---|---|---|---|---|"]
    return ["## Arguments", "", *head, *rows, "", more, ""]


def _measured(report: Mapping[str, Any] | None) -> list[str]:
    """The error of the engine against eager PyTorch, for the picture and for the worst output of a component."""
    if report is None:
        return ["Not verified against eager PyTorch: `tilewright export verify` does that."]
    rows, times = [], []
    for engine, judged in report["engines"].items():
        components = judged["components"].items()
        outputs = {f"{c}.{o}": d for c, component in components for o, d in component["outputs"].items()}
        worst = max(outputs, key=lambda name: float(outputs[name]["relative_l2"]))
        rows += [
            f"| {engine}: {subject} | {error['psnr_db']:.1f} dB | {error['relative_l2']:.1e} |"
            for subject, error in (
                ("the restored picture", judged["restore"]),
                (f"the worst output of a component, `{worst}`", outputs[worst]),
            )
        ]
        times += [f"| {name} | {engine} | {c['seconds_per_megapixel']:.3g} |" for name, c in components]
    versions = sorted({judged["version"] for judged in report["engines"].values()})
    return [
        f"{', '.join(versions)}, against {report['reference']}, on the same inputs: {report['image']},"
        f" {report['steps']} step{'s' if report['steps'] > 1 else ''}.",
        "",
        "| of | PSNR | relative L2 |",
        "|---|---|---|",
        *rows,
        *(f"\n{engine} was not judged: it {reason}." for engine, reason in report["skipped"].items()),
        "",
        f"On this picture, with {report['threads']} thread(s) of {report['processor']}:",
        "",
        "| component | engine | seconds a megapixel |",
        "|---|---|---|",
        *sorted(times),
    ]
