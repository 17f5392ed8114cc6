"""The TensorRT plugins, registered with its real Python bindings and led through them; no TensorRT and no GPU is there.

Not covered, because only TensorRT itself does it: parsing a graph into plugins, arithmetic on its own dimension
expressions, passing the arguments, opting in to more than 48 KiB of shared memory, and running the kernel.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.shared import Shared
from support.tensorrt.bindings import VERSIONS, place_with
from tilewright.kernels.table import KERNELS

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent / "tensorrt"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLUX = {"heads": 24, "epsilon": 1e-6, "interleaved": 1}
HITOKSR = {"heads": 12, "epsilon": 1e-6, "interleaved": 0}
WIDE = {"x": "B N 3072", "wq": "3072 3072", "wk": "3072 3072", "wv": "3072 3072", "hq": "3072", "hk": "3072"}
WIDE |= {"hv": "3072", "norm_q": "128", "norm_k": "128"}
SMALL = {"x": "B N 768", "wq": "768 768", "wk": "768 768", "wv": "768 768"}
SIZES = ({"B": 2, "N": 70, "M": 65, "T": 21}, {"B": 3, "N": 384, "M": 384, "T": 128}, {"B": 1, "N": 1, "M": 1, "T": 1})

# plugin -> inputs (named sizes are dynamic), attributes, what the kernel is passed, and the outputs' shapes
CASES: dict[str, tuple[dict[str, str], dict[str, Any], str, list[str]]] = {
    "ConcatProject": (
        {"x": "B N 64", "c": "B N 64", "weight": "3072 384", "h": "3072"},
        {},
        "B*N",
        ["B N 3072"],
    ),
    "QkvNormRope_without_c": ({**WIDE, "cos": "M 64", "sin": "M 64"}, FLUX, "B*N N N-M", ["B 24 N 128"] * 3),
    "QkvNormRope_without_c_cos_sin": (WIDE, FLUX, "B*N N 0", ["B 24 N 128"] * 3),
    "QkvNormRope_without_c_hq_hk_hv_norm_q_norm_k": (
        {**SMALL, "cos": "M 32", "sin": "M 32"},
        HITOKSR,
        "B*N N N-M",
        ["B 12 N 64"] * 3,
    ),
    "JointAttention": (
        {f"{p}{i}": f"B 24 {n} 128" for i, n in ((1, "T"), (2, "N")) for p in "qkv"},
        {},
        "T N",
        ["B T 3072", "B N 3072"],
    ),
    "CodebookNearest": ({"latents": "B N 32", "codebook": "4 4096 8"}, {}, "B*N", ["B N 4", "B N 32"]),
    "CodebookFromLogits": ({"logits": "B N 16384", "codebook": "4 4096 8"}, {}, "B*N", ["B N 4", "B N 32"]),
    "CodebookFromHidden": (
        {"hidden": "B N 768", "weight": "16384 768", "bias": "16384", "codebook": "4 4096 8"},
        {},
        "B*N",
        ["B N 4", "B N 32"],
    ),
}
BUILDS = [(plugin, "bf16", 90) for plugin in CASES]
MORE_BUILDS = [(plugin, "fp16", 90) for plugin in CASES]
MORE_BUILDS += [(p, "bf16", arch) for p in ("JointAttention", "CodebookFromHidden") for arch in (80, 100)]


def question(plugin: str, dtype: str = "bf16", arch: int = 90, **changed: str) -> dict[str, Any]:
    """A node of the plugin; a float32 table where it has one."""
    inputs, attributes, _, _ = CASES[plugin]
    shapes = [[int(s) if s.isdigit() else s for s in shape.split()] for shape in (inputs | changed).values()]
    types = ["fp32" if name in ("cos", "sin") else dtype for name in inputs]
    asked = {"plugin": plugin, "inputs": list(inputs), "shapes": shapes, "types": types, "attributes": attributes}
    return {**asked, "arch": arch, "at": SIZES}


POINTERS = ".entry _k_kernel(\n.param .u64 _k_kernel_param_0,\n.param .u64 _k_kernel_param_1\n)\n"
REFUSED = {
    "compiled for its channels": question("ConcatProject", x="B N C"),
    "fix every dimension but batch and tokens": question("QkvNormRope_without_c", x="B N C", wq="O C"),
    "give every input its full shape": question("ConcatProject", x="2 N 64", c="2 N 64", h="1 N 3072"),
    "take FP16, BF16, FP32, not": question("JointAttention", "fp8"),
    "reads _k_kernel_param_1": {"parameters": ["a"], "ptx": POINTERS + "{ ld [_k_kernel_param_1]; }"},
    "2 parameters in PTX, and 3 in Python": {"parameters": ["a", "b", "c"], "ptx": POINTERS + "{ }"},
}
ACCEPTED = {"parameters": ["a"], "ptx": POINTERS + "{ ld [_k_kernel_param_10]; }"}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def told(
    version: str, shared: Shared, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process answers where TensorRT's bindings of this version are imported."""
    place = place_with(version, HERE / "stub.cpp", request.config, tmp_path_factory.mktemp("tensorrt"), shared)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton")}  # the versions share it
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))

    keys = BUILDS + (MORE_BUILDS if version == VERSIONS[-1] else [])
    unknown_arch = question("CodebookFromLogits") | {"arch": None}
    questions = [*(question(*key) for key in keys), *REFUSED.values(), ACCEPTED, unknown_arch]
    inbox, outbox = place / "questions.json", place / "answers.json"
    inbox.write_text(json.dumps(questions))
    subprocess.run([sys.executable, HERE / "walk.py", inbox, outbox], check=True, env=environment)
    found = json.loads(outbox.read_text())
    assert found["version"] == version
    return {**found, "keys": keys}


