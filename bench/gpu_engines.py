"""Engines on one GPU in ten minutes: ONNX Runtime's CUDA provider, AOTInductor, torch.compile and eager PyTorch.

    python bench/gpu_engines.py prepare build/gpu-engines          # here, with diffusers and transformers; 5 MB
    python bench/gpu_engines.py run build/gpu-engines -o OUT       # on the GPU's machine; carry build/gpu-engines there

The GPU's machine needs PyTorch, Triton and this repository, and no diffusers: `prepare` writes the networks of HiTokSR
`full` and of FLUX `mid` as code of PyTorch's operators. Weights are random, and made there. ONNX Runtime is left out,
with the reason, where `onnxruntime-gpu`, `onnx-ir` or `onnx` is not installed. `prepare --tiny`, and then `run --device
cpu --precision float32`, try the script on any machine.

Contenders take turns. Each result is compared with eager PyTorch's. Results name the card; contenders for which no time
is left say so.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.kernels.table import KERNELS

CASES = {  # name -> system, component; presets and sides in px
    "hitoksr generate": ("hitoksr", "generate", {"full": 512, "tiny": 64}),
    "hitoksr decode": ("hitoksr", "decode", {"full": 512, "tiny": 64}),
    "flux step": ("in-token", "step", {"mid": 512, "tiny": 64}),
}
CONTENDERS = ("eager", "compile", "aoti", "ort")
ROUNDS = 5
MINUTES = 9.0
RESERVE_S = 30.0  # for the rounds of a case
Run = Callable[[], Any]


def prepare(folder: Path, *, tiny: bool) -> None:
    """Write each network as code, with the values that it computed and its graph for ONNX Runtime."""
    import onnx_ir as ir

    from tilewright.export.build.request import Request
    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.tidy import tidy
    from tilewright.export.graph.trace import exported_program, network_on_meta, trace
    from tilewright.export.system import part_of

    folder.mkdir(parents=True, exist_ok=True)
    for case, (system, component, sides) in CASES.items():
        preset, side = list(sides.items())[tiny]
        spec = Request(system, preset, folder, seed=0).components[component]
        program = exported_program(spec, network_on_meta(spec))
        module = program.graph_module
        for node in list(module.graph.nodes):  # checks of sizes, which are fixed here
            if node.op == "call_module" or "assert" in str(node.target):
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        module.recompile()
        names: dict[str, dict[str, Any]] = {kind: {} for kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")}
        for each in program.graph_signature.input_specs:
            if each.kind.name in names:
                names[each.kind.name][each.arg.name] = each.target
        parameters = {arg: list(program.state_dict[name].shape) for arg, name in names["PARAMETER"].items()}
        computed = names["BUFFER"] | names["CONSTANT_TENSOR"]
        constants = {arg: program.constants.get(n, program.state_dict.get(n)) for arg, n in computed.items()}

        def size(d: int | str, spec: Any = spec, side: int = side) -> int:
            if isinstance(d, int):
                return d
            whole, part = part_of(d)
            return (side // spec.px[whole] if whole in spec.px else 1) // part

        inputs = {name: [[size(d) for d in t.shape], t.dtype] for name, t in spec.inputs.items()}
        model = trace(spec)
        inline(model)
        tidy(model)
        ir.save(model, folder / f"{case}.onnx")
        document = {"code": module.code, "parameters": parameters, "inputs": inputs, "names": names["PARAMETER"]}
        (folder / f"{case}.json").write_text(json.dumps(document | {"preset": preset, "side": side}))
        torch.save(constants, folder / f"{case}.pt")


class Network(nn.Module):
    """A network from its code, with random weights."""

    def __init__(self, folder: Path, case: str, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        document = json.loads((folder / f"{case}.json").read_text())
        self.device, self.dtype, self.names = device, dtype, document["names"]
        scope = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
        exec(document["code"], scope)
        self.code = scope["forward"]
        random = torch.Generator(device).manual_seed(0)
        for name, shape in document["parameters"].items():
            scale = (math.prod(shape[1:]) or 1) ** -0.5 if len(shape) > 1 else 0.02
            values = torch.randn(shape, generator=random, device=device).mul_(scale)
            if len(shape) == 1 and not name.endswith("bias"):
                values += 1
            self.register_parameter(name, nn.Parameter(values.to(dtype), requires_grad=False))
        for name, value in torch.load(folder / f"{case}.pt").items():
            self.register_buffer(name, value.to(device))
        self.inputs = {
            name: torch.rand(shape, generator=random, device=device)
            if kind == "float32"
            else torch.zeros(shape, dtype=getattr(torch, kind), device=device)
            for name, (shape, kind) in document["inputs"].items()
        }

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Its outputs as float32 or integers."""
        tensors = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False)) | inputs
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            results = self.code(self, **tensors)
        return tuple(r.float() if r.is_floating_point() else r for r in results)


def eager(network: Network, folder: Path, case: str) -> Run:
    return lambda: network(**network.inputs)


def compiled(network: Network, folder: Path, case: str) -> Run:
    run = torch.compile(network, fullgraph=True, dynamic=False)
    return lambda: run(**network.inputs)


