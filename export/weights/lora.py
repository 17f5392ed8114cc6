"""LoRA files: references to the low-rank pair of every adapted module, and merging a pair into a weight.

A pair is multiplied by alpha / rank. Alpha may be in three places: diffusers writes it into the header of the file (or
drops it), PEFT into `adapter_config.json` beside the file, and converted files have a tensor `<module>.alpha`.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.export.system import Lora, LoraFile, Tensors
from tilewright.export.weights.files import mapped_tensor
from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError, UsageError

__all__ = [
    "Adapter",
    "as_parameters",
    "check_fit",
    "lora_of",
    "merge",
    "path_and_strength",
    "read_adapters",
    "without_pairs",
]

FLOATS = ("float32", "float16", "bfloat16")
ROLES = {
    "lora_A": "down",
    "lora_B": "up",
    "lora.down": "down",
    "lora.up": "up",
    "lora_down": "down",
    "lora_up": "up",
}
ROLE = rf"({'|'.join(map(re.escape, ROLES))})(?:\.[^.]+)?"  # PEFT may append the adapter's name
PAIR = re.compile(rf"(?!lora_)(.+)\.{ROLE}\.weight")  # in kohya's files modules begin with lora_, and dots are lost
ALPHA = re.compile(rf"(?!lora_)(.+?)(?:\.lora|\.{ROLE})?\.alpha")
OF_LORA = re.compile(r"(?:.*[._])?lora(?![a-z])", re.IGNORECASE)
STYLES = "<module.path>.lora_A/.lora_B.weight, .lora.down/.lora.up.weight and .lora_down/.lora_up.weight"
UNSUPPORTED = {
    "DoRA (magnitude vectors)": re.compile(r".*(?:lora_magnitude_vector|dora_scale)"),
    "biases of LoRA": re.compile(rf".+\.{ROLE}\.bias$"),
}


@dataclass(frozen=True)
class Adapter:
    """The low-rank pair of one linear layer or convolution."""

    down: Reference  # [rank, in], for a convolution [rank, in, k, k]
    up: Reference  # [out, rank], for a convolution [out, rank, 1, 1]
    scale: float

    @property
    def rank(self) -> int:
        """The width between the two matrices."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the pair changes."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class _AlphaNotes:
    """Alpha as the trainer wrote it down, for all modules and for some."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None  # end of a module's path, as a regular expression -> alpha
    root: bool = False  # rank-stabilised: alpha is divided by the root of the rank

    def alpha_of(self, module: str) -> float | None:
        for pattern, alpha in (self.patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


def read_adapters(
    tensors: Tensors, prefixes: Sequence[str] = ("transformer.",), default_alpha: float | None = None
) -> tuple[dict[str, Adapter], set[str]]:
    """The adapter of every module, by its path without prefix, and all keys that belong to none.

    A file that does not tell alpha has the default, or the rank.
    """
    for what, pattern in UNSUPPORTED.items():
        if keys := [key for key in tensors.tensors if pattern.match(key)]:
            raise _refusal(tensors, keys, f"holds {what}: {_some(keys)}; not supported, train or export it without")
    parts = _parts(tensors, prefixes)
    rest = tensors.tensors.keys() - {key for pair in parts.values() for key in pair.values()}
    if keys := [key for key in rest if OF_LORA.match(key)]:
        raise _refusal(
            tensors,
            keys,
            f"holds LoRA keys of an unknown style: {_some(keys)}; known are {STYLES};"
            " load it in diffusers and save it with save_lora_weights",
        )
    if not parts:
        files = ", ".join(sorted(tensors.sources.values())[:2])
        raise InputError(one_line(f"LoRA {files}: holds no LoRA key; give the file with the lora_A and lora_B tensors"))
    if keys := [
        pair.get("down", pair.get("up", "")) for pair in parts.values() if len(pair.keys() & {"down", "up"}) == 1
    ]:
        raise _refusal(tensors, keys, f"holds only one half of {_some(keys)}; copy or export it again")
    notes = {
        file: _read_notes(tensors, file, prefixes)
        for file in {tensors.tensors[pair["down"]].file for pair in parts.values()}
    }
    return {m: _adapter(tensors, m, parts[m], notes, default_alpha) for m in parts}, rest


def _parts(tensors: Tensors, prefixes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Module -> role -> key, for every module with at least one half of a pair."""
    parts: dict[str, dict[str, str]] = {}
    for key in sorted(tensors.tensors):
        if match := PAIR.fullmatch(key) or ALPHA.fullmatch(key):
            role = "alpha" if match.re is ALPHA else ROLES[match[2]]
            pair = parts.setdefault(_module(match[1], prefixes), {})
            if role in pair:
                raise _refusal(
                    tensors, [key], f"holds both {_some([pair[role], key])} for one module; keep one of them"
                )
            pair[role] = key
    return {module: pair for module, pair in parts.items() if pair.keys() != {"alpha"}}