@pytest.fixture(scope="module")
def built(told: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Every plugin, built; by the newer version in both types, and for other architectures."""
    made = dict(zip(told["keys"], told["answers"], strict=False))
    assert not {key: answer["error"] for key, answer in made.items() if "error" in answer}
    return made


def test_the_plugins_and_their_inputs(told: dict[str, Any]) -> None:
    assert told["plugins"] == {plugin: list(inputs) for plugin, (inputs, _, _, _) in CASES.items()}


def test_sizes_and_shapes_follow_the_inputs(built: Any) -> None:
    for (plugin, _, _), made in built.items():
        _, _, passed, outputs = CASES[plugin]
        for sizes, at in zip(SIZES, made["at"], strict=True):
            assert at["sizes"] == [eval(size, {}, sizes) for size in passed.split()], plugin
            assert at["outputs"] == [[eval(size, {}, sizes) for size in shape.split()] for shape in outputs], plugin


def test_grids_are_those_of_the_plans(built: Any) -> None:
    for (plugin, dtype, arch), made in built.items():
        asked = question(plugin, dtype, arch)
        op = next(op for op in KERNELS.values() if op.face and op.face.name == plugin.split("_")[0])
        names = [name.rstrip("?") for name in op.face.inputs]
        options = {"shares": 1} if op.name == "codebook_from_hidden" else {}
        for sizes, at in zip(SIZES, made["at"], strict=True):
            shapes = [[sizes.get(size, size) for size in shape] for shape in asked["shapes"]]
            words = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
            tensors = [
                torch.empty(s, dtype=words[t], device="meta") for s, t in zip(shapes, asked["types"], strict=True)
            ]
            given = dict.fromkeys(names) | dict(zip(asked["inputs"], tensors, strict=True)) | asked["attributes"]
            (launch,), _ = op.kernel_launches(**given, arch=arch, **options)
            assert [at["grid_x"], at["grid_y"], at["grid_z"]] == [*launch.grid, 1, 1][:3], plugin


def test_types_are_one_float_type_with_its_own_or_float32_tables_and_32_bit_indices(built: Any) -> None:
    for (plugin, dtype, _), made in built.items():
        inputs, outputs = CASES[plugin][0], CASES[plugin][3]
        own = ["int32" if plugin.startswith("Codebook") and i == 0 else dtype for i in range(len(outputs))]
        assert made["types"] == own
        assert question(plugin, dtype)["types"] + own in made["combinations"]
        assert [dtype] * len(inputs) + own in made["combinations"]
        assert {row[0] for row in made["combinations"]} == {"fp16", "bf16", "fp32"}
        assert len(made["combinations"]) == (5 if "cos" in inputs else 3)


def test_ptx_takes_inputs_then_sizes_then_outputs_and_nothing_else(built: Any) -> None:
    for (plugin, _, _), made in built.items():
        inputs, _, passed, outputs = CASES[plugin]
        entries = re.findall(r"\.entry (\w+)\((.*?)\)", made["ptx"], re.DOTALL)
        assert [name for name, _ in entries] == [made["name"]]
        kinds = re.findall(r"\.param \.(\w+)", entries[0][1])
        assert kinds == ["u64"] * len(inputs) + ["u32"] * len(passed.split()) + ["u64"] * len(outputs), plugin


def test_the_kernel_is_launched_as_it_was_compiled(built: Any) -> None:
    for made in built.values():
        kernel = made["compiled"]
        assert made["name"].startswith(kernel["name"])
        assert f".reqntid {kernel['threads']}\n" in made["ptx"]
        for at in made["at"]:
            assert (at["block_x"], at["block_y"], at["block_z"]) == (kernel["threads"], 1, 1)
            assert at["shared_mem"] == kernel["shared"]


def test_one_name_is_one_kernel(built: Any) -> None:
    assert len({made["name"] for made in built.values()}) == len({made["ptx"] for made in built.values()}) == len(built)


def test_loads_are_16_bytes_wide(built: Any) -> None:
    wide = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], (?:0x10|16)\b")
    for key, made in built.items():
        assert wide.search(made["ptx"]), key


def test_nothing_tells_where_it_was_built(built: Any) -> None:
    for made in built.values():
        assert ".py" not in made["ptx"] and ".debug" not in made["ptx"]


def test_the_assembler_takes_the_ptx_for_its_architecture(built: Any, tmp_path: Path) -> None:
    file = tmp_path / "kernel.ptx"
    for (_, _, arch), made in built.items():
        file.write_text(made["ptx"])
        (target,) = re.findall(r"^\.target (\w+)", made["ptx"], re.MULTILINE)
        assert target.startswith(f"sm_{arch}")
        assert (".version 8.4\n" in made["ptx"]) == (arch <= 90)
        words = [BIN / "ptxas", f"-arch={target}", file, "-o", tmp_path / "kernel.cubin"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_tensorrt_could_not_run_is_refused_in_one_line(told: dict[str, Any]) -> None:
    refused = told["answers"][len(told["keys"]) : -2]
    for reason, answer in zip(REFUSED, refused, strict=True):
        assert reason in answer["error"] and "\n" not in answer["error"]


def test_pointers_that_nothing_reads_are_left_out(told: dict[str, Any]) -> None:
    name, ptx = told["answers"][-2]
    assert re.findall(r"\w+_param_\w+", ptx) == [f"{name}_param_0", f"{name}_param_10"]


def test_the_architecture_is_that_of_the_gpu_that_is_here_or_90(told: dict[str, Any]) -> None:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    assert f".target sm_{major}{minor}" in told["answers"][-1]["ptx"]


def test_without_tensorrt_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['tensorrt'] = None; import tilewright.kernels.tensorrt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'tensorrt>=10.16'" in done.stderr.strip().splitlines()[-1]
