"""constants: tensors that the program reads and the build computes, and tokenizers."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import Stage, write
from tilewright.export.build.code import code
from tilewright.export.build.request import Request
from tilewright.export.build.stages.attach import random_weights_of, read_weights
from tilewright.export.build.versions import versions
from tilewright.export.system import Lora, Settings
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.program import TensorSpec

__all__ = ["check_constants", "stage"]

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "*token*.json",
)  # files of a tokenizer, in the folder of a text encoder


def stage(request: Request, attached: Stage, digest: Callable[[Path], str]) -> Stage:
    """The stage; its inputs are the networks that the build runs, their weights, and the options with their files."""
    system, options, networks = request.system, _options(request), request.build_time
    read = {system.origin_of(name, parameter) for name in networks for parameter in request.parameters[name]}
    if (lora := request.settings.lora) and _reads(request, lora):
        read.add(lora.origin)
    inputs = {"settings": _settings(request).to_json()}
    if networks:
        inputs["weights"] = random_weights_of(request)
    inputs |= {f"network {name}": spec.recipe for name, spec in networks.items()}
    for name in sorted(read & request.used.keys()):
        tensors = request.used[name]
        inputs |= {f"weights {name}/{file}": digest(tensors.folder / file) for file in tensors.sources}
    inputs |= {f"option {name}": str(value) for name, value in options.items()}
    files = {f"file {name}": Path(value) for name, value in options.items() if _is(Path.is_file, value)}
    files |= _tokenizer_files(request)
    inputs |= {name: digest(file) for name, file in files.items()}
    modules = sorted({spec.module for spec in networks.values()})
    inputs |= code(__name__, system.module, *modules) | versions("torch", "transformers", "tokenizers")
    return Stage("constants", inputs, lambda folder: _work(request, attached.directory, folder))


def _reads(request: Request, lora: Lora) -> bool:
    """Whether a network that the build runs has the LoRA in it."""
    system = request.system

    def adapted(network: str, parameter: str) -> bool:
        if not lora.merged:
            return system.origin_of(network, parameter) == lora.origin
        pair = f"{parameter.removesuffix('weight')}lora_A"
        if not parameter.endswith("weight") or system.origin_of(network, pair) != lora.origin:
            return False
        return str(system.keys(network, pair)[0]).removesuffix(".lora_A") in lora.branches

    return any(adapted(network, name) for network in request.build_time for name in request.parameters[network])


def _settings(request: Request) -> Settings:
    """The settings, without a LoRA that nothing here depends on."""
    settings = request.settings
    return settings if settings.lora and _reads(request, settings.lora) else replace(settings, lora=None)


def _options(request: Request) -> dict[str, Any]:
    """The options, without a LoRA that nothing here depends on."""
    lora, system = request.settings.lora, request.system
    unread = system.origins[lora.origin].argument if lora and not _reads(request, lora) else None
    return {name: value for name, value in request.options.items() if name != unread}


def _is(kind: Callable[[Path], bool], value: Any) -> bool:
    try:
        return isinstance(value, str) and kind(Path(value))
    except OSError:  # the text is too long for a file name
        return False


def _tokenizer_files(request: Request) -> dict[str, Path]:
    files = sorted(request.folder.glob("tokenizer*/*")) if request.folder else []
    folders = (Path(value) for value in request.options.values() if _is(Path.is_dir, value))
    files += [file for folder in folders for name in TOKENIZER_FILES for file in sorted(folder.glob(name))]
    return {f"tokenizer {file.parent.name}/{file.name}": file for file in files if file.is_file()}


class _NetworkNeeded(Exception):
    """Raised in the place of running a network."""


def check_constants(request: Request) -> None:
    """Refuse tokenizers, prompts and embeddings that cannot be used, without running a network."""

    def refuse(component: str, **inputs: Any) -> dict[str, Any]:
        raise _NetworkNeeded

    system, settings = request.system, request.settings
    system.tokenizers(settings, request.options, request.folder)
    with contextlib.suppress(_NetworkNeeded):
        system.constants(settings, refuse, request.options, request.folder)


def _work(request: Request, attached: Path, directory: Path) -> None:
    system, weights = request.system, read_weights(attached)
    folders = {n: attached / "weights" / n if f.path is None else Path(f.path) for n, f in weights.folders.items()}

    def run(component: str, **inputs: Any) -> dict[str, Any]:
        from tilewright.export.build.streamed import run_streamed

        refs = {n: (folders[r.folder], r) for n, r in weights.tensors[component].items()}
        return run_streamed(request.build_time[component], refs, inputs)

    constants = system.constants(_settings(request), run, _options(request), request.folder)
    if constants:
        specs = {name: TensorSpec(str(array.dtype), array.shape) for name, array in sorted(constants.items())}
        data = (constants[name].tobytes() for name in specs)
        write_tensors(directory / "constants.safetensors", specs, data, "made at build")
    for name, text in system.tokenizers(request.settings, request.options, request.folder).items():
        write(directory / name, text)
