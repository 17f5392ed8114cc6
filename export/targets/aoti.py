"""Packages of AOTInductor: machine code that PyTorch makes of a network for this machine. They hold no weights.

A package is made from the exported program, not from the portable graph. It runs with the version of PyTorch that made
it, on the kind of CPU or GPU that made it.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from tilewright.export.system import ComponentSpec
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.digests import cache_dir, writing
from tilewright.runtime.bundle.manifest import EngineSpec, Form, Memory, Needs
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.engines.aoti import SIZES
from tilewright.runtime.engines.choose import Machine
from tilewright.runtime.engines.machine import compute_capability, this_machine
from tilewright.runtime.errors import BuildError

__all__ = [
    "COMPILED",
    "FORMS",
    "FROM_BUNDLE",
    "PRECISIONS",
    "architecture",
    "compile_network",
    "file",
    "machine",
    "missing",
    "prepare",
    "spec",
]

FROM_BUNDLE = True
COMPILED = True
PRECISIONS = ("float32", "bfloat16")
FORMS: dict[str, tuple[Form, ...]] = {}
# instruction sets that a C++ compiler uses when it may use all of this CPU's
INSTRUCTIONS = re.compile(
    r"sse4_2|avx\w*|amx\w*|fma|f16c|bmi[12]|abm|movbe|popcnt|gfni|sve\w*|asimd\w*|bf16|i8mm|atomics"
)
LARGEST_KEPT = 2 * 10**9  # bytes of the weights of a program that failed, which is kept with other numbers in them
CHOICES = "codebook"  # these ops choose among close scores: they compute in float32, also in networks in bfloat16
SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # small weights would become numbers in the code
    "cpp.dynamic_threads": True,  # else the number of threads of this process
}


def file(precision: str) -> str:
    """The name of an engine's file."""
    return f"{precision}.pt2"


def prepare(model: Any) -> bool:
    """Nothing: packages are not made from graphs."""
    return False


def device() -> str:
    """The device for which packages are made here: the GPU, if PyTorch can use one."""
    return "cuda" if compute_capability() else "cpu"


def architecture() -> str:
    """The kind of device for which packages are made here: cpu, or sm90 for a GPU of compute capability 9.0."""
    capability = compute_capability()
    return "sm{}{}".format(*capability) if capability else "cpu"


def _compiled(here: Machine) -> tuple[str, ...]:
    return tuple(name for name in here.instructions if INSTRUCTIONS.fullmatch(name))


def missing() -> str | None:
    """What this machine lacks to make packages, or none."""
    if importlib.util.find_spec("torch") is None:
        return "target 'aoti' needs PyTorch: pip install 'tilewright[export]'"
    from torch._inductor import config

    named = [name for name in config.cpp.cxx if name]  # CXX, or g++
    if not any(shutil.which(name) for name in named):
        return f"target 'aoti' needs a C++ compiler, and {named[0]!r} is none: install g++, or name one with CXX"
    return None


