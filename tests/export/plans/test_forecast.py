"""Forecasts of compiled engines for a GPU that is not here, and the refusals of a machine that has none."""

import json

import pytest

from tilewright.cli.main import main
from tilewright.export.plans.forecast import (
    GPUS,
    check_gpu,
    check_host,
    gpu_bytes,
    graph_forecast,
    package_forecast,
    plan_forecast,
)
from tilewright.export.targets import check_makeable
from tilewright.export.targets.tensorrt import missing
from tilewright.runtime.engines.machine import compute_capability
from tilewright.runtime.errors import EnvironmentMismatch, ResourceError, UsageError

needs_no_gpu = pytest.mark.skipif(compute_capability() is not None, reason="this machine has a GPU")


def test_memory_follows_the_largest_component_and_the_widest_precision():
    small, large = (plan_forecast("sm90", 80 * 10**9, {"a": 10**9, "b": n * 10**9}, ["bfloat16"]) for n in (1, 12))
    assert large.device - small.device == 2 * 2 * 11 * 10**9
    assert large.running - small.running == 2 * 11 * 10**9
    assert (large.count, large.device_memory, large.seconds) == (2, 80 * 10**9, None)
    both = plan_forecast("sm90", 80 * 10**9, {"a": 10**9, "b": 12 * 10**9}, ["float32", "bfloat16"])
    assert both.count == 4 and both.device - 1.5e9 == 2 * (large.device - 1.5e9)


def test_memory_of_the_machine_that_compiles_is_checked_too():
    predicted = plan_forecast("sm90", 80 * 10**9, {"step": 12 * 10**9}, ["bfloat16"])
    check_host(predicted, None)
    check_host(predicted, predicted.host)
    with pytest.raises(ResourceError, match=r"about 99\.0 GB of memory, and 64\.0 GB are free"):
        check_host(predicted, 64 * 10**9)


def test_what_does_not_fit_on_the_card_is_refused_with_the_numbers():
    large = plan_forecast("sm90", 80 * 10**9, {"step": 24 * 10**9}, ["bfloat16"])
    with pytest.raises(ResourceError) as caught:
        check_gpu(large)
    assert "about 97.5 GB of GPU memory, and such a card has 80.0 GB" in str(caught.value)
    check_gpu(plan_forecast("sm90:141", 141 * 10**9, {"step": 24 * 10**9}, ["bfloat16"]))


@pytest.mark.parametrize("gpu", ["sm70", "h100", "sm90:", "sm90:0", "sm90:x", "", "SM90", "sm90:99999"])
def test_a_gpu_that_nobody_knows_is_refused(gpu):
    with pytest.raises(UsageError, match=r"is none of sm75, .*sm90:141"):
        gpu_bytes(gpu)
    assert all(gpu_bytes(name) == size * 10**9 for name, size in GPUS.items())


def test_time_is_that_of_the_nearest_plan_of_the_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    notes = {
        "near": ("sm90", 1100, 60),
        "far": ("sm90", 600, 30),
        "other": ("sm80", 1000, 5),
        "larger": ("sm90", 9000, 9),
    }
    for name, (architecture, parameters, seconds) in notes.items():
        folder = tmp_path / "build" / "plan" / name
        folder.mkdir(parents=True)
        note = {"architecture": architecture, "parameters": parameters, "seconds": seconds}
        (folder / "inspected.json").write_text(json.dumps(note))
    (folder / "inspected.json").with_name("damaged").mkdir()
    assert plan_forecast("sm90", 80 * 10**9, {"a": 1000}, ["bfloat16"]).seconds == 60
    assert plan_forecast("sm90", 80 * 10**9, {"a": 1000, "b": 1000}, ["bfloat16"]).seconds == 120
    assert plan_forecast("sm90", 80 * 10**9, {"a": 1000, "b": 50}, ["bfloat16"]).seconds is None
    assert plan_forecast("sm100", 180 * 10**9, {"a": 1000}, ["bfloat16"]).seconds is None


