"""The program of a bundle: grids and passes, as data.

A grid is an array over the padded image; a pass walks tiles, calls components on crops, and joins what they return.
A value lives with the job (what an untiled pass gives, or a call in `once` that reads nothing of a tile), with the tile
(what its calls give, and its state; later passes with the same tiles see it) or on a grid.
Where a call's input comes from is written as

    name     a grid (its crop under the tile), a tile's value or state, a job's value
    @name    this step's row of a schedule's table, of a value or of a constant (the whole table outside `each`)
    #name    a constant of the bundle
    $name    an input of the program, given by the caller or defaulted
    ~name    noise shaped like the grid or state `name`, fresh every step

Tensors that live with a tile or on a grid carry a leading batch axis; the others have none of their own.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

__all__ = [
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
OPTIONAL = SCHEDULE_OPTIONS["flow_shift"].keys()  # every other option must be given
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = (*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool")
STATE_DIM = re.compile(r"([hw])/([1-9]\d{0,3})")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's element type and shape; a name stands for a size that may vary."""

    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if any(isinstance(d, int) and d < 1 for d in self.shape):
            raise ValueError(f"shape {list(self.shape)} holds a size below 1")


@dataclass(frozen=True)
class Signature:
    """What a component takes and gives."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Grid:
    """A global float32 array over the padded image."""

    px: int  # output pixels a cell spans, along each axis
    channels: int
    init: str = "none"  # input | noise | zeros | none (some pass writes it first)

    def __post_init__(self) -> None:
        if self.init not in ("input", "noise", "zeros", "none"):
            raise ValueError(f"init {self.init!r} is not one of input, noise, zeros, none")
        if self.px < 1 or self.channels < 1:
            raise ValueError(f"px {self.px} and channels {self.channels} must be at least 1")


@dataclass(frozen=True)
class State:
    """A tile's private float32 tensor, kept from `once` to `last`."""

    shape: tuple[Dim, ...]  # without the batch; "h/8" is the tile's height in output pixels over 8
    init: str = "zeros"  # zeros | ones | noise

    def __post_init__(self) -> None:
        if self.init not in ("zeros", "ones", "noise"):
            raise ValueError(f"init {self.init!r} is not one of zeros, ones, noise")
        if self.init == "noise" and len(self.shape) != 3:
            raise ValueError(f"noise needs a shape of channels, rows, columns, not {list(self.shape)}")
        for dim in self.shape:
            if not (STATE_DIM.fullmatch(dim) if isinstance(dim, str) else dim > 0):
                raise ValueError(f"shape {list(self.shape)}: {dim!r} is neither a size nor like 'h/8' or 'w/8'")


@dataclass(frozen=True)
class Input:
    """A value the caller may give; `choices` gives names to numbers."""

    dtype: str
    shape: tuple[int, ...] = ()
    default: int | float | str | None = None  # a number, or "#name" of a constant; none: the caller must give it
    choices: dict[str, int] = field(default_factory=dict)
    help: str = ""  # one line for the caller
    least: int | float | None = None  # what a single number may be
    most: int | float | None = None

    def __post_init__(self) -> None:
        if any(d < 1 for d in self.shape):
            raise ValueError(f"shape {list(self.shape)} holds a size below 1")