def _module(path: str, prefixes: Sequence[str]) -> str:
    path = path.removeprefix("base_model.model.")
    return next((path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix)), path)


def _adapter(
    tensors: Tensors,
    module: str,
    pair: Mapping[str, str],
    notes: Mapping[str, _AlphaNotes],
    default_alpha: float | None,
) -> Adapter:
    down, up = tensors.tensors[pair["down"]], tensors.tensors[pair["up"]]
    for key, reference in ((pair["down"], down), (pair["up"], up)):
        if reference.dtype not in FLOATS:
            raise _refusal(tensors, [key], f"{key!r} is {reference.dtype}, not one of {', '.join(FLOATS)}; convert it")
    rank = down.shape[0] if len(down.shape) >= 2 else 0
    if not rank or up.shape[1:] != (rank, *(1 for _ in down.shape[2:])):
        raise _refusal(
            tensors,
            [pair["down"]],
            f"{pair['down']!r} {list(down.shape)} and {pair['up']!r} {list(up.shape)} are no pair [rank, in, ...]"
            " and [out, rank, 1...] of one rank above 0; export it again",
        )
    return Adapter(down, up, _scale(tensors, module, rank, pair, notes[down.file], default_alpha))


def _scale(
    tensors: Tensors, module: str, rank: int, pair: Mapping[str, str], notes: _AlphaNotes, default_alpha: float | None
) -> float:
    alpha = _alpha(tensors, pair["alpha"]) if "alpha" in pair else notes.alpha_of(module)
    if alpha is None:
        alpha = rank if default_alpha is None else default_alpha
    if not math.isfinite(alpha):
        raise _refusal(tensors, [pair["down"]], f"alpha of {module!r} is {alpha}, not a finite number; export it again")
    return alpha / (math.sqrt(rank) if notes.root and "alpha" not in pair else rank)


def _alpha(tensors: Tensors, key: str) -> float:
    reference = tensors.tensors[key]
    if reference.shape not in ((), (1,)):
        raise _refusal(tensors, [key], f"{key!r} has shape {list(reference.shape)}, not one number; export it again")
    if reference.file not in tensors.pickles:
        return float(mapped_tensor(tensors.folder, reference).item())
    import torch

    from tilewright.export.weights.pickled import first_element

    data = bytearray(first_element(tensors.folder / reference.file, key))
    return float(torch.frombuffer(data, dtype=getattr(torch, reference.dtype)).item())


def _read_notes(tensors: Tensors, file: str, prefixes: Sequence[str]) -> _AlphaNotes:
    source = Path(tensors.sources[file])
    beside = source.with_name("adapter_config.json")
    header = None
    if file not in tensors.pickles:
        with open(tensors.folder / file, "rb", opener=only_files) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)).get("__metadata__")
    try:
        if header and "lora_adapter_metadata" in header:
            return _note(json.loads(header["lora_adapter_metadata"]), prefixes)
        source = beside
        return _note(json.loads(beside.read_bytes()), prefixes) if beside.is_file() else _AlphaNotes()
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, re.error) as error:
        raise InputError(one_line(f"LoRA {source}: unreadable notes on alpha ({error}); export it again")) from None


