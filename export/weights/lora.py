"""LoRA files: the low-rank pair of every module they adapt, by reference, and its merge into a weight.

A pair counts alpha / rank times. The libraries keep alpha out of the tensors: diffusers writes it in the header of the
file (or drops it), PEFT in `adapter_config.json` beside it. Converted files have it as `<module>.alpha`.
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
    "read",
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
ROLE = rf"({'|'.join(map(re.escape, ROLES))})(?:\.[^.]+)?"  # PEFT may put the adapter's name behind
PAIR = re.compile(rf"(?!lora_)(.+)\.{ROLE}\.weight")  # kohya's modules begin with lora_ and have lost their dots
ALPHA = re.compile(rf"(?!lora_)(.+?)(?:\.lora|\.{ROLE})?\.alpha")
OF_LORA = re.compile(r"(?:.*[._])?lora(?![a-z])", re.IGNORECASE)
STYLES = "<module.path>.lora_A/.lora_B.weight, .lora.down/.lora.up.weight and .lora_down/.lora_up.weight"
UNSUPPORTED = {
    "DoRA (magnitude vectors)": re.compile(r".*(?:lora_magnitude_vector|dora_scale)"),
    "biases of LoRA": re.compile(rf".+\.{ROLE}\.bias$"),
}


@dataclass(frozen=True)
class Adapter:
    """The low-rank pair of one linear or convolution."""

    down: Reference  # [rank, in], of a convolution [rank, in, k, k]
    up: Reference  # [out, rank], of a convolution [out, rank, 1, 1]
    scale: float

    @property
    def rank(self) -> int:
        """The width between the two."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class _Noted:
    """What the trainer noted about alpha."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None  # ends of module paths, as regular expressions
    root: bool = False  # rank-stabilised: divided by the root of the rank

    def alpha_of(self, module: str) -> float | None:
        for pattern, alpha in (self.patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


def read(
    found: Tensors, prefixes: Sequence[str] = ("transformer.",), default_alpha: float | None = None
) -> tuple[dict[str, Adapter], set[str]]:
    """Module less prefix -> adapter, and the keys of none; where a file is silent, alpha is the default, or rank."""
    for what, pattern in UNSUPPORTED.items():
        if keys := [key for key in found.tensors if pattern.match(key)]:
            raise _refusal(found, keys, f"holds {what}: {_some(keys)}; not supported, train or export it without")
    parts = _parts(found, prefixes)
    rest = found.tensors.keys() - {key for of in parts.values() for key in of.values()}
    if keys := [key for key in rest if OF_LORA.match(key)]:
        raise _refusal(
            found,
            keys,
            f"holds LoRA keys in a style that is not read: {_some(keys)}; read are {STYLES};"
            " load it in diffusers and save it with save_lora_weights",
        )
    if not parts:
        files = ", ".join(sorted(found.sources.values())[:2])
        raise InputError(one_line(f"LoRA {files}: holds no LoRA key; give the file with the lora_A and lora_B tensors"))
    if keys := [of.get("down", of.get("up", "")) for of in parts.values() if len(of.keys() & {"down", "up"}) == 1]:
        raise _refusal(found, keys, f"holds only one half of {_some(keys)}; copy or export it again")
    noted = {file: _noted(found, file, prefixes) for file in {found.tensors[of["down"]].file for of in parts.values()}}
    return {m: _adapter(found, m, parts[m], noted, default_alpha) for m in parts}, rest


def _parts(found: Tensors, prefixes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Module -> role -> key, of every module with at least half a pair."""
    parts: dict[str, dict[str, str]] = {}
    for key in sorted(found.tensors):
        if match := PAIR.fullmatch(key) or ALPHA.fullmatch(key):
            role = "alpha" if match.re is ALPHA else ROLES[match[2]]
            of = parts.setdefault(_module(match[1], prefixes), {})
            if role in of:
                raise _refusal(found, [key], f"holds both {_some([of[role], key])} for one module; keep one of them")
            of[role] = key
    return {module: of for module, of in parts.items() if of.keys() != {"alpha"}}


def _module(path: str, prefixes: Sequence[str]) -> str:
    path = path.removeprefix("base_model.model.")
    return next((path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix)), path)


def _adapter(
    found: Tensors, module: str, of: Mapping[str, str], notes: Mapping[str, _Noted], default_alpha: float | None
) -> Adapter:
    down, up = found.tensors[of["down"]], found.tensors[of["up"]]
    for key, reference in ((of["down"], down), (of["up"], up)):
        if reference.dtype not in FLOATS:
            raise _refusal(found, [key], f"{key!r} is {reference.dtype}, not one of {', '.join(FLOATS)}; convert it")
    rank = down.shape[0] if len(down.shape) >= 2 else 0
    if not rank or up.shape[1:] != (rank, *(1 for _ in down.shape[2:])):
        raise _refusal(
            found,
            [of["down"]],
            f"{of['down']!r} {list(down.shape)} and {of['up']!r} {list(up.shape)} are no pair [rank, in, ...]"
            " and [out, rank, 1...] of one rank above 0; export it again",
        )
    return Adapter(down, up, _scale(found, module, rank, of, notes[down.file], default_alpha))


