"""The model that NVIDIA Triton Inference Server runs for a bundle, in its Python backend.

`tilewright export triton-repo` writes a folder whose `model.py` imports the class from here, and whose `config.pbtxt`
lists the inputs. The module `triton_python_backend_utils` exists only inside of that server.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.errors import TilewrightError, UsageError
from tilewright.runtime.images.write import encode_image
from tilewright.runtime.restore import load

__all__ = ["IMAGE", "NOTES", "RESTORED", "ServerInput", "TritonPythonModel", "inputs_of"]

IMAGE, RESTORED, NOTES = "image", "restored", "notes"
TYPES = {"number": "TYPE_FP64", "integer": "TYPE_INT64"}  # the usual types of NumPy; all others are bytes


@dataclass(frozen=True)
class ServerInput:
    """An input of the model. Each holds one value."""

    name: str
    type: str
    optional: bool
    help: str


def inputs_of(program: Program, arguments: Mapping[str, Argument]) -> list[ServerInput]:
    """The image, the options that a request may set, and the bundle's arguments."""
    options = {
        "seed": "of the noise (default: 0)",
        "tile": "side of a tile in output pixels, instead of the bundle's",
        "overlap": "what neighbours share in output pixels, instead of the bundle's",
    }
    if any(p.steps for p in program.passes):
        options["steps"] = "sampling steps, instead of the bundle's"
    if program.any_scale:
        options["scale"] = f"enlarge by this (default: {program.scale})"
    replaceable = any(argument.kind == "tensors" for argument in arguments.values())  # tensors may replace words
    return [
        ServerInput(IMAGE, "TYPE_STRING", False, "the bytes of an image file"),
        *(ServerInput(name, "TYPE_INT64", True, text) for name, text in options.items()),
        *(
            ServerInput(name, TYPES.get(a.kind, "TYPE_STRING"), replaceable or not a.needed, _help(a))
            for name, a in arguments.items()
        ),
    ]


def _help(argument: Argument) -> str:
    takes = "the bytes of a safetensors file" if argument.kind == "tensors" else argument.takes
    return f"{argument.help}; {takes} ({argument.otherwise})".removeprefix("; ")


class TritonPythonModel:
    """Restores the image of each request."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engines of the bundle that config.pbtxt names."""
        import triton_python_backend_utils as server

        self.server = server
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.restorer = load(
            Path(args["model_repository"]) / said["bundle"],
            expect=said["digest"],
            weights_dir=said.get("weights_dir"),
            devices=said["devices"].split(","),
            threads=int(said["threads"]),
            memory=said["memory"],
        )
        bundle = self.restorer.bundle
        self.inputs = inputs_of(bundle.program, bundle.arguments)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """For each request the restored image as a PNG file, and notes; or an error."""
        return [self._response(request) for request in requests]

    def finalize(self) -> None:
        """Close the engines."""
        self.restorer.close()

    def _response(self, request: Any) -> Any:
        server = self.server
        try:
            with TemporaryDirectory() as folder:
                values = self._values(request, Path(folder))
                result = self.restorer.restore(values.pop(IMAGE), **values)
            png = encode_image(result.image, "png", icc=result.icc, exif=result.exif)
        except TilewrightError as error:
            return server.InferenceResponse(error=server.TritonError(str(error)))
        texts = {RESTORED: png, NOTES: "\n".join(result.notes).encode()}
        outputs = [server.Tensor(name, np.array([value], np.object_)) for name, value in texts.items()]
        return server.InferenceResponse(output_tensors=outputs)

    def _values(self, request: Any, folder: Path) -> dict[str, Any]:
        """The values of the inputs that a request holds. Tensors lie in a file of the folder."""
        arguments, values = self.restorer.arguments, dict[str, Any]()
        for spec in self.inputs:
            tensor = self.server.get_input_tensor_by_name(request, spec.name)
            if tensor is None:
                continue
            (value,) = tensor.as_numpy().reshape(-1).tolist()
            argument = arguments.get(spec.name)
            if argument and argument.kind == "tensors":
                file = folder / f"{spec.name}.safetensors"
                file.write_bytes(value)
                value = file
            elif isinstance(value, bytes) and spec.name != IMAGE:
                value = _text(spec.name, value)
            values[spec.name] = value
        return values


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8; give text") from None