def aoti(network: Network, folder: Path, case: str) -> Run:
    program = torch.export.export(network, (), network.inputs, strict=False)
    with tempfile.TemporaryDirectory() as place:
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(Path(place) / "network.pt2"),
            inductor_configs={"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True},
        )
        run = torch._inductor.aoti_load_package(package)
    weights = {**program.state_dict, **program.constants}
    run.load_constants(
        {n: weights[n] for n in run.get_constant_fqns()}, check_full_update=True, user_managed=True
    )  # as our engine does
    return lambda: run(**network.inputs)


def ort(network: Network, folder: Path, case: str) -> Run:
    """ONNX Runtime with inputs and outputs in the memory of the device."""
    import onnx_ir as ir
    import onnxruntime

    from tilewright.export.targets.cuda import typed
    from tilewright.runtime.engines.cuda import provider_options

    on_gpu = network.device == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} has no {provider}: pip install onnxruntime-gpu")
    model = ir.load(folder / f"{case}.onnx")
    if network.dtype == torch.bfloat16:
        typed(model, "bfloat16")
    weights = {name: getattr(network, arg).float().cpu().numpy() for arg, name in network.names.items()}
    weights = {name: array for name, array in weights.items() if name in model.graph.initializers}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_external_initializers(
        [*weights], [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    )
    settings = provider_options(torch.cuda.current_stream().cuda_stream, graphs=False) if on_gpu else {}
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=[(provider, settings)])
    binding = session.io_binding()
    for slot in session.get_inputs():
        value = network.inputs[slot.name].contiguous()
        kind = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32"}[value.dtype]
        import numpy as np

        binding.bind_input(slot.name, network.device, 0, np.dtype(kind), tuple(value.shape), value.data_ptr())
    for slot in session.get_outputs():
        binding.bind_output(slot.name, network.device)

    def run() -> tuple[Tensor, ...]:
        session.run_with_iobinding(binding)
        return tuple(torch.from_dlpack(value._ortvalue) for value in binding.get_outputs())

    run.keeps = weights, session  # type: ignore[attr-defined]
    return run


RUNS = dict(zip(CONTENDERS, (eager, compiled, aoti, ort), strict=True))


def wall_ms(run: Run, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(folder: Path, case: str, device: str, dtype: torch.dtype, left_s: Callable[[], float]) -> dict[str, Any]:
    """Seconds to make each contender, its difference from eager, and the median of its times in turns."""
    from gpu_clock import difference, reason

    network = Network(folder, case, device, dtype).eval()
    result: dict[str, Any] = {"inputs": {name: list(tensor.shape) for name, tensor in network.inputs.items()}}
    runs: dict[str, Run] = {}
    expected: Any = None
    for name, make in RUNS.items():
        if left_s() < RESERVE_S:
            result[name] = {"skipped": "no time is left"}
            continue
        start = time.perf_counter()
        try:
            run = make(network, folder, case)
            value = run()
            expected = value if expected is None else expected
            result[name] = {"made_s": time.perf_counter() - start, "differs": difference(value, expected)}
            runs[name] = run
        except Exception as error:  # each contender fails in its own way, and the others go on
            result[name] = {"skipped": reason(error)}
        print(case, name, result[name], flush=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            times[name].append(wall_ms(run, device))
    for name, each in times.items():
        result[name] |= {"ms": statistics.median(each[1:]), "all_ms": each[1:]}  # the first one warms up
        result[name]["of_eager"] = result[name]["ms"] / result["eager"]["ms"]
    return result


def run(folder: Path, out: Path, device: str, precision: str, minutes: float, only: str) -> None:
    """Measure all cases, and store each result as soon as it is there."""
    end = time.perf_counter() + 60 * minutes
    dtype, results = getattr(torch, precision), {}
    with torch.no_grad(), torch.library._scoped_library("tilewright", "FRAGMENT") as library:
        for op in KERNELS.values():
            if op.kernel_launches:  # choices among close scores stay in float32
                kind = torch.float32 if op.name.startswith("codebook") else dtype
                torch.library.register_autocast(f"tilewright::{op.name}", device, kind, lib=library)
        for case in (name for name in CASES if only in name):
            torch._dynamo.reset()
            results[case] = measure(folder, case, device, dtype, lambda: end - time.perf_counter())
            store_result(out, device, {"precision": precision, "device": device, "cases": results})
            if device == "cuda":
                torch.cuda.empty_cache()


def store_result(out: Path, device: str, result: Any) -> None:
    """Store the result with its hardware and versions."""
    if device == "cuda":
        from gpu_clock import store

        store(out, "gpu_engines", result)
        return
    from tilewright.runtime.profile import hardware

    out.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware(), "versions": {"torch": torch.__version__}, "result": result}
    (out / "gpu_engines.cpu.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", default="", help="cases with this word in their name")
    parser.add_argument("--tiny", action="store_true", help="with prepare: tiny networks")
    arguments = parser.parse_args(words)
    if arguments.verb == "prepare":
        prepare(arguments.folder, tiny=arguments.tiny)
    else:
        run(arguments.folder, arguments.out, arguments.device, arguments.precision, arguments.minutes, arguments.only)


if __name__ == "__main__":
    main()
