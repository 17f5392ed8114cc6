"""The program of a bundle: grids and passes, as data.

A grid is an array over the padded image. A pass visits tiles, calls components on crops, and joins their outputs.
A value belongs to a grid, to a tile or to the job. Values of a tile are its state and the outputs of its calls; later
passes with the same tiles can read them. Values of the job are outputs of passes without tiles, and of calls in `once`
that read nothing of a tile. The source of a call's input is written as

    name     a grid (its crop under the tile), a value or state of the tile, a value of the job
    @name    the current step's row of a schedule's table, of a value or of a constant (outside `each` the whole table)
    #name    a constant of the bundle
    $name    an input of the program, set by the caller or by its default
    ~name    noise with the shape of the grid or state `name`, new in every step

Every tensor has a leading axis of tiles. A tensor of a tile or a grid has a row for each tile of a call: its axis is
named `batch`. All others have one row, and an input that reads them has the axis `batch_or_1`: one row for all tiles of
a call, or a row for each where a call holds tiles of other steps or images. A single number is one row.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from tilewright.runtime.bundle.strict import check_limits

__all__ = [
    "ANY",
    "Call",
    "Grid",
    "Input",
    "Pass",
    "Program",
    "Signature",
    "State",
    "Steps",
    "TensorFile",
    "TensorSpec",
    "Text",
    "Tiles",
    "state_shape",
]

Dim = int | str
ANY = "batch_or_1"  # name of the leading axis of an input that all tiles of a call may share
SCHEDULE_TABLES = {
    "flow_shift": ("sigma", "sigma_next"),
    "ddim": ("t", "alpha", "beta", "alpha_next", "beta_next"),
    "ddpm": ("t", "alpha", "beta", "x0_weight", "z_weight", "noise_weight"),
}
DIFFUSION_OPTIONS = {"betas": str, "beta_start": float, "beta_end": float, "spacing_offset": int, "final_alpha": str}
SCHEDULE_OPTIONS: dict[str, dict[str, type]] = {
    "flow_shift": {
        "base_shift": float,
        "max_shift": float,
        "base_tokens": int,
        "max_tokens": int,
        "min_mu": float,
        "max_mu": float,
    },
    "ddim": DIFFUSION_OPTIONS,
    "ddpm": DIFFUSION_OPTIONS,
}
OPTIONAL = SCHEDULE_OPTIONS["flow_shift"].keys()  # all other options are required
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")
STATE_DIM = re.compile(r"([hw])/([1-9]\d{0,3})")


@dataclass(frozen=True)
class TensorSpec:
    """The element type and shape of a tensor; a name in the shape is a size that may vary."""

    dtype: str = field(metadata={"enum": DTYPES})
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        check_limits(self)
        if any(isinstance(d, int) and d < 1 for d in self.shape):
            raise ValueError(f"shape {list(self.shape)} holds a size below 1")

    def rows(self, count: Dim) -> "TensorSpec":
        """The same tensor with so many rows."""
        return TensorSpec(self.dtype, (count, *self.shape[1:]))


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a component."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Grid:
    """A float32 array over the padded image."""

    px: int = field(metadata={"minimum": 1})  # output pixels of a cell, along each axis
    channels: int = field(metadata={"minimum": 1})
    init: str = field(default="none", metadata={"enum": ("input", "noise", "zeros", "none")})  # none: a pass writes it

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class State:
    """A float32 tensor that belongs to one tile, from `once` to `last`."""

    shape: tuple[Dim, ...]  # without the batch; "h/8" is the tile's height in output pixels divided by 8
    init: str = field(default="zeros", metadata={"enum": ("zeros", "ones", "noise")})

    def __post_init__(self) -> None:
        check_limits(self)
        if self.init == "noise" and len(self.shape) != 3:
            raise ValueError(f"noise needs a shape of channels, rows, columns, not {list(self.shape)}")
        for dim in self.shape:
            if not (STATE_DIM.fullmatch(dim) if isinstance(dim, str) else dim > 0):
                raise ValueError(f"shape {list(self.shape)}: {dim!r} is neither a size nor like 'h/8' or 'w/8'")


@dataclass(frozen=True)
class Input:
    """A value that the caller may set; `choices` gives names to numbers."""

    dtype: str
    shape: tuple[int, ...] = ()  # a single number, or one row [1, ...]
    default: int | float | str | None = None  # a number, or "#name" of a constant; none: the caller must set it
    choices: dict[str, int] = field(default_factory=dict)
    help: str = ""  # one line for the caller
    least: int | float | None = None  # bounds of a single number
    most: int | float | None = None

    def __post_init__(self) -> None:
        if any(d < 1 for d in self.shape):
            raise ValueError(f"shape {list(self.shape)} holds a size below 1")

    @property
    def spec(self) -> TensorSpec:
        """The tensor that components read; a single number is one row."""
        return TensorSpec(self.dtype, self.shape or (1,))


@dataclass(frozen=True)
class Text:
    """A text of the caller. Tokenizers turn it into the ids of inputs."""

    ids: dict[str, str]  # input -> file of its tokenizer in the bundle; at least one
    default: str | None = None  # none: the caller must give words, or the values that are computed from them
    help: str = ""  # one line for the caller

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a text needs at least one input for its ids")


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of the caller; its tensors are inputs or values."""

    tensors: dict[str, str]  # tensor in the file -> input or value
    help: str = ""  # one line for the caller


