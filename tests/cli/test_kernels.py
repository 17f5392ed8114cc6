"""The verbs of `tilewright kernels`: tables, JSON, and one line where something is wrong or missing."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.cli.commands import parse
from tilewright.cli.main import main
from tilewright.export import kernels_check
from tilewright.kernels import ahead, gate, jit, timing
from tilewright.kernels.table import KERNELS
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import AccuracyError, EnvironmentMismatch, TilewrightError, UsageError

CODEBOOKS = {"codebook_nearest", "codebook_from_logits", "codebook_from_hidden"}
FACED = {name for name, op in KERNELS.items() if op.face}
built = pytest.mark.skipif(ort.native_library() is None, reason="native kernels are not built: make native")
with_triton = pytest.mark.skipif(jit.triton is None, reason="Triton is not installed")


def run(*words: str) -> None:
    arguments = parse(["kernels", *words])
    arguments.run(arguments)


@pytest.fixture
def answered(capsys) -> Callable[..., Any]:
    """What a verb answers as JSON; with the message where it fails with this error."""

    def answer(*words: str, error: type[TilewrightError] | None = None) -> Any:
        code = main(["kernels", *words, "--json"])
        said = capsys.readouterr()
        value = json.loads(said.out)
        if error is None:
            assert code == 0
            return value
        told = value.pop("error")
        assert (code, told["code"], told["kind"]) == (error.exit_code, error.exit_code, error.__name__)
        assert said.err == f"tilewright: {told['message']}\n"
        return value, told["message"]

    return answer


@pytest.fixture
def doctored(monkeypatch) -> Callable[..., None]:
    """Change an op of the table."""

    def change(name: str, **fields: Any) -> None:
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(KERNELS[name], **fields))

    return change


def test_list_shows_what_is_here(answered, monkeypatch, capsys):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    found = answered("list")
    assert {row["op"]: row["cases"] for row in found["ops"]} == {
        name: [case for case in op.cases if case != "small"] for name, op in KERNELS.items()
    }
    assert {row["op"] for row in found["ops"] if row["native"] == kernels_check.NO_NATIVE} == CODEBOOKS
    assert {row["op"] for row in found["ops"] if row["onnx"].startswith("tilewright::")} == FACED
    assert found["runtime"] == "the runtime takes ONNX's standard operators"
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "op" and lines[1 + len(KERNELS)] == found["runtime"]
    assert lines[-2:] == [f"TensorRT: {found['tensorrt']}", f"ONNX Runtime CUDA: {found['cuda']}"]


@built
def test_list_names_the_native_kernels_that_the_runtime_takes(answered):
    found = answered("list")
    taken = {row["op"] for row in found["ops"] if row["native"] == str(ort.native_library())}
    assert taken == CODEBOOKS
    assert all(name in found["runtime"] for name in CODEBOOKS)


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentMismatch, match=r"none\.so do not load .* make native"):
        run("list")


@pytest.mark.slow
def test_every_op_passes_in_every_implementation(answered):
    found = answered("check")
    assert all(row["passes"] for row in found["rows"])
    seen = {name: {(r["implementation"], r["type"]) for r in found["rows"] if r["op"] == name} for name in KERNELS}
    for name, pairs in seen.items():
        wanted = {("torch", "float32"), ("torch", "float16"), ("torch", "bfloat16")}
        if jit.triton is not None:
            wanted |= {("triton, interpreted", "float32"), ("triton, interpreted", "float16")}
        if name in FACED:
            wanted |= {("onnx", "float32"), ("onnx", "float16")}
        if name in CODEBOOKS and ort.native_library():
            wanted |= {("native", "float32")}
        assert wanted <= pairs
    assert ("triton on GPU" in found["not_judged"]) == (jit.triton is None or not torch.cuda.is_available())
    assert found["versions"]["torch"]


def test_an_op_that_is_off_is_told_in_the_table_and_in_one_line(answered, doctored, monkeypatch):
    monkeypatch.setattr(kernels_check, "triton", None)  # nothing to interpret: quick
    plain = KERNELS["concat_project"].run
    doctored("concat_project", run=lambda *given: plain(*given) * 1.001)
    found, said = answered("check", "--op", "concat_project", error=AccuracyError)
    missed = {(row["implementation"], row["type"]) for row in found["rows"] if not row["passes"]}
    assert missed == {("torch", "float32")}
    assert "1 of 5 miss; first concat_project in torch, float32: off by" in said and "\n" not in said
    assert AccuracyError.exit_code == 7


def test_an_implementation_that_does_not_run_is_a_miss_with_its_reason(answered, doctored, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    monkeypatch.setattr(kernels_check, "triton", None)
    face = dataclasses.replace(KERNELS["codebook_nearest"].face, body=lambda given: "indices = NoSuchOp(latents)")
    doctored("codebook_nearest", face=face)
    found, said = answered("check", "--op", "codebook_nearest", error=AccuracyError)
    (row, _) = [row for row in found["rows"] if row["implementation"] == "onnx"]
    assert row["why"].startswith("does not run: ") and row["error"] is None
    assert "2 of" in said and "does not run" in said


def test_an_unknown_op_is_answered_with_those_there_are():
    for verb in ("check", "bench"):
        with pytest.raises(UsageError, match=r"--op 'vq' is no op; there are concat_project, .*codebook_from_hidden"):
            run(verb, "--op", "vq")


@pytest.mark.parametrize("words", [["check"], ["check", "--resources"], ["bench"]], ids=str)
def test_a_process_that_interprets_is_refused(words, monkeypatch):
    monkeypatch.setattr(jit, "INTERPRETED", True)
    with pytest.raises(EnvironmentMismatch, match="TRITON_INTERPRET=1"):
        run(*words)


def test_resources_without_triton_say_what_to_install(monkeypatch):
    monkeypatch.setattr(jit, "triton", None)
    with pytest.raises(EnvironmentMismatch, match="pip install 'triton"):
        run("check", "--resources")


@pytest.mark.slow
@with_triton
def test_resources_are_a_table_of_kernels_and_a_miss_is_one_line(answered, doctored, monkeypatch, capsys):
    monkeypatch.setattr(gate, "ARCHS", (86,))
    words = ("check", "--resources", "--op", "codebook_from_logits")
    rows = answered(*words)["rows"]
    of = [(row["kernel"], row["type"], row["arch"], row["faults"]) for row in rows]
    assert of == [("codebook_from_logits", t, a, []) for t, a in
                  (("float16", "sm_86"), ("bfloat16", "sm_86"), ("float16", "gfx942"))]  # fmt: skip
    run(*words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) and all(line.endswith("ok") for line in lines[1:])
    took = rows[0]["resources"]
    assert lines[1].split()[5:9] == [str(took[n]) for n in ("registers", "shared", "spills", "tensor_core")]
    monkeypatch.setitem(ahead.SHARED_LIMIT, 86, 8)
    doctored("codebook_from_logits", multiplies=True)
    _, said = answered(*words, error=AccuracyError)
    assert said.startswith("3 of 3 kernels may not ship; first codebook_from_logits hitoksr float16 sm_86: ")
    assert "a block has 8; no tensor-core instruction" in said


@built
def test_bench_times_native_kernels_and_says_why_others_have_no_times(answered, doctored, capsys):
    small = {name: dict.fromkeys(("small", "published"), KERNELS[name].cases["small"]) for name in KERNELS}
    doctored("codebook_nearest", cases=small["codebook_nearest"])
    found = answered("bench", "--op", "codebook_nearest")
    (row,) = found["rows"]
    assert row["case"] == "published" and set(row["cpu"]) == {"native", "standard operators"}
    assert all(0 < seconds < 10 for seconds in row["cpu"].values())
    assert found["hardware"]["cores"] and found["versions"]["onnxruntime"] and found["runs"] >= 10
    doctored("concat_project", cases=small["concat_project"])
    (row,) = answered("bench", "--op", "concat_project")["rows"]
    assert row["cpu"] == "no native kernel"
    if not torch.cuda.is_available():
        assert row["gpu"] == ("no GPU that PyTorch can use" if jit.triton else kernels_check.GET_TRITON)
    run("bench", "--op", "concat_project")
    assert "no native kernel" in capsys.readouterr().out


def test_bench_without_native_kernels_says_how_to_build_them(answered, doctored, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    assert {row["cpu"] for row in answered("bench", "--op", "codebook_from_hidden")["rows"]} == {
        kernels_check.NO_NATIVE
    }


def test_contenders_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    order: list[str] = []
    spent = {"a": iter([90, 80, 3, 1, 2]), "b": iter([70, 60, 10, 30, 20])}
    now = 0

    def advance(name: str) -> Callable[[], None]:
        def contender() -> None:
            nonlocal now
            order.append(name)
            now += next(spent[name])

        return contender

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.medians({"a": advance("a"), "b": advance("b")}, runs=3, warm_up=2)
    assert order == ["a", "b"] * 5
    assert found == {"a": 2, "b": 20}
