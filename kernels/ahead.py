"""Compiling kernels ahead of time, without a GPU: PTX and cubins of the same launches that run in PyTorch."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.jit import INTERPRETED, Launch, triton

__all__ = ["AMD", "ARCHS", "SHARED_LIMIT", "Compiled", "Resources", "compiled", "resources"]

ARCHS, AMD = (80, 86, 89, 90, 100, 120), "gfx942"
SHARED_LIMIT: dict[int | str, int] = {  # bytes a block
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, AMD: 65_536
}  # fmt: skip
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
}
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|QGMMA|QMMA|UTCHMMA|UTCQMMA|OMMA)\b")
MATRIX_CORE = re.compile(r"\bv_(mfma|smfmac|wmma)_")  # AMD's tensor cores


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture. Its parameters are the launch's arguments that are not none, in their order."""

    name: str
    arch: int | str
    parameters: tuple[str, ...]
    threads: int
    shared: int  # bytes of dynamic shared memory
    asm: dict[str, Any]  # "ptx" and "cubin", or "amdgcn" and "hsaco"


def compiled(launch: Launch, arch: int | str, **options: Any) -> Compiled:
    """Compile for a compute capability (90) or an AMD target ("gfx942"). Tensors may be on the meta device."""
    if triton is None:
        raise RuntimeError("kernels are compiled by Triton, which is not installed: pip install 'triton>=3.6'")
    if INTERPRETED:
        raise RuntimeError("this process interprets kernels (TRITON_INTERPRET=1); compile in a process without it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    values = launch.arguments | launch.constants
    signature = {name: _type(launch.arguments.get(name)) for name in names}
    constants = {(i,): values[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    # every allocator aligns to 16 bytes; without this hint, loads are only 2 bytes wide
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attrs: Any = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    wave = 64 if isinstance(arch, str) else 32
    binary = triton.compile(
        source,
        target=target,
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True} | options,
    )
    data = binary.metadata
    if getattr(data, "global_scratch_size", 0) or getattr(data, "profile_scratch_size", 0) or data.num_ctas != 1:
        raise RuntimeError(f"{data.name} needs scratch memory or clusters, which a plain launch does not provide")
    parameters = tuple(name for name in names if signature[name] != "constexpr")
    return Compiled(data.name, arch, parameters, wave * data.num_warps, data.shared, dict(binary.asm))


def _type(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype]
    return "constexpr" if argument is None else "i32"


@dataclass(frozen=True)
class Resources:
    """The resources of a multiprocessor that machine code uses."""

    registers: int
    shared: int
    spills: int  # stores to local memory
    tensor_core: int  # tensor-core instructions

    def faults(self, arch: int | str, *, multiplies: bool) -> list[str]:
        """The reasons why the kernel may not ship."""
        faults = [] if not self.spills else [f"{self.spills} spills"]
        if self.shared > SHARED_LIMIT[arch]:
            faults.append(f"{self.shared} bytes of shared memory, a block has {SHARED_LIMIT[arch]}")
        if multiplies and not self.tensor_core:
            faults.append("no tensor-core instruction")
        return faults


def resources(kernel: Compiled) -> Resources:
    """Read resources from the machine code; NVIDIA's disassemblers come with Triton."""
    if isinstance(kernel.arch, str):
        return _resources_of_amd(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    counted = Counter(re.findall(r"\b(STL|LDL)\b", code))
    return Resources(int(registers[1]), kernel.shared, counted["STL"], len(TENSOR_CORE.findall(code)))


def _resources_of_amd(kernel: Compiled) -> Resources:
    code = kernel.asm["amdgcn"]
    registers, spills = (re.search(rf"\.vgpr_{what}:\s+(\d+)", code) for what in ("count", "spill_count"))
    assert registers is not None and spills is not None, kernel.name
    return Resources(int(registers[1]), kernel.shared, int(spills[1]), len(MATRIX_CORE.findall(code)))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
