"""What pages say is what the code and the measurements say."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import api_page
import pytest

from support.pages import ROOT, blocks, page, verbs_of
from tilewright import runtime
from tilewright.runtime import errors
from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.manifest import Manifest
from tilewright.runtime.bundle.program import ANY, Call, Grid, Pass, Program, Signature, Steps, TensorSpec, Tiles
from tilewright.runtime.bundle.strict import from_json

SYSTEMS = ("hitoksr", "in-token", "vicr", "instantir", "toksr")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, plain."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("*", "").replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def result(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["result"]


def quality(found: dict[str, float]) -> list[str]:
    return [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['gmsd']:.3f}"]


QUALITY = {
    "docs/measured.md": ("{of}: {name}", {"bicubic": "bicubic", "hitoksr": "hitoksr", "in-token": "in-token, 8 steps"}),
    "demo/hitoksr/README.md": ("{name}, {of}", {"bicubic": "bicubic", "hitoksr": "hitoksr"}),
    "demo/in-token/README.md": (
        "{name}, {of}",
        {"bicubic": "bicubic", "in-token": "in-token, 8 steps", "in-token, 28 steps": "in-token, 28 steps"},
    ),
}


@pytest.mark.parametrize("file", QUALITY)
def test_quality_is_as_measured(file: str) -> None:
    pattern, names = QUALITY[file]
    said, averages = rows((ROOT / file).read_text()), result("demo")["averages"]
    for of, images in (("all 16", "all"), ("the 4 photographs", "photographs")):
        for measured, name in names.items():
            assert [pattern.format(of=of, name=name), *quality(averages[images][measured])] in said


def test_engines_in_8_bits_are_as_measured() -> None:
    said = {tuple(row[1:]) for row in rows((ROOT / "docs/measured.md").read_text()) if len(row) == 6}
    for name, engine in result("eight_bits")["engines"].items():
        changed, lost = f"{engine['changed_choices']:.1%}", f"{round(engine['lost_db'], 3) + 0.0:.3f} dB"
        row = f"{engine['mean_db']:.1f} dB", f"{engine['worst_db']:.1f} dB", f"{engine['ssim']:.4f}", changed, lost
        assert row in said or name == "openvino-float32"  # the reference
    said = {tuple(row[1:]) for row in rows(page("measured")) if len(row) == 5}
    for name, engine in result("eight_bits_in_token")["engines"].items():
        row = f"{engine['mean_db']:.1f} dB", f"{engine['worst_db']:.1f} dB", f"{engine['ssim']:.4f}"
        assert (*row, f"{engine['lost_db']:.3f} dB") in said or name.endswith("-float32")


@pytest.mark.parametrize("file", ["demo/hitoksr/README.md", "demo/in-token/README.md", "docs/measured.md"])
def test_pages_say_that_gmsd_is_not_better_on_photographs(file: str) -> None:
    text = " ".join((ROOT / file).read_text().split())
    assert re.search(r"[Oo]n photographs,? (it|GMSD) is not better than bicubic's", text)


def test_times_and_costs_are_as_measured() -> None:
    said = rows(page("measured"))
    for name, row in {
        "eager fp32": "PyTorch eager, float32",
        "plain export": "torch.onnx.export without further work, in ONNX Runtime",
        "tilewright, standard operators": "tilewright, float32, without the native kernels",
        "tilewright": "tilewright, float32, with the native kernels",
    }.items():
        found = result("latency")["rows"][name]
        assert [row, f"{found['median_s']:.2f}", f"{found['ratio_to_eager']:.2f}"] in said
    for name, row in {
        "diffusers eager fp32": "diffusers, eager",
        "tilewright fast": "tilewright, --memory fast",
    }.items():
        found = result("flux_step")["rows"][name]
        numbers = found["median_s"], found["ratio_to_eager"], found["anonymous_bytes"] / 1e9
        assert [row, *(f"{number:.2f}" for number in numbers)] in said
    of_step = [row[1:4] for row in said if len(row) == 5]
    for found in result("flux_step_xeon")["rows"].values():
        numbers = found["ratio_to_eager"], found["peak_anonymous_bytes"] / 1e9
        assert [f"{found['median_s']:.1f}", *(f"{number:.2f}" for number in numbers)] in of_step
    cost = result("eight_bits_cost")
    step = cost["float_bytes"]["step"] / 1e9, cost["bytes"]["step.ort-fp8"] / 1e9
    assert ["the step, without modulation", *(f"{size:.1f}" for size in step)] in said
    for name in SYSTEMS:
        found = result(f"export_cost_{name.replace('-', '_')}")
        referenced = sum(tensors["referenced_bytes"] for tensors in found["tensors"].values()) / 1e9
        graphs = sum(found["graph_bytes"].values()) / 1e6
        cost = [f"{found['cpu_seconds']:.0f}", f"{found['peak_rss_bytes'] / 1e9:.2f}"]
        assert [*cost, f"{referenced:.1f}", f"{graphs:.1f}"] == next(row[2:] for row in said if row[0] == name)
    for row in result("kernels_cpu")["rows"]:
        if isinstance(row["cpu"], dict):
            native, standard = row["cpu"]["native"], row["cpu"]["standard operators"]
            assert any(r[0] == row["op"] and r[4] == f"{standard / native:.1f}" for r in said if len(r) == 6), row


def test_every_verb_is_on_the_page_of_the_command_line() -> None:
    text = page("command-line")
    for group in ("export", "runtime", "kernels"):
        for verb in verbs_of(group):
            assert re.search(rf"^tilewright {group} {verb}\b", text, re.MULTILINE), f"{group} {verb}"


def test_exit_codes_are_those_of_the_errors() -> None:
    codes = {row[0] for row in rows(page("command-line"))}
    raised = {str(kind.exit_code) for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)}
    assert raised | {"0", "130", "143"} <= codes
    classes = {row[0] for row in rows(page("python"))}
    assert {"UsageError", "BundleError", "EnvironmentMismatch", "ResourceError", "InputError"} <= classes
    assert all(hasattr(errors, name) for name in classes if name.endswith(("Error", "Mismatch")))


@pytest.mark.parametrize("kind", [Program, Grid, Pass, Tiles, Steps, Call])
def test_the_page_of_programs_names_every_key(kind: type) -> None:
    text = page("program")
    absent = [field.name for field in dataclasses.fields(kind) if not re.search(rf'[`"]{field.name}[`"]', text)]  # type: ignore[arg-type]
    assert absent in ([], ["grids"], ["name"])  # two are headings of the page


def test_the_page_of_bundles_names_what_a_manifest_says() -> None:
    text = page("bundle")
    for key in ("system", "preset", "licence", "options", "made_with", "files", "schema_version"):
        assert key in {field.name for field in dataclasses.fields(Manifest)} and f"`{key}`" in text


def test_the_program_in_the_docs_is_one_that_can_run() -> None:
    program = from_json(Program, blocks(page("program"), "json")[0].text, "docs/program.md")
    image, latent = (TensorSpec("float32", ("batch", channels, "h", "w")) for channels in (3, 16))
    number, prompt = TensorSpec("float32", (ANY,)), TensorSpec("float32", (ANY, 512, 4096))
    scalars = dict.fromkeys(("sigma", "sigma_next", "guidance"), number)
    components = {
        "encode": Signature({"image": image}, {"latent": latent}),
        "step": Signature({"z": latent, "y": latent, "prompt": prompt, **scalars}, {"z": latent}),
        "decode": Signature({"latent": latent}, {"image": image}),
    }
    check_program(program, components, {"prompt": TensorSpec("float32", (1, 512, 4096))})


def test_hooks_and_workflow_use_the_tested_versions_and_targets() -> None:
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{versions['ruff']}\n" in hooks
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.findall(r"(?:run|entry): make ([a-z-]+)", hooks + workflow))
    assert {"check", "test", "native", "lint", "cpp-sanitize"} == called and called <= targets


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=lambda f: f.name)
def test_an_issue_template_has_what_the_host_asks_for(file: Path) -> None:
    front = file.read_text().split("---\n")[1]
    assert {"name", "about"} <= {line.partition(":")[0] for line in front.splitlines()}


def test_the_page_of_the_api_is_made_from_the_docstrings() -> None:
    assert page("api") == api_page.page(), "run python tools/api_page.py"
    shown = set(re.findall(r"^### (\w+)$", page("api"), re.MULTILINE))
    assert {name for name in runtime.__all__ if name != "__version__"} <= shown
    assert set(errors.__all__) - {"amount"} <= shown


def test_the_numbers_of_the_service_are_as_measured() -> None:
    found, said = result("serve"), [row[1] for row in rows(page("measured")) if len(row) == 2]
    load, latency = found["load"], found["latency"]
    good, bad = load["answers"]["good: right bytes"], load["answers"]["malformed: its code"]
    assert {f"{good} of {good}", f"{bad} of {bad}", f"{1 + load['growth']:.3f}", str(found["stop"]["lost"])} <= {*said}
    assert {f"{found['throughput'][name]:.2f}" for name in ("ratio", "cpu_ratio")} <= {*said}
    assert f"{1e3 * latency['added_median_s']:.1f} ms" in said
