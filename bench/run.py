"""Run every benchmark and store its JSON, with hardware and versions, under bench/results/.

Needs about 15 GB of disk in --work, 8 GB of memory and an otherwise idle machine.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from tilewright.export.tokenizers import put, stand_in_clip
from tilewright.runtime.profile import hardware

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from train import data

HERE = Path(__file__).parent
TOOLS: list[str] = []  # of others, for eight_bits
PACKAGES = [
    "torch",
    "diffusers",
    "onnxruntime",
    "openvino",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "transformers",
    "numpy",
    "pillow",
]


def tilewright(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "tilewright.cli.main", *map(str, words)], check=True, stdout=sys.stderr)


def bench(name: str, *words: object, stored: str | None = None) -> None:
    print(f"{stored or name} ...", file=sys.stderr, flush=True)
    printed = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *map(str, words)], check=True, stdout=subprocess.PIPE
    )
    store(stored or name, json.loads(printed.stdout))


def store(name: str, result: object) -> None:
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    record = {"hardware": hardware(), "versions": versions, "python": sys.version.split()[0], "result": result}
    record["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps(record, indent=1, sort_keys=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(text + "\n")
    print(text)


def accuracy(bundle: Path, size: int) -> dict[str, object]:
    words = [sys.executable, "-m", "tilewright.cli.main", "export", "verify", bundle, "--size", str(size), "--json"]
    report: dict[str, object] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return report


def hitoksr(work: Path) -> None:
    tiny, full = work / "tiny", work / "full"
    tilewright("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", 0, "-o", tiny)
    tilewright("export", "build", "hitoksr", "--preset", "full", "--random-weights", 0, "-o", full)
    bench("imports")
    bench("cold", "--bundle", tiny)
    bench("overhead", "--bundle", tiny)
    bench("export_cost", "hitoksr", "--weights", full / "weights", stored="export_cost_hitoksr")
    store("accuracy", {"tiny at 512x512": accuracy(tiny, 512), "full at 512x512": accuracy(full, 512)})
    bench("latency", "--bundle", full, "--work", work)
    many = work / "toksr-tiny"
    tilewright("export", "build", "toksr", "--preset", "tiny", "--random-weights", 0, "-o", many)
    bench("devices", "--large", full, "--many", many)
    several, standard, folder = work / "several", work / "standard", work / "engines"
    words = ("export", "build", "hitoksr", "--preset", "full", "--random-weights", 0, "--verify", "never")
    tilewright(*words, "--target", "ort,openvino", "--precision", "float32,bfloat16", "-o", several)
    photos, stats, recipe = work / "photos", work / "hitoksr-full.safetensors", work / "hitoksr-full.yaml"
    photos.mkdir(exist_ok=True)
    for number in range(2):
        pixels = np.random.Generator(np.random.Philox(key=number)).integers(0, 256, (128, 128, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    tilewright("calib", "collect", several, photos, "-o", stats)
    tilewright("calib", "recipe", several, stats, "--format", "int8", "-o", recipe)
    tilewright("export", "compile", several, "--precision", "int8", "--target", "ort,openvino", "--recipe", recipe)
    tilewright(*words, "--ops", "standard", "-o", standard)
    tilewright("export", "onnx", standard, "--fold", "-o", folder / "onnx")
    bench("cpu_engines", "--bundle", several, "--work", folder)


def flux(work: Path) -> None:
    for system in ("in-token", "vicr"):
        bench("export_cost", system, stored=f"export_cost_{system.replace('-', '_')}")
    zeros, full = work / "in-token-zeros", work / "in-token-full"
    tilewright("export", "stand-in", "in-token", "-o", zeros)
    tilewright("export", "build", "in-token", "--weights", zeros, "--verify", "never", "--target", "ort", "-o", full)
    bench("eight_bits_cost", full)
    embeds, mid = work / "prompt.safetensors", work / "mid"
    random = np.random.Generator(np.random.Philox(key=0))
    shapes = {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)}
    work.mkdir(parents=True, exist_ok=True)
    save_file({name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}, embeds)
    words = ("--preset", "mid", "--random-weights", 0, "--prompt-embeds", embeds, "--verify", "never")
    words += ("--target", "ort,openvino", "--precision", "float32,bfloat16")
    tilewright("export", "build", "in-token", *words, "-o", mid)
    bench("flux_step", "--bundle", mid)


def instantir(work: Path) -> None:
    bench("export_cost", "instantir", stored="export_cost_instantir")


def toksr(work: Path) -> None:
    bench("export_cost", "toksr", stored="export_cost_toksr")
    single, files = work / "toksr-float32", work / "toksr-bfloat16"
    tilewright(
        "export", "build", "toksr", "--preset", "textok", "--random-weights", 0, "--verify", "never", "-o", single
    )
    for name in ("tokenizer", "text_encoder", "dit"):
        tensors = load_file(single / "weights" / name / f"{name}.safetensors")
        (files / name).mkdir(parents=True, exist_ok=True)
        save_torch({key: tensor.bfloat16() for key, tensor in tensors.items()}, files / name / "model.safetensors")
    put(files / "text_encoder", stand_in_clip(49408))
    weights = ("--tokenizer", files / "tokenizer", "--clip", files / "text_encoder", "--dit", files / "dit")
    half = work / "toksr"
    tilewright("export", "build", "toksr", "--preset", "textok", *weights, "--verify", "never", "-o", half)
    bench("batching", "--bundle", half)


def demo(work: Path) -> None:
    models, hitoksr, in_token = HERE.parent / "demo", work / "hitoksr-demo", work / "in-token-demo"
    tilewright("export", "build", "hitoksr", "--preset", "demo", "--weights", models / "hitoksr", "-o", hitoksr)
    tilewright("export", "build", "in-token", "--preset", "demo", "--weights", models / "in-token", "-o", in_token)
    bench("demo", "--hitoksr", hitoksr, "--in-token", in_token)


def eight_bits(work: Path) -> None:
    """Engines in 8 bits of the demo models. `--tool` names tools of others to compare them with."""
    work.mkdir(parents=True, exist_ok=True)
    photos = work / "calibration"
    photos.mkdir(exist_ok=True)
    for name, _, small in data.kept_back("calibration"):
        Image.fromarray(small).save(photos / f"{name}.png")
    models, targets = HERE.parent / "demo", ("--target", "ort,openvino", "--precision", "float32,bfloat16")
    hitoksr, in_token, plain = work / "hitoksr-8", work / "in-token-8", ("--ops", "standard", "--verify", "never")
    for bundle, words in ((hitoksr, ("hitoksr",)), (in_token, ("in-token", "--preset", "demo"))):
        words = ("export", "build", *words, "--weights", models / words[0])
        tilewright(*words, *targets, "-o", bundle)
        tilewright(*words, *plain, "-o", bundle.with_suffix(".standard"))
    stats, recipe, found = (work / name for name in ("hitoksr.safetensors", "hitoksr.yaml", "sens.json"))
    tilewright("calib", "collect", hitoksr, photos, "-o", stats)
    for precision, words, target in (("int8", ("--smooth", 0.5), "ort,openvino"), ("fp8", (), "ort")):
        tilewright("calib", "recipe", hitoksr, stats, "--format", precision, *words, "-o", recipe)
        tilewright("export", "compile", hitoksr, "--precision", precision, "--target", target, "--recipe", recipe)
    tools = [word for tool in TOOLS for word in ("--tool", tool)]
    bench("eight_bits", hitoksr, hitoksr.with_suffix(".standard"), "--components", "generate,decode", *tools)
    stats, recipe = work / "in-token.safetensors", work / "in-token.yaml"
    tilewright("calib", "collect", in_token, photos, "-o", stats, "--images", 12, "--steps", 8)
    for precision, words, target in (("fp8", (), "ort"), ("int8", ("--smooth", 0.5), "ort,openvino")):
        tilewright("calib", "sensitivity", in_token, stats, "--format", precision, *words, "-o", found)
        words = ("--format", precision, "--sens", found, "--budget-psnr", 60)
        tilewright("calib", "recipe", in_token, stats, *words, "-o", recipe)
        tilewright("export", "compile", in_token, "--precision", precision, "--target", target, "--recipe", recipe)
    words = ("--components", "encode,see,redux,step,decode", "--steps", 8, "--images", 8, *tools)
    bench("eight_bits", in_token, in_token.with_suffix(".standard"), *words, stored="eight_bits_in_token")
    bench("step_ranges", in_token, stats, recipe)


def kernels(work: Path) -> None:
    command = [sys.executable, "-m", "tilewright.cli.main", "kernels"]
    for name, words in (("kernels_cpu", ["bench"]), ("kernel_resources", ["check", "--resources"])):
        output = subprocess.run([*command, *words, "--json"], check=True, stdout=subprocess.PIPE).stdout
        store(name, json.loads(output))


def wheel(work: Path) -> None:
    clone, tiny = HERE.parent, work / "tiny"
    subprocess.run(["make", "native", "wheel"], cwd=clone, check=True, stdout=sys.stderr)
    tilewright("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", 0, "-o", tiny)
    bench("wheel", "--bundle", tiny, "--wheels", *sorted((clone / "dist").glob("*.whl")))


def memory(work: Path) -> None:
    systems = ("instantir", "hitoksr", "toksr", "in-token", "vicr")
    bundles = [work / f"memory-{system}" for system in systems]
    for system, bundle in zip(systems, bundles, strict=True):
        words = ("--preset", "tiny", "--random-weights", 0, "--verify", "never")
        tilewright("export", "build", system, *words, "-o", bundle)
    bench("memory", *bundles)
    full = work / "memory-full"
    tilewright("export", "build", "hitoksr", "--preset", "full", "--random-weights", 0, "--verify", "never", "-o", full)
    bench("memory", full, "--sides", "512", "--ways", "fast;low", stored="memory_full")


def cluster(work: Path) -> None:
    demo = work / "cluster"
    tilewright("export", "build", "hitoksr", "--weights", HERE.parent / "demo" / "hitoksr", "-o", demo)
    bench("cluster", demo)


def serve(work: Path) -> None:
    tiny = work / "serve"
    words = ("--preset", "tiny", "--random-weights", 0, "--verify", "never", "--target", "ort")
    tilewright("export", "build", "hitoksr", *words, "-o", tiny)
    bench("serve", "--bundle", tiny)


SYSTEMS = {
    "hitoksr": hitoksr,
    "flux": flux,
    "instantir": instantir,
    "toksr": toksr,
    "demo": demo,
    "eight_bits": eight_bits,
    "kernels": kernels,
    "memory": memory,
    "cluster": cluster,
    "serve": serve,
    "wheel": wheel,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "systems", nargs="*", default=list(SYSTEMS), help=f"some of {', '.join(SYSTEMS)} (default: all)"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tilewright-bench")
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PYTHON", help="see bench/eight_bits.py")
    arguments = parser.parse_args()
    TOOLS += arguments.tool
    for name in arguments.systems:
        SYSTEMS[name](arguments.work)