@dataclass(frozen=True)
class Tiles:
    """How a pass cuts the image, in output pixels."""

    px: int = field(metadata={"minimum": 1})
    overlap_px: int = field(metadata={"minimum": 0})
    whole_up_to_px: tuple[int, int] | None = None  # images up to this size, also rotated, are one tile
    batch: int = field(default=1, metadata={"minimum": 1})  # most tiles in one call
    fixed_px: tuple[int, ...] = ()  # the only sides that tiles may have, if not empty; smaller images are padded

    def __post_init__(self) -> None:
        check_limits(self)
        if self.fixed_px and (self.px not in self.fixed_px or self.whole_up_to_px):
            raise ValueError(f"px {self.px} must be among fixed_px {list(self.fixed_px)}, and no image be taken whole")
        if 2 * self.overlap_px > self.px:
            raise ValueError(f"overlap_px {self.overlap_px} must lie between 0 and half of px {self.px}")


@dataclass(frozen=True)
class Steps:
    """A named schedule. Its tables depend on the number of tokens in a tile."""

    schedule: str = field(metadata={"enum": tuple(SCHEDULE_TABLES)})
    count: int = field(metadata={"minimum": 1, "maximum": 1000})
    px_per_token: int = field(default=256, metadata={"minimum": 1})  # output pixels in the area of one token
    options: dict[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits(self)
        kinds = SCHEDULE_OPTIONS[self.schedule]
        if unknown := sorted(self.options.keys() - kinds.keys()):
            raise ValueError(f"schedule {self.schedule!r} has no option {unknown[0]!r}")
        if missing := sorted(kinds.keys() - self.options.keys() - OPTIONAL):
            raise ValueError(f"schedule {self.schedule!r} needs the option {missing[0]!r}")
        for name, value in self.options.items():
            if type(value) not in ((int, float) if kinds[name] is float else (kinds[name],)):
                raise ValueError(f"schedule {self.schedule!r}: option {name!r} is no {kinds[name].__name__}: {value!r}")


@dataclass(frozen=True)
class Call:
    """One run of a component: the sources of its inputs, and the targets of its outputs."""

    run: str
    inputs: dict[str, str]
    outputs: dict[str, str]

    def shared(self, of_tiles: Collection[str]) -> bool:
        """Whether it reads and writes nothing that belongs to a tile or a grid."""
        reads = all(s[0] in "#$@" or (s[0] != "~" and s not in of_tiles) for s in self.inputs.values())
        return reads and not any(target in of_tiles for target in self.outputs.values())


@dataclass(frozen=True)
class Pass:
    """A run over all tiles; without tiles, a single run for the whole job."""

    name: str
    tiles: Tiles | None = None
    steps: Steps | None = None
    state: dict[str, State] = field(default_factory=dict)
    once: tuple[Call, ...] = ()
    each: tuple[Call, ...] = ()
    last: tuple[Call, ...] = ()

    def calls(self) -> Iterator[tuple[str, int, Call]]:
        """Every call with its section and position, in the order of execution."""
        for section, calls in (("once", self.once), ("each", self.each), ("last", self.last)):
            for position, call in enumerate(calls):
                yield section, position, call

    def reads(self) -> set[str]:
        """The grids, values, tables and constants that its calls read."""
        return {source.lstrip("@#") for *_, call in self.calls() for source in call.inputs.values()}

    def writes(self, section: str | None = None) -> set[str]:
        """The grids and values that its calls, or the calls of one section, write."""
        return {target for s, _, call in self.calls() if section in (None, s) for target in call.outputs.values()}


@dataclass(frozen=True)
class Program:
    """The steps that restore an image: `image` is the input grid, `result` the output grid."""

    scale: int = field(metadata={"minimum": 1, "maximum": 16})
    multiple_px: int = field(metadata={"minimum": 1, "maximum": 4096})  # the padded image's sides are multiples of this
    grids: dict[str, Grid]
    passes: tuple[Pass, ...]
    inputs: dict[str, Input] = field(default_factory=dict)
    texts: dict[str, Text] = field(default_factory=dict)
    files: dict[str, TensorFile] = field(default_factory=dict)  # name of the argument -> file
    any_scale: bool = False  # `scale` is only the default: images may be enlarged by any other factor

    def __post_init__(self) -> None:
        check_limits(self)

    def batched(self, batch: int) -> "Program":
        """The same program with up to so many tiles in a call."""
        return self._retiled(lambda tiles: replace(tiles, batch=batch))

    def tiled(self, px: int) -> "Program":
        """The same program with tiles of this side. They overlap as before, or by half a tile if that is less."""
        fitting = px // 2 // self.multiple_px * self.multiple_px
        return self._retiled(lambda tiles: replace(tiles, px=px, overlap_px=min(tiles.overlap_px, fitting))).cut(px)

    def _retiled(self, change: Callable[[Tiles], Tiles]) -> "Program":
        """The same program with other tiles. Passes that share their tiles share the others too."""
        tiles = {p.tiles: change(p.tiles) for p in self.passes if p.tiles}
        return replace(self, passes=tuple(replace(p, tiles=tiles[p.tiles]) if p.tiles else p for p in self.passes))

    def cut(self, most_px: int) -> "Program":
        """The same program without tiles above this side: no larger image is taken whole."""
        passes = []
        for p in self.passes:
            whole = p.tiles.whole_up_to_px if p.tiles else None
            large = p.tiles and whole and max(whole) > most_px
            passes.append(replace(p, tiles=replace(p.tiles, whole_up_to_px=None)) if p.tiles and large else p)
        return replace(self, passes=tuple(passes))

    def components(self) -> set[str]:
        """The names of the components that the passes call."""
        return {call.run for p in self.passes for _, _, call in p.calls()}


def state_shape(state: State, height: int, width: int) -> tuple[int, ...]:
    """The shape of a state for a tile of this size in output pixels."""
    sides = {"h": height, "w": width}
    return tuple(d if isinstance(d, int) else sides[d[0]] // int(d[2:]) for d in state.shape)


def untiled_values(program: Program) -> set[str]:
    """The values that passes without tiles compute; a caller may give them instead."""
    return {name for p in program.passes if p.tiles is None for name in p.writes() - program.grids.keys()}