def _note(document: Any, prefixes: Sequence[str]) -> _AlphaNotes:
    document = dict(document)
    prefix = next((prefix for prefix in (*prefixes, "") if f"{prefix}lora_alpha" in document), None)
    if prefix is None:
        return _AlphaNotes()
    patterns = {
        re.compile(p).pattern: float(alpha) for p, alpha in (document.get(f"{prefix}alpha_pattern") or {}).items()
    }
    return _AlphaNotes(float(document[f"{prefix}lora_alpha"]), patterns, bool(document.get(f"{prefix}use_rslora")))


def path_and_strength(text: str) -> tuple[Path, float]:
    """The path and the strength of a LoRA written as `file.safetensors:0.8`."""
    path, colon, strength = text.rpartition(":")
    try:
        number = float(strength) if colon else 1.0
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(number):
        raise UsageError(f"LoRA strength {strength!r} of {path} is not a finite number; use 1, or leave it out")
    return Path(path if colon else text), number


def as_parameters(
    tensors: Tensors, prefixes: Sequence[str] = ("transformer.",), default_alpha: float | None = None
) -> Tensors:
    """The file's tensors under the names of a network's branches: `<module>.lora_A`, `<module>.lora_B`."""
    adapters, rest = read_adapters(tensors, prefixes, default_alpha)
    renamed = {key: tensors.tensors[key] for key in rest}
    for module, adapter in adapters.items():
        renamed |= {f"{module}.lora_A": adapter.down, f"{module}.lora_B": adapter.up}
    return replace(tensors, tensors=renamed)


def lora_of(rule: LoraFile, tensors: Tensors, strength: float, *, merged: bool) -> Lora:
    """The LoRA of a build, from the tensors of its file."""
    adapters, _ = read_adapters(tensors, rule.prefixes, rule.default_alpha)
    return Lora(rule.origin, strength, merged, {module: [a.rank, a.scale] for module, a in sorted(adapters.items())})


def without_pairs(tensors: Tensors) -> Tensors:
    """The tensors of a LoRA's file without the low-rank pairs, which `as_parameters` has renamed."""
    rest = {key: r for key, r in tensors.tensors.items() if not key.endswith((".lora_A", ".lora_B"))}
    return replace(tensors, tensors=rest)


def check_fit(base: Path, weight: Reference, file: Path, adapter: Adapter) -> None:
    """Refuse to merge a pair into a weight of another type or shape."""
    if weight.dtype not in FLOATS:
        raise InputError(f"weights {base}: {weight.dtype} takes no LoRA; give them in one of {', '.join(FLOATS)}")
    if weight.shape != adapter.shape:
        raise InputError(
            f"LoRA {file}: a pair for {list(adapter.shape)} does not fit {list(weight.shape)} of {base};"
            " is this the LoRA of this system and size?"
        )


def merge(base_folder: Path, weight: Reference, lora_folder: Path, adapter: Adapter, strength: float) -> bytes:
    """The bytes of weight + strength * scale * up @ down: computed in float32, rounded once, little-endian."""
    base, file = base_folder / weight.file, lora_folder / adapter.down.file
    check_fit(base, weight, file, adapter)
    import torch

    whole, up, down = (
        mapped_tensor(folder, reference).flatten(1).float()
        for folder, reference in ((base_folder, weight), (lora_folder, adapter.up), (lora_folder, adapter.down))
    )
    factor = torch.tensor(strength * adapter.scale, dtype=torch.float32)  # PyTorch refuses a larger Python number
    merged = torch.addmm(whole, up * factor, down).to(getattr(torch, weight.dtype))
    if not merged.isfinite().all():
        raise InputError(f"LoRA {file}: at strength {strength} {weight.dtype} weights are not finite; lower it")
    return merged.view(torch.uint8).numpy().tobytes()


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"


def _refusal(tensors: Tensors, keys: Sequence[str], complaint: str) -> InputError:
    return InputError(one_line(f"LoRA {tensors.sources[tensors.tensors[min(keys)].file]}: {complaint}"))