def _scale(
    found: Tensors, module: str, rank: int, of: Mapping[str, str], noted: _Noted, default_alpha: float | None
) -> float:
    alpha = _alpha(found, of["alpha"]) if "alpha" in of else noted.alpha_of(module)
    if alpha is None:
        alpha = rank if default_alpha is None else default_alpha
    if not math.isfinite(alpha):
        raise _refusal(found, [of["down"]], f"alpha of {module!r} is {alpha}, not a finite number; export it again")
    return alpha / (math.sqrt(rank) if noted.root and "alpha" not in of else rank)


def _alpha(found: Tensors, key: str) -> float:
    reference = found.tensors[key]
    if reference.shape not in ((), (1,)):
        raise _refusal(found, [key], f"{key!r} has shape {list(reference.shape)}, not one number; export it again")
    if reference.file not in found.pickles:
        return float(mapped_tensor(found.folder, reference).item())
    import torch

    from tilewright.export.weights.pickled import first_element

    data = bytearray(first_element(found.folder / reference.file, key))
    return float(torch.frombuffer(data, dtype=getattr(torch, reference.dtype)).item())


def _noted(found: Tensors, file: str, prefixes: Sequence[str]) -> _Noted:
    source = Path(found.sources[file])
    beside = source.with_name("adapter_config.json")
    header = None
    if file not in found.pickles:
        with (found.folder / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)).get("__metadata__")
    try:
        if header and "lora_adapter_metadata" in header:
            return _note(json.loads(header["lora_adapter_metadata"]), prefixes)
        source = beside
        return _note(json.loads(beside.read_bytes()), prefixes) if beside.is_file() else _Noted()
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError, re.error) as error:
        raise InputError(one_line(f"LoRA {source}: unreadable notes on alpha ({error}); export it again")) from None


def _note(said: Any, prefixes: Sequence[str]) -> _Noted:
    said = dict(said)
    prefix = next((prefix for prefix in (*prefixes, "") if f"{prefix}lora_alpha" in said), None)
    if prefix is None:
        return _Noted()
    patterns = {re.compile(p).pattern: float(alpha) for p, alpha in (said.get(f"{prefix}alpha_pattern") or {}).items()}
    return _Noted(float(said[f"{prefix}lora_alpha"]), patterns, bool(said.get(f"{prefix}use_rslora")))


def path_and_strength(given: str) -> tuple[Path, float]:
    """A LoRA's file and strength from `file.safetensors:0.8`."""
    path, colon, strength = given.rpartition(":")
    try:
        number = float(strength) if colon else 1.0
    except ValueError:
        return Path(given), 1.0
    if not math.isfinite(number):
        raise UsageError(f"LoRA strength {strength!r} of {path} is not a finite number; use 1, or leave it out")
    return Path(path if colon else given), number


def as_parameters(
    found: Tensors, prefixes: Sequence[str] = ("transformer.",), default_alpha: float | None = None
) -> Tensors:
    """The file's tensors under the names that a network's branches give them: `<module>.lora_A`, `<module>.lora_B`."""
    adapters, rest = read(found, prefixes, default_alpha)
    tensors = {key: found.tensors[key] for key in rest}
    for module, adapter in adapters.items():
        tensors |= {f"{module}.lora_A": adapter.down, f"{module}.lora_B": adapter.up}
    return replace(found, tensors=tensors)


def lora_of(rule: LoraFile, tensors: Tensors, strength: float, *, merged: bool) -> Lora:
    """The LoRA that a file holds, as a build takes it."""
    adapters, _ = read(tensors, rule.prefixes, rule.default_alpha)
    return Lora(rule.origin, strength, merged, {module: [a.rank, a.scale] for module, a in sorted(adapters.items())})


def without_pairs(tensors: Tensors) -> Tensors:
    """What a LoRA's file holds beside its low-rank pairs, which `as_parameters` has named."""
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
    """weight + strength * scale * up @ down, in float32, rounded once to the weight's own type; little-endian."""
    base, file = base_folder / weight.file, lora_folder / adapter.down.file
    check_fit(base, weight, file, adapter)
    import torch

    whole, up, down = (
        mapped_tensor(folder, reference).flatten(1).float()
        for folder, reference in ((base_folder, weight), (lora_folder, adapter.up), (lora_folder, adapter.down))
    )
    factor = torch.tensor(strength * adapter.scale, dtype=torch.float32)  # as a number, torch refuses it beyond float32
    merged = torch.addmm(whole, up * factor, down).to(getattr(torch, weight.dtype))
    if not merged.isfinite().all():
        raise InputError(f"LoRA {file}: at strength {strength} {weight.dtype} weights are not finite; lower it")
    return merged.view(torch.uint8).numpy().tobytes()


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"


def _refusal(found: Tensors, keys: Sequence[str], complaint: str) -> InputError:
    return InputError(one_line(f"LoRA {found.sources[found.tensors[min(keys)].file]}: {complaint}"))
