"""Writing a folder that any ONNX tool opens: graphs and copies of weights. Tools refuse links and paths outside."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tilewright.export.new_folder import new_folder
from tilewright.export.weights.files import WeightReader, open_reference
from tilewright.export.weights.writing import WIDTHS, write_tensors
from tilewright.runtime.bundle.external_data import external_data, relocated
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.bundle.weights import Reference, location
from tilewright.runtime.errors import UsageError

__all__ = ["onnx_folder"]

ALIGNMENT = 64  # folded weights begin at multiples of so many bytes
Places = dict[str, tuple[str, int, int]]  # initializer -> location, offset, length


class _Counted:
    """Counts and reports written bytes."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self.total, self.report, self.done = total, report, 0

    def add(self, size: int) -> None:
        self.done += size
        self.report(min(self.done, self.total), self.total)


def onnx_folder(
    root: Path,
    out: Path,
    *,
    component: str | None = None,
    fold: bool = False,
    weights_dir: Path | None = None,
    expect: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the graphs of a bundle, or of one component, with their weights; returns a report.

    With `fold` our ops become standard operators, and every transposed, cut or cast weight becomes an initializer.
    """
    bundle = read_bundle(root, expect=expect)
    names = sorted(bundle.manifest.components) if component is None else [component]
    if unknown := set(names) - bundle.manifest.components.keys():
        listed = ", ".join(sorted(bundle.manifest.components))
        raise UsageError(f"--component {one_line(unknown.pop())!r} is not in {root}; there are {listed}")
    read = {name: _read(bundle, name) for name in names}
    out, counted = out.resolve(), _Counted(_size(read, fold), on_bytes)
    with new_folder(out, counted.total) as folder:
        names_of_folders = sorted({r.folder for references in read.values() for r in references.values()})
        folders = {n: bundle.folder(n, weights_dir) for n in names_of_folders}
        if fold:
            folded = _fold(bundle, read, folders, folder, counted)
        else:
            folded = 0
            places = _copy(read, folders, folder, counted)
            for name in names:
                graph = bundle.path(bundle.manifest.components[name].graph).read_bytes()
                (folder / f"{name}.onnx").write_bytes(relocated(graph, places[name]))
        sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    return {
        "folder": str(out),
        "graphs": [f"{name}.onnx" for name in names],
        "files": dict(sorted(sizes.items())),
        "folded": folded,
    }


def _read(bundle: Bundle, component: str) -> dict[str, Reference]:
    """The weights that a component's portable graph reads."""
    path = bundle.path(bundle.manifest.components[component].graph)
    return {name: bundle.weights.tensors[component][name] for name in external_data(path.read_bytes(), str(path))}


def _size(read: Mapping[str, Mapping[str, Reference]], fold: bool) -> int:
    """The bytes to write. Folded weights may be wider than in their files, up to float32."""
    if fold:
        wide = WIDTHS["float32"]
        return sum(
            max(1, wide // WIDTHS[r.dtype]) * r.length for references in read.values() for r in references.values()
        )
    return sum(
        {(r.folder, r.file, r.offset): r.length for references in read.values() for r in references.values()}.values()
    )


def _copy(
    read: Mapping[str, Mapping[str, Reference]], folders: Mapping[str, Path], out: Path, counted: _Counted
) -> dict[str, Places]:
    """Copy all tensors that are read into files of the same names; returns the new place of every initializer."""
    used: dict[tuple[str, str], list[Reference]] = {}
    for references in read.values():
        for r in references.values():
            used.setdefault((r.folder, r.file), []).append(r)
    shifts: dict[str, Callable[[int], int]] = {}
    for (folder, file), in_file in sorted(used.items()):
        path = out / location(in_file[0])
        shifts[location(in_file[0])] = _copy_file(folders[folder] / file, in_file, path, counted)
    return {
        name: {n: (location(r), shifts[location(r)](r.offset), r.length) for n, r in references.items()}
        for name, references in read.items()
    }


def _copy_file(source: Path, references: list[Reference], path: Path, counted: _Counted) -> Callable[[int], int]:
    """Copy the tensors of one file that these references need; returns a function from old to new offsets."""
    header = dict(sorted(safetensors_header(source).items(), key=lambda item: item[1][1]))
    starts, keys = [offset for _, offset, _ in header.values()], list(header)

    def key_at(offset: int) -> str:
        return keys[bisect_right(starts, offset) - 1]

    needed = {key: header[key] for key in sorted({key_at(r.offset) for r in references})}

    def tensors() -> Iterator[bytes]:
        for spec, offset, length in needed.values():
            yield open_reference(source.parent, Reference(source.name, spec.dtype, (), offset, length)).tobytes()
            counted.add(length)

    write_tensors(path, {key: spec for key, (spec, _, _) in needed.items()}, tensors(), "copied by tilewright")
    copied = safetensors_header(path)
    return lambda offset: copied[key_at(offset)][1] + offset - header[key_at(offset)][1]


def _fold(
    bundle: Bundle,
    read: Mapping[str, Mapping[str, Reference]],
    folders: Mapping[str, Path],
    out: Path,
    counted: _Counted,
) -> int:
    """Write graphs whose weights are all plain initializers; returns the number of folded weights."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.rewrites.fold import fold
    from tilewright.export.graph.rewrites.fold_weights import fold_weights
    from tilewright.export.graph.rewrites.forget_shapes import forget_shapes

    (out / "folded").mkdir()
    models, unfolded, folded = {}, {}, 0
    for name, references in read.items():
        model = models[name] = ir.load(bundle.path(bundle.manifest.components[name].graph))
        inline(model)
        ShapeInferencePass(data_prop=True)(model)  # some weights are cut to sizes that only shapes tell
        fold(model)
        data = out / "folded" / f"{name}.data"
        with data.open("wb") as stream:
            folded += fold_weights(
                model, WeightReader(references, folders), _Writer(stream, f"folded/{name}.data", counted)
            )
        if not data.stat().st_size:
            data.unlink()
        unfolded[name] = {n: r for n, r in references.items() if n in model.graph.initializers}
    if not any((out / "folded").iterdir()):
        (out / "folded").rmdir()
    places = _copy(unfolded, folders, out, counted)
    for name, model in models.items():
        for initializer, place in places[name].items():
            value: Any = model.graph.initializers[initializer]
            tensor = value.const_value
            value.const_value = ir.ExternalTensor(*place, tensor.dtype, shape=tensor.shape, name=initializer)
        forget_shapes(model)
        ir.save(model, out / f"{name}.onnx")
    return folded


class _Writer:
    """Writes arrays one after the other into a file of external data."""

    def __init__(self, stream: BinaryIO, place: str, counted: _Counted) -> None:
        self.stream, self.place, self.counted = stream, place, counted

    def __call__(self, name: str, array: npt.NDArray[Any]) -> Any:
        import onnx_ir as ir

        self.stream.write(bytes(-self.stream.tell() % ALIGNMENT))
        offset = self.stream.tell()
        self.stream.write(array.view(np.uint8).reshape(-1).data if array.ndim else array.tobytes())
        self.counted.add(array.nbytes)
        dtype = ir.DataType.from_numpy(array.dtype)
        return ir.ExternalTensor(self.place, offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name)
