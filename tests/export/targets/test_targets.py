"""The engines that follow from targets and precisions, and how a combination that nobody makes is refused."""

import pytest

from tilewright.export.targets import TARGETS, engines_of, target_module, usual_engines
from tilewright.runtime.bundle.manifest import PRECISIONS, Memory
from tilewright.runtime.engines import BACKENDS
from tilewright.runtime.engines.choose import Machine
from tilewright.runtime.errors import UsageError


def test_each_target_makes_the_precisions_that_it_can():
    assert engines_of(["ort", "openvino"], ["bfloat16", "float32"]) == [
        ("ort", "float32"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
    ]
    assert engines_of(["openvino"], ["bfloat16"]) == [("openvino", "bfloat16")]


@pytest.mark.parametrize(
    ("targets", "precisions", "said"),
    [
        (["tpu"], ["float32"], "target='tpu' is not one of ort, openvino, cuda, tensorrt, aoti"),
        (["ort"], ["int4"], "precision='int4' is not one of float32, bfloat16, float16, fp8, int8"),
        (["ort", "ort"], ["float32"], "target='ort,ort' must name each target once"),
        (["ort", "openvino"], ["bfloat16"], "'ort' makes float32 only; add one of these, or leave the target out"),
        (["ort"], ["bfloat16"], "add one of these, or take target openvino or cuda or tensorrt or aoti instead"),
        (["ort"], ["float16"], "target 'ort' makes float32 only; add one of these, or take target cuda instead"),
        (["ort"], ["float32", "bfloat16"], "is none that ort makes; add target 'openvino'"),
        (["ort", "openvino"], ["float32", "fp8"], "precision='fp8' is none that ort or openvino makes; leave it out"),
        (["ort"], [""], "precision='' is not one of"),
    ],
)
def test_what_nobody_makes_is_refused_in_one_line(targets, precisions, said):
    with pytest.raises(UsageError) as caught:
        engines_of(targets, precisions)
    assert said in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("backends", "instructions", "targets", "precisions", "expected"),
    [
        (["ort"], ["avx512_bf16"], [], [], (("ort",), ("float32",))),
        (["ort", "openvino"], [], [], [], (("ort", "openvino"), ("float32",))),
        (["ort", "openvino"], ["avx512_bf16"], [], [], (("ort", "openvino"), ("float32", "bfloat16"))),
        (["ort", "openvino"], ["avx512_bf16"], ["ort"], [], (("ort",), ("float32",))),
        (["ort", "openvino"], ["avx512_bf16"], [], ["bfloat16"], (("openvino",), ("bfloat16",))),
        (["ort", "openvino"], [], ["openvino"], [], (("openvino",), ("float32",))),
        ([], [], [], [], (("ort",), ("float32",))),
        (["ort"], [], ["openvino"], ["bfloat16"], (("openvino",), ("bfloat16",))),
        (["ort"], [], ["cuda", "tensorrt", "aoti"], [], (("cuda", "tensorrt", "aoti"), ("float32",))),
        (["ort"], [], ["tpu"], [], (("tpu",), ("float32",))),
    ],
)
def test_a_build_that_names_no_engines_makes_those_that_run_here(backends, instructions, targets, precisions, expected):
    packages = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
    machine = Machine(cores=2, backends=tuple(backends), instructions=tuple(instructions), packages=packages)
    assert usual_engines(machine, targets, precisions) == expected


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_describes_engines_of_a_backend_that_exists(target):
    module = target_module(target)
    specs = [module.spec(precision, "a.onnx", Memory(fixed=1, copied=5), 100) for precision in module.PRECISIONS]
    assert [spec.name for spec in specs] == [f"{target}-{precision}" for precision in module.PRECISIONS]
    assert {spec.backend for spec in specs} == {target} <= set(BACKENDS)
    assert sorted(module.PRECISIONS, key=PRECISIONS.index) == list(module.PRECISIONS)
    assert all(spec.memory.fixed == 1 for spec in specs)


def test_an_engine_of_openvino_copies_all_weights_in_its_precision():
    specs = [target_module("openvino").spec(p, "a.onnx", Memory(copied=5), 100) for p in ("float32", "bfloat16")]
    assert [spec.memory.copied for spec in specs] == [400, 200]
