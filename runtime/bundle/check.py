"""Checking that a program can run on its components: names, scopes, shapes and types. Nothing is run."""

import re
from collections.abc import Mapping
from typing import TypeVar

from tilewright.runtime.bundle.arguments import check_arguments
from tilewright.runtime.bundle.program import (
    ANY,
    DTYPES,
    SCHEDULE_TABLES,
    Call,
    Input,
    Pass,
    Program,
    Signature,
    State,
    TensorSpec,
    Tiles,
    untiled_values,
)
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import BundleError

__all__ = ["check_program"]

T = TypeVar("T")


def check_program(program: Program, components: Mapping[str, Signature], constants: Mapping[str, TensorSpec]) -> None:
    """Refuse a program that cannot run on these components. The message names the part that is wrong."""
    try:
        _check(program, components, constants)
    except BundleError as error:
        raise BundleError(one_line(str(error))) from None


def _check(program: Program, components: Mapping[str, Signature], constants: Mapping[str, TensorSpec]) -> None:
    _check_grids(program)
    for name, spec in program.inputs.items():
        _check_input(name, spec, constants)
    _check_texts(program)
    check_arguments(program)
    scope = _Scope(program, components, constants)
    for p in program.passes:
        scope.enter(p)
        for section, position, call in p.calls():
            scope.call(section, f"pass {p.name!r}, {section}[{position}] runs {call.run!r}", call)
        scope.leave()
    values = dict.fromkeys(
        [*program.inputs, *(untiled_values(program) & scope.job.keys())]
    )  # values that a caller may give instead of computing them
    for argument, file in program.files.items():
        if argument in program.inputs:
            raise BundleError(f"program: file {argument!r}: the name is taken; give every argument its own")
        for name in file.tensors.values():
            _look_up(values, name, f"program: file {argument!r}: no input or value {name!r}")
    if "result" not in scope.written:
        raise BundleError("program: no pass writes the grid 'result'; add the call that makes it")


def _check_grids(program: Program) -> None:
    for name, init in (("image", "input"), ("result", "none")):
        grid = program.grids.get(name)
        if grid is None or (grid.px, grid.channels, grid.init) != (1, 3, init):
            raise BundleError(f"program: grid {name!r} must be there with px 1, channels 3, init {init}; found {grid}")
    for name, grid in program.grids.items():
        _check_name(f"program: grid {name!r}", name)
        if program.multiple_px % grid.px:
            raise BundleError(f"program: grid {name!r}: px {grid.px} does not divide multiple_px {program.multiple_px}")
        if grid.init == "input" and name != "image":
            raise BundleError(f"program: grid {name!r}: only 'image' is an input; use init none, zeros or noise")


def _check_name(where: str, name: str) -> None:
    if not name.isidentifier():
        raise BundleError(f"{where}: a place is named by letters, digits and underscores")


def _check_input(name: str, spec: Input, constants: Mapping[str, TensorSpec]) -> None:
    where = f"program: input {name!r}"
    if spec.dtype not in DTYPES:
        raise BundleError(f"{where}: dtype {spec.dtype!r} is not one of {', '.join(DTYPES)}")
    if spec.shape and spec.shape[0] != 1:
        raise BundleError(f"{where}: shape {list(spec.shape)} is not one row; begin it with 1")
    if isinstance(spec.default, str):
        constant = constants.get(spec.default[1:]) if spec.default.startswith("#") else None
        if constant != spec.spec:
            raise BundleError(f"{where}: default {spec.default!r} is no constant of that type and shape")
    elif spec.default is not None and spec.shape:
        raise BundleError(f"{where}: the number {spec.default} cannot fill {list(spec.shape)}; name a #constant")
    elif isinstance(spec.default, float) and "float" not in spec.dtype:
        raise BundleError(f"{where}: default {spec.default} is no {spec.dtype}")
    if spec.choices and spec.default is not None and spec.default not in spec.choices.values():
        raise BundleError(f"{where}: default {spec.default!r} is not among {spec.choices}")


def _check_texts(program: Program) -> None:
    for name, text in program.texts.items():
        for target in text.ids:
            spec = program.inputs.get(target)
            fits = spec is not None and spec.dtype == "int64" and len(spec.shape) == 2 and spec.shape[0] == 1
            if name in program.inputs or not fits:
                raise BundleError(f"program: text {name!r}: {target!r} is no input of int64 ids [1, length]")


