"""A folder of cubins for the CUDA ops of ONNX Runtime (native/cuda_ops.cc), which cannot compile kernels themselves.

`manifest.txt` has one line for each cubin. The words before `kernel=` say which call the kernel was compiled for; the
op looks its kernel up by these words, and this command compiles the missing ones:

    op=CodebookNearest arch=90 inputs=float16,float16 G=4 K=4096 D=8 kernel=_codebook_nearest_kernel
    file=codebook_nearest_kernel-....cubin threads=128 shared=4352 parameters=ppipp scratch=2 BLOCK_M=64

`inputs` are the types of the op's inputs in the order of its face, `-` for one that is left out. `parameters` are
pointers (p) and int32 sizes (i). After them the kernel has `scratch` more pointers that it never reads.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.kernels.ahead import ARCHS, SHARED_LIMIT, Compiled, compiled
from tilewright.kernels.jit import Launch
from tilewright.kernels.table import KERNELS, Op

__all__ = ["MANIFEST", "launch_for", "main", "words_of", "write"]

MANIFEST, HEADER = "manifest.txt", "tilewright cubins 1"
ROWS = 16  # kernels are compiled for any number of rows
TYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
FACES = {op.face.name: op for op in KERNELS.values() if op.face is not None}
Words = dict[str, Any]


def _qkv_norm_rope(w: Words) -> list[tuple[int, ...]]:
    out = w["HEADS"] * w["D"]
    term = (1, ROWS, out) if w["H_ROWS"] else (out,)
    x, c, table = (1, ROWS, w["X"]), (1, ROWS, w["C"]), (ROWS, w["D"] // 2)
    return [x, c, *[(out, w["X"] + w["C"])] * 3, *[term] * 3, *[(w["D"],)] * 2, *[table] * 2]


# op -> the sizes that its kernel is compiled for, and the shapes of its inputs for these sizes
SHAPES: dict[str, tuple[tuple[str, ...], Callable[[Words], list[tuple[int, ...]]]]] = {
    "ConcatProject": (
        ("X", "C", "K", "OUT", "H_ROWS"),
        lambda w: [
            (1, ROWS, w["X"]),
            (1, ROWS, w["C"]),
            (w["OUT"], w["K"]),
            (1, ROWS, w["OUT"]) if w["H_ROWS"] else (w["OUT"],),
        ],
    ),
    "QkvNormRope": (("X", "C", "HEADS", "D", "EPSILON", "INTERLEAVED", "H_ROWS"), _qkv_norm_rope),
    "JointAttention": (("HEADS", "D"), lambda w: [(1, w["HEADS"], ROWS, w["D"])] * 6),
    "CodebookNearest": (("G", "K", "D"), lambda w: [(ROWS, w["G"] * w["D"]), (w["G"], w["K"], w["D"])]),
    "CodebookFromLogits": (("G", "K", "D"), lambda w: [(ROWS, w["G"] * w["K"]), (w["G"], w["K"], w["D"])]),
    "CodebookFromHidden": (
        ("C", "G", "K", "D"),
        lambda w: [(ROWS, w["C"]), (w["G"] * w["K"], w["C"]), (w["G"] * w["K"],), (w["G"], w["K"], w["D"])],
    ),
}


def words_of(op: Op, arguments: Sequence[Any], options: Words, arch: int) -> str:
    """The words in the manifest for a call of the op. Tensors may be on the meta device."""
    assert op.face is not None
    tensors = [*arguments, *[None] * (len(op.face.inputs) - len(arguments))]
    inputs = ",".join("-" if a is None else str(a.dtype).removeprefix("torch.") for a in tensors)
    constants = _only_launch(op, arguments, options, arch).constants
    sizes = " ".join(f"{name}={_number(constants[name])}" for name in SHAPES[op.face.name][0])
    return f"op={op.face.name} arch={arch} inputs={inputs} {sizes}"


def launch_for(words: str) -> tuple[Launch, int]:
    """The launch and the architecture for these words of a manifest."""
    w = _parsed(words)
    op, inputs = FACES[w["op"]], w["inputs"].split(",")
    shapes = SHAPES[w["op"]][1](w)
    if len(inputs) != len(shapes) or set(inputs) - {*TYPES, "-"}:
        raise ValueError(f"inputs={w['inputs']}: {w['op']} has {len(shapes)}, each one of {', '.join(TYPES)} or -")
    assert op.face is not None
    for name, kind in zip(op.face.inputs, inputs, strict=True):
        if kind == "-" and not name.endswith("?"):
            raise ValueError(f"inputs={w['inputs']}: {name} of {w['op']} cannot be left out")
    arguments = [
        None if kind == "-" else torch.empty(shape, dtype=TYPES[kind], device="meta")
        for kind, shape in zip(inputs, shapes, strict=True)
    ]
    options: Words = {}
    if "HEADS" in w:
        if w["D"] < 16 or w["D"] & (w["D"] - 1):
            raise ValueError(f"D={w['D']}: heads must be a power of two and at least 16 wide; give the graph its body")
        if "EPSILON" in w:
            options = {"heads": w["HEADS"], "epsilon": w["EPSILON"], "interleaved": bool(w["INTERLEAVED"])}
    return _only_launch(op, arguments, options, w["arch"]), w["arch"]


def write(folder: Path, calls: Iterable[str], progress: Callable[[str], Any] = lambda line: None) -> None:
    """Add cubins to a folder. Every file is complete at every moment, and the manifest names only existing files."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    lines = manifest.read_text().splitlines() if manifest.exists() else [HEADER]
    if lines[:1] != [HEADER]:
        raise ValueError(f"{manifest} does not begin with '{HEADER}': write to an empty folder")
    entries = {line.split(" kernel=")[0]: line for line in lines[1:]}
    for words in dict.fromkeys(calls):
        launch, arch = launch_for(words)
        kernel = compiled(launch, arch)
        if kernel.shared > SHARED_LIMIT[arch]:
            raise ValueError(f"{words}: needs {kernel.shared} bytes of shared memory, a block has {SHARED_LIMIT[arch]}")
        name = f"{kernel.name.strip('_')}-{hashlib.sha256(kernel.asm['cubin']).hexdigest()[:16]}.cubin"
        _replace(folder / name, kernel.asm["cubin"])
        entries[words] = f"{words} {_facts(launch, kernel, name)}"
        _replace(manifest, "".join(f"{line}\n" for line in [HEADER, *sorted(entries.values())]).encode())
        progress(entries[words])