def machine() -> dict[str, str]:
    """The parts of this machine that a package depends on, for the key of a stage."""
    from torch._inductor import config

    here = this_machine(["torch", "triton"])
    return {
        **{f"version {package}": here.packages.get(package, "none") for package in ("torch", "triton")},
        "compiler": str(config.cpp.cxx),
        "device": device(),
        "instructions": " ".join(_compiled(here)),
        "compute capability": str(here.compute_capability),
    }


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of the engine."""
    here, place = this_machine(), device()
    versions = {"torch": here.packages["torch"].partition("+")[0]}
    needs = Needs(_compiled(here) if place == "cpu" else (), here.compute_capability, versions, exactly=True)
    files = (graph, f"{graph.removesuffix('.pt2')}.safetensors")
    return EngineSpec(f"aoti-{precision}", "aoti", place, precision, files, needs, memory=memory)


def compile_network(
    source: ComponentSpec, stored: Mapping[str, str], precision: str, folder: Path, what: str = "the network"
) -> None:
    """Write a component's package, and the constants that its network computes, into a folder.

    `stored`: the type in which each weight is stored; `what`: the component in a complaint.
    """
    import torch

    from tilewright.export.graph.trace import exported_program, network_on_meta, quiet, sizes_of

    network = network_on_meta(source)
    if precision != "float32":
        _compute_in(network, getattr(torch, precision))
    metadata = {
        SIZES: json.dumps(sizes_of(source)),
        "outputs": json.dumps(list(source.outputs)),
        "types": json.dumps({name: spec.dtype for name, spec in source.inputs.items()}),
    }
    package = folder / file(precision)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet("torch._inductor", "torch.export", "torch._functorch"), torch.no_grad(), _ops_in(precision):
        program = exported_program(source, network)
        _store_as(program, stored)
        if device() == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, "cuda")
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=SETTINGS | {"aot_inductor.metadata": metadata}
            )
        except Exception as error:  # PyTorch and the compiler raise errors of any type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            refusal = BuildError(f"target 'aoti' cannot compile {what} ({reason}); see --verbose")
            refusal.repeat = _repeat(program, f"{what}.{precision}")
            raise refusal from error
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
        computed = {name: _constant(program, name) for name in sorted(loader.get_constant_fqns()) if name not in stored}
    specs = {name: TensorSpec(str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in computed.items()}
    data = (tensor.numpy().tobytes() for tensor in computed.values())
    write_tensors(package.with_suffix(".safetensors"), specs, data, "computed by the network")


def _repeat(program: Any, name: str) -> tuple[str, ...]:
    """The command that compiles a program again, without its weights' values; none if the weights are large."""
    import torch

    if sum(tensor.nbytes for tensor in program.state_dict.values()) > LARGEST_KEPT:
        return ()
    file = cache_dir() / "aoti" / "failed" / f"{name}.pt2"
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as temporary:
        torch.export.save(program, temporary)
    ours = any(str(node.target).startswith("tilewright.") for node in program.graph.nodes)
    code = (
        f"import torch{', tilewright.kernels.table' * ours};"  # which makes our operators known
        f" torch._inductor.aoti_compile_and_package(torch.export.load({str(file)!r}), package_path='again.pt2',"
        f" inductor_configs={SETTINGS})"
    )
    return (shlex.join(["python", "-c", code]),)


def _constant(program: Any, name: str) -> Any:
    """The value of a constant that the network computes."""
    value = program.constants.get(name, program.state_dict.get(name))
    if value is None or name in program.graph_signature.parameters:
        raise BuildError(f"package of AOTInductor reads {name!r}, which is no weight and no constant of the network")
    return value.detach().cpu().contiguous()


def _store_as(program: Any, stored: Mapping[str, str]) -> None:
    """Give each parameter memory that nobody fills, in the type in which it is stored, and cast it where it is read."""
    import torch
    from torch.export.graph_signature import InputKind

    graph = program.graph
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    last = list(nodes.values())[-1]
    mode = last.meta["val"].fake_mode
    for each in program.graph_signature.input_specs:
        if each.kind is not InputKind.PARAMETER:
            continue
        node = nodes[each.arg.name]
        before = node.meta["val"]
        dtype = getattr(torch, stored.get(each.target, "float32"))
        program.state_dict[each.target] = torch.nn.Parameter(torch.empty(before.shape, dtype=dtype), False)
        if dtype == before.dtype:
            continue
        with mode:
            node.meta["val"] = torch.empty(before.shape, dtype=dtype)
        with graph.inserting_after(last):
            cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": before.dtype})
        cast.meta["val"] = before
        node.replace_all_uses_with(cast, lambda user, cast=cast: user is not cast)
    program.graph_module.recompile()


def _compute_in(network: Any, dtype: Any) -> None:
    """Let a network multiply in a type, as PyTorch's autocast does: angles, norms and sums stay in float32."""
    import torch

    inner = network.forward

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device(), dtype):
            results = inner(*args, **kwargs)
        whole = results if isinstance(results, tuple) else (results,)
        whole = tuple(r.float() if r.is_floating_point() else r for r in whole)
        return whole if isinstance(results, tuple) else whole[0]

    network.forward = forward


@contextlib.contextmanager
def _ops_in(precision: str) -> Iterator[None]:
    """Tell autocast in which type our ops compute."""
    import torch

    from tilewright.kernels.table import KERNELS

    if precision == "float32":
        yield
        return
    with torch.library._scoped_library("tilewright", "FRAGMENT") as library:
        for name in (op.name for op in KERNELS.values() if op.kernel_launches):  # not compositions of others
            short = device() == "cuda" and not name.startswith(CHOICES)
            dtype = getattr(torch, precision) if short else torch.float32
            torch.library.register_autocast(f"tilewright::{name}", device(), dtype, lib=library)
        yield