@dataclass(frozen=True)
class Text:
    """Words of the caller, which tokenizers turn into the ids of inputs."""

    ids: dict[str, str]  # input -> file of its tokenizer in the bundle
    default: str | None = None  # none: the caller must give words, or the values that would be made of them
    help: str = ""  # one line for the caller

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a text that gives no ids is of no use")


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of the caller, whose tensors are inputs or values."""

    tensors: dict[str, str]  # tensor in the file -> input or value
    help: str = ""  # one line for the caller


@dataclass(frozen=True)
class Tiles:
    """How a pass cuts the image, in output pixels."""

    px: int
    overlap_px: int
    whole_up_to_px: tuple[int, int] | None = None  # images that fit, either way round, are one tile
    batch: int = 1  # tiles given to one call
    fixed_px: tuple[int, ...] = ()  # where not empty: the only sides a tile may have; smaller images are padded

    def __post_init__(self) -> None:
        if self.fixed_px and (self.px not in self.fixed_px or self.whole_up_to_px):
            raise ValueError(f"px {self.px} must be among fixed_px {list(self.fixed_px)}, and no image be taken whole")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if self.px < 1:
            raise ValueError(f"px {self.px} must be at least 1")
        if self.overlap_px < 0 or 2 * self.overlap_px > self.px:
            raise ValueError(f"overlap_px {self.overlap_px} must lie between 0 and half of px {self.px}")


@dataclass(frozen=True)
class Steps:
    """A named schedule; its tables depend on the tile's token count."""

    schedule: str
    count: int
    px_per_token: int = 256  # output pixels of area behind one token
    options: dict[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULE_TABLES:
            raise ValueError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULE_TABLES)}")
        kinds = SCHEDULE_OPTIONS[self.schedule]
        if unknown := sorted(self.options.keys() - kinds.keys()):
            raise ValueError(f"schedule {self.schedule!r} has no option {unknown[0]!r}")
        if missing := sorted(kinds.keys() - self.options.keys() - OPTIONAL):
            raise ValueError(f"schedule {self.schedule!r} needs the option {missing[0]!r}")
        for name, value in self.options.items():
            if type(value) not in ((int, float) if kinds[name] is float else (kinds[name],)):
                raise ValueError(f"schedule {self.schedule!r}: option {name!r} is no {kinds[name].__name__}: {value!r}")
        if not 1 <= self.count <= 1000 or self.px_per_token < 1:
            raise ValueError(f"count {self.count} must lie in 1..1000 and px_per_token {self.px_per_token} be positive")


@dataclass(frozen=True)
class Call:
    """One run of a component: where its inputs come from and where its outputs go."""

    run: str
    inputs: dict[str, str]
    outputs: dict[str, str]

    def shared(self, of_tiles: Collection[str]) -> bool:
        """Whether it reads and writes nothing that lives with a tile or on a grid."""
        reads = all(s[0] in "#$@" or (s[0] != "~" and s not in of_tiles) for s in self.inputs.values())
        return reads and not any(target in of_tiles for target in self.outputs.values())


@dataclass(frozen=True)
class Pass:
    """A walk over tiles; without tiles, one look at the whole job."""

    name: str
    tiles: Tiles | None = None
    steps: Steps | None = None
    state: dict[str, State] = field(default_factory=dict)
    once: tuple[Call, ...] = ()
    each: tuple[Call, ...] = ()
    last: tuple[Call, ...] = ()

    def calls(self) -> Iterator[tuple[str, int, Call]]:
        """Every call with its section and position, in the order they run."""
        for section, calls in (("once", self.once), ("each", self.each), ("last", self.last)):
            for position, call in enumerate(calls):
                yield section, position, call

    def reads(self) -> set[str]:
        """Grids, values, tables and constants that its calls read."""
        return {source.lstrip("@#") for *_, call in self.calls() for source in call.inputs.values()}

    def writes(self, section: str | None = None) -> set[str]:
        """Grids and values that its calls, or those of a section, write."""
        return {target for s, _, call in self.calls() if section in (None, s) for target in call.outputs.values()}


@dataclass(frozen=True)
class Program:
    """What turns an image into its restoration: `image` is read, `result` is the answer."""

    scale: int
    multiple_px: int  # the padded image's sides are multiples of this
    grids: dict[str, Grid]
    passes: tuple[Pass, ...]
    inputs: dict[str, Input] = field(default_factory=dict)
    texts: dict[str, Text] = field(default_factory=dict)
    files: dict[str, TensorFile] = field(default_factory=dict)  # by the name of the argument
    any_scale: bool = False  # `scale` is a default; the network takes what was enlarged by any other

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 16 or not 1 <= self.multiple_px <= 4096:
            raise ValueError(f"scale {self.scale} must lie in 1..16 and multiple_px {self.multiple_px} in 1..4096")

    def components(self) -> set[str]:
        """Names of the components that the passes call."""
        return {call.run for p in self.passes for _, _, call in p.calls()}


def state_shape(state: State, height: int, width: int) -> tuple[int, ...]:
    """The shape of a tile's state for a tile of that many output pixels."""
    sides = {"h": height, "w": width}
    return tuple(d if isinstance(d, int) else sides[d[0]] // int(d[2:]) for d in state.shape)


def untiled_values(program: Program) -> set[str]:
    """The values that passes without tiles make, which a caller may give instead."""
    return {name for p in program.passes if p.tiles is None for name in p.writes() - program.grids.keys()}