def _meta_tensor(usual: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or usual, device="meta")


def _only_launch(op: Op, arguments: Iterable[Any], options: Words, arch: int) -> Launch:
    assert op.kernel_launches is not None
    if op.name == "codebook_from_hidden":
        options = options | {"shares": 1}  # more shares would need a second kernel and memory for scores
    (launch,), _ = op.kernel_launches(*arguments, **options, arch=arch)
    return launch


def _facts(launch: Launch, kernel: Compiled, file: str) -> str:
    kinds = "".join("i" if isinstance(launch.arguments[name], int) else "p" for name in kernel.parameters)
    entry = re.search(rf"\.entry {kernel.name}\((.*?)\)", kernel.asm["ptx"], re.DOTALL)
    assert entry is not None, kernel.name
    scratch = entry[1].count(".param") - len(kinds)
    blocks = " ".join(f"{name}={launch.constants[name]}" for name in ("BLOCK_M", "BLOCK_O") if name in launch.constants)
    return (
        f"kernel={kernel.name} file={file} threads={kernel.threads} shared={kernel.shared} "
        f"parameters={kinds} scratch={scratch} {blocks}"
    )


def _number(value: Any) -> str:
    """A number as text: integers and truth values as integers, floats with the nine digits that float32 needs."""
    return f"{np.float32(value):.9g}" if isinstance(value, float) else str(int(value))


def _parsed(words: str) -> Words:
    w: Words = dict(word.split("=", 1) for word in words.split() if "=" in word)
    if w.get("op") not in SHAPES:
        raise ValueError(f"'{words}': write op=... first, one of {', '.join(SHAPES)}")
    expected = ["op", "arch", "inputs", *SHAPES[w["op"]][0]]
    if words != " ".join(f"{name}={w.get(name)}" for name in expected):
        raise ValueError(f"'{words}': the words of {w['op']} are, in this order, {' '.join(expected)}")
    try:
        w |= {name: int(w[name]) for name in expected if name not in ("op", "inputs", "EPSILON")}
        w |= {"EPSILON": float(w["EPSILON"])} if "EPSILON" in w else {}
    except ValueError:
        raise ValueError(f"'{words}': sizes are integers") from None
    if w["arch"] not in ARCHS:
        raise ValueError(f"arch={w['arch']}: kernels are made for {', '.join(map(str, ARCHS))}")
    return w


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tilewright.kernels.cubins", description=__doc__.split("\n")[0])
    parser.add_argument("-o", dest="folder", type=Path, required=True, help="folder to add the cubins to")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="compute capabilities")
    parser.add_argument("--type", nargs="+", choices=TYPES, default=["float16", "bfloat16"])
    names = sorted({case for op in FACES.values() for case in op.cases})
    parser.add_argument("--case", nargs="+", choices=names, help="published sizes (default: all but small)")
    parser.add_argument("words", nargs="*", help="other calls: 'op=CodebookNearest arch=90 inputs=float16,float16 ...'")
    options = parser.parse_args(arguments)
    chosen = options.case or [case for case in names if case != "small"]
    samples = [
        (op, op.cases[case](partial(_meta_tensor, TYPES[kind])))
        for op in FACES.values()
        for case in op.cases
        if case in chosen
        for kind in options.type
    ]
    calls = options.words or [
        words_of(op, arguments, attributes, arch) for op, (arguments, attributes) in samples for arch in options.arch
    ]
    try:
        write(options.folder, calls, lambda line: print(line, file=sys.stderr))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