class _Scope:
    """The names that exist at a point of a program, with their types and shapes."""

    def __init__(
        self, program: Program, components: Mapping[str, Signature], constants: Mapping[str, TensorSpec]
    ) -> None:
        self.program, self.components, self.constants = program, components, dict(constants)
        self.job: dict[str, TensorSpec] = {}
        self.tile: dict[str, TensorSpec] = {}
        self.tile_values: dict[Tiles, dict[str, TensorSpec]] = {}  # values of the tiles of earlier passes
        self.written: set[str] = set()
        self.pass_names: set[str] = set()

    def enter(self, p: Pass) -> None:
        """Check a pass and add its state."""
        where = f"program: pass {p.name!r}"
        if p.name in self.pass_names:
            raise BundleError(f"{where}: the name is taken; give every pass its own")
        if p.each and p.steps is None:
            raise BundleError(f"{where}: 'each' needs 'steps'; give a schedule")
        if (p.last or p.state) and p.steps is None:
            raise BundleError(f"{where}: 'last' and 'state' need 'steps'; use 'once'")
        if not (p.once or p.each):
            raise BundleError(f"{where}: makes no call; remove it")
        if p.tiles and (p.tiles.px % self.program.multiple_px or p.tiles.overlap_px % self.program.multiple_px):
            raise BundleError(
                f"{where}: tiles of {p.tiles.px} px overlapping by {p.tiles.overlap_px} px"
                f" must be multiples of multiple_px {self.program.multiple_px}"
            )
        self.pass_names.add(p.name)
        self.now, self.fresh = p, set[str]()
        self.joined = bool(p.writes("each") & self.program.grids.keys())
        self.tile = dict(self.tile_values.get(p.tiles, {})) if p.tiles else {}
        for name, state in p.state.items():
            self._check_state(where, name, state)
            self.tile[name] = TensorSpec("float32", ("batch", *state.shape))

    def _check_state(self, where: str, name: str, state: State) -> None:
        _check_name(f"{where}: state {name!r}", name)
        if name in self.program.grids or name in self.job or name in self.tile:
            raise BundleError(f"{where}: state {name!r} hides a grid or a value; rename it")
        for dim in state.shape:
            if isinstance(dim, str) and self.program.multiple_px % int(dim[2:]):
                raise BundleError(
                    f"{where}: state {name!r}: {dim!r} does not divide multiple_px {self.program.multiple_px}"
                )

    def leave(self) -> None:
        """End a pass: keep what it wrote to grids and to the job, and the values of its tiles."""
        self.written |= self.fresh
        if self.now.tiles is None:
            self.job |= {k: v for k, v in self.tile.items() if k not in self.now.state}
        else:
            self.tile_values[self.now.tiles] = self.tile

    def call(self, section: str, where: str, call: Call) -> None:
        """Check one call and add its outputs."""
        if call.run not in self.components:
            raise BundleError(f"program: {where}: no such component; there are {', '.join(sorted(self.components))}")
        signature = self.components[call.run]
        if missing := sorted(signature.inputs.keys() - call.inputs.keys()):
            raise BundleError(f"program: {where}: input {missing[0]!r} is missing")
        if unknown := sorted(call.inputs.keys() - signature.inputs.keys()):
            raise BundleError(f"program: {where}: the component has no input {unknown[0]!r}")
        if unknown := sorted(call.outputs.keys() - signature.outputs.keys()):
            raise BundleError(f"program: {where}: the component has no output {unknown[0]!r}")
        shared = section == "once" and call.shared(self.tile.keys() | self.program.grids.keys())
        alone = shared or self.now.tiles is None  # one call for all tiles
        if not call.outputs or len(set(call.outputs.values())) != len(call.outputs):
            raise BundleError(f"program: {where}: outputs {call.outputs} must name at least one place, each once")
        for name, source in call.inputs.items():
            actual, expected = self.source(section, where, source), signature.inputs[name]
            _fit(actual, expected, f"program: {where}: {name} = {source}")
            _check_rows(actual, expected, alone, f"program: {where}: {name} = {source}")
        for name, target in call.outputs.items():
            spec = signature.outputs[name]
            if alone and spec.shape[:1] == ("batch",):
                spec = spec.rows(1)
            self.output(section, f"program: {where}: {name} -> {target}", spec, target, shared)

    def source(self, section: str, where: str, source: str) -> TensorSpec:
        """The type and shape of a source, which is refused if it does not exist."""
        kind, name = (source[:1], source[1:]) if source[:1] in ("@", "#", "$", "~") else ("", source)
        where = f"program: {where}: {source!r}"
        if kind == "@":
            return self.table(section, where, name)
        if kind == "~":
            return self.noise(where, name)
        if kind == "#":
            return _look_up(self.constants, name, f"{where}: no such constant in the bundle")
        if kind == "$":
            spec = _look_up(self.program.inputs, name, f"{where}: the program has no such input")
            return spec.spec
        if name in self.program.grids:
            return self.grid(section, where, name)
        return _look_up(self.tile | self.job, name, f"{where}: nothing of that name is known here")

    def grid(self, section: str, where: str, name: str) -> TensorSpec:
        grid = self.program.grids[name]
        if grid.init == "none" and name not in self.written:
            raise BundleError(f"{where}: the grid is read before any earlier pass writes it")
        if name in self.fresh and not (section == "each" and self.joined):
            raise BundleError(f"{where}: the grid is read in {section} of the pass that writes it; use another grid")
        return TensorSpec("float32", ("batch", grid.channels, f"h/{grid.px}", f"w/{grid.px}"))

    def noise(self, where: str, name: str) -> TensorSpec:
        if name in self.program.grids:
            grid = self.program.grids[name]
            return TensorSpec("float32", ("batch", grid.channels, f"h/{grid.px}", f"w/{grid.px}"))
        state = _look_up(self.now.state, name, f"{where}: noise needs a grid or a state of this pass")
        if len(state.shape) != 3:
            raise BundleError(f"{where}: noise needs a shape of channels, rows, columns, not {list(state.shape)}")
        return TensorSpec("float32", ("batch", *state.shape))

    def table(self, section: str, where: str, name: str) -> TensorSpec:
        if self.now.steps is None:
            raise BundleError(f"{where}: a table needs a pass with steps")
        if name in SCHEDULE_TABLES[self.now.steps.schedule]:
            return TensorSpec("float32", (1,) if section == "each" else (1, "steps"))
        if section != "each":
            raise BundleError(f"{where}: outside 'each' only a schedule's tables can be read as a table")
        sized = [
            spec for constant, spec in self.constants.items() if re.fullmatch(rf"{re.escape(name)}\.\d+", constant)
        ]
        if any(spec != sized[0] for spec in sized):
            raise BundleError(f"{where}: the tables of tile sizes differ in type or shape; rebuild the bundle")
        sides = self.now.tiles.fixed_px if self.now.tiles else ()
        of_sides = {f"{name}.{px * px // self.now.steps.px_per_token}" for px in sides}
        if sized and (not sides or of_sides - self.constants.keys()):
            raise BundleError(f"{where}: a table of tile sizes needs fixed_px, and one for each of {list(sides)}")
        tables = self.constants | ({name: sized[0]} if sized else {}) | self.job | self.tile
        whole = _look_up(tables, name, f"{where}: no table, value or constant has that name")
        if len(whole.shape) < 2:
            raise BundleError(f"{where}: a single number has no rows")
        rows = whole.shape[1]
        if isinstance(rows, int) and rows != self.now.steps.count:
            raise BundleError(f"{where}: has {rows} rows for {self.now.steps.count} steps")
        return TensorSpec(whole.dtype, (whole.shape[0], *whole.shape[2:]))

    def output(self, section: str, where: str, spec: TensorSpec, target: str, shared: bool) -> None:
        """Check one output and add it: to a grid, to the job if it is shared, or to the tile."""
        _check_name(where, target)
        if target in self.program.grids:
            grid = self.program.grids[target]
            if target == "image":
                raise BundleError(f"{where}: the input is not written to; use another grid")
            _fit(spec, TensorSpec("float32", ("batch", grid.channels, f"h/{grid.px}", f"w/{grid.px}")), where)
            self.fresh.add(target)
            return
        in_use = target in self.job or target in self.constants or target in self.program.inputs
        if in_use or (target in self.tile and target not in self.now.state and section != "each"):
            raise BundleError(f"{where}: the name is taken; give every value its own")
        if target in self.tile:
            _fit(spec, self.tile[target], where)
        (self.job if shared else self.tile)[target] = spec


def _look_up(values: Mapping[str, T], name: str, complaint: str) -> T:
    if name not in values:
        raise BundleError(f"{complaint}; there are {', '.join(sorted(values)) or 'none'}")
    return values[name]


def _check_rows(actual: TensorSpec, expected: TensorSpec, alone: bool, where: str) -> None:
    """Refuse a source that is no row, and an input that has no axis of tiles or cannot take one row for all tiles."""
    if actual.shape[:1] not in (("batch",), (1,)):
        raise BundleError(f"{where}: {list(actual.shape)} is not one row; begin it with 1")
    axes = (ANY,) if actual.shape[0] == 1 and not alone else ("batch", ANY)
    if expected.shape[:1] not in [(axis,) for axis in axes]:
        raise BundleError(f"{where}: the input's shape {list(expected.shape)} must begin with {' or '.join(axes)}")


def _fit(actual: TensorSpec, expected: TensorSpec, where: str) -> None:
    sizes = zip(actual.shape, expected.shape, strict=False)
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
    if actual.dtype != expected.dtype or len(actual.shape) != len(expected.shape) or clash:
        raise BundleError(
            f"{where}: {actual.dtype} {list(actual.shape)} does not fit {expected.dtype} {list(expected.shape)}"
        )