@needs_no_gpu
def test_without_a_gpu_the_target_says_what_helps(capsys):
    assert "here is none" in str(missing()) and "--dry-run --gpu sm90" in str(missing())
    with pytest.raises(EnvironmentMismatch):
        check_makeable(["ort", "tensorrt"])
    check_makeable(["ort", "openvino"])


@needs_no_gpu
def test_compiling_without_a_gpu_ends_with_code_4_and_one_line(hitoksr_tiny, capsys):
    for words in (
        ["compile", str(hitoksr_tiny), "--target", "tensorrt"],
        ["build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", "never", "--target", "ort,tensorrt"],
    ):
        assert main(["export", *words]) == 4
        told = capsys.readouterr().err.strip()
        assert "compiles on the machine that has the NVIDIA GPU, and here is none" in told and "\n" not in told


def test_a_gpu_is_named_for_predictions_only(capsys):
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", "never"]
    assert main([*words, "--target", "tensorrt", "--gpu", "sm90"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_a_dry_run_predicts_plans_for_a_gpu_elsewhere(hitoksr_tiny, capsys):
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(hitoksr_tiny)]
    words += ["--target", "ort,tensorrt", "--precision", "float32,bfloat16", "--dry-run"]
    assert main([*words, "--gpu", "sm90", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["plans"]
    assert (told["gpu"], told["plans"], told["gpu_memory_bytes"]) == ("sm90", 4, 80 * 10**9)
    assert main([*words, "--gpu", "sm90:1"]) == 5
    captured = capsys.readouterr()
    assert "plans: 4 for sm90:1" in captured.out
    assert "such a card has 1.0 GB" in captured.err and "\n" not in captured.err.strip()


def test_packages_take_the_memory_of_a_compiler_and_weights_only_where_they_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    sizes = {"a": 10**9, "b": 2 * 10**9, "sizes": 0}
    here, there = (package_forecast(gpu, None, sizes, ["float32", "bfloat16"]) for gpu in (None, "sm90"))
    assert here.count == there.count == 5  # one precision is enough without weights
    assert (here.running, here.host) == (0, there.host) and there.running == 4 * 3 * 10**9 + 1.5e9
    note = {"architecture": "cpu", "parameters": 900_000_000, "seconds": 40}
    (tmp_path / "build" / "package" / "one").mkdir(parents=True)
    (tmp_path / "build" / "package" / "one" / "noted.json").write_text(json.dumps(note))
    assert package_forecast(None, None, {"a": 10**9}, ["float32"]).seconds == 40
    assert package_forecast("sm90", None, {"a": 10**9}, ["float32"]).seconds is None


def test_graphs_for_a_gpu_must_fit_on_it_when_they_run():
    check_gpu(graph_forecast("sm90", 80 * 10**9, {"a": 19 * 10**9}, ["bfloat16"]))
    check_gpu(graph_forecast(None, None, {"a": 10**12}, ["bfloat16"]))
    with pytest.raises(
        ResourceError, match=r"running on sm90 needs about 81\.5 GB of GPU memory, .* has 80\.0 GB; use"
    ):
        check_gpu(graph_forecast("sm90", 80 * 10**9, {"a": 20 * 10**9}, ["bfloat16"]))


def test_a_dry_run_predicts_each_target(hitoksr_tiny, capsys):
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(hitoksr_tiny)]
    words += ["--target", "aoti,cuda,tensorrt", "--precision", "float32", "--dry-run"]
    assert main([*words, "--gpu", "sm90", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told[made][made] for made in ("packages", "graphs", "plans")] == [2, 2, 2]
    assert main([*words, "--gpu", "sm90:1"]) == 5
    captured = capsys.readouterr()
    assert "packages: 2 for sm90:1" in captured.out and "graphs: 2 for sm90:1" in captured.out
    assert "compiling for sm90:1" in captured.err and "running on sm90:1" in captured.err
