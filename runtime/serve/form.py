"""The fields of a request, checked and converted. A request names no file and no URL: it carries all that is used."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from starlette.datastructures import FormData, UploadFile

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.program import Input
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.images.color import COLORS
from tilewright.runtime.images.read import image_size
from tilewright.runtime.inputs import checked
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.serve.bundles import ServedBundle
from tilewright.runtime.serve.image_request import ImageRequest
from tilewright.runtime.serve.refusals import Refusal
from tilewright.runtime.serve.service import Service

__all__ = ["AnswerOptions", "answer_options", "image_request_of"]

FORMATS = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # names of OpenAI's -> suffixes
NEUTRAL = {  # fields of OpenAI's whose only accepted values change nothing
    "n": ("1",),
    "response_format": ("b64_json",),
    "quality": ("auto", "high", "standard"),
    "background": ("auto",),
    "input_fidelity": ("high",),
    "output_compression": ("100",),
    "moderation": ("auto", "low"),
}
IGNORED = ("user", "safety_identifier")
WHOLE = {"seed": (0, WORD_MAX), "steps": (1, 10_000), "scale": (1, 16), "tile": (0, 1 << 20), "overlap": (0, 1 << 20)}
FILES = ("image", "image[]", "mask")
SIZE = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})", re.ASCII)
TRUTH = {"true": True, "1": True, "false": False, "0": False}
LONGEST_SHOWN = 60


@dataclass(frozen=True)
class AnswerOptions:
    """How the answer of a request should come."""

    stream: bool = False
    parts: bool = False  # of a stream: each part of the picture as soon as it is final
    partial_images: int = 0  # of a stream: whole pictures on the way


def answer_options(form: FormData) -> AnswerOptions:
    """How the answer should come."""
    stream, parts = (_truth(form, name) for name in ("stream", "parts"))
    partial = _whole(form, "partial_images", 0, 3) or 0
    if (parts or partial) and not stream:
        name = "parts" if parts else "partial_images"
        raise _wrong(name, f"{name} needs stream=true; send both or none")
    return AnswerOptions(stream, parts, partial)


def image_request_of(form: FormData, service: Service) -> ImageRequest:
    """The image and the options of a request. The image is not decoded: its size is read from its header."""
    image = _image(form)
    model = _text(form, "model") or service.first
    if model not in service.bundles.roots:
        names = ", ".join(service.bundles.roots)
        raise Refusal(404, f"model {_short(model)} is not one of {names}", "model_not_found", "model")
    served = service.bundles.current(model)
    try:
        size = image_size(image)
    except InputError as error:
        raise Refusal(415, str(error), "unsupported_image", "image") from None
    width, height = size
    if not width * height:
        raise _wrong("image", f"the image is {width}x{height} and has no pixels; send one of at least 1x1")
    most = service.settings.max_pixels
    if width * height > most:
        text = f"the image is {width}x{height} = {width * height} pixels, over the limit of {most}; send a smaller one"
        raise Refusal(413, text, "image_too_large", "image")
    arguments = _arguments(form, served)
    options: dict[str, Any] = {
        name: value for name, ends in WHOLE.items() if (value := _whole(form, name, *ends)) is not None
    }
    _check_steps(options, served)
    options |= _color(form)
    options |= {"jitter": True} if _truth(form, "jitter") else {}
    if (scale := _scale_of_size(form, size, served)) is not None:
        if options.get("scale", scale) != scale:
            raise _wrong("size", f"size and scale={options['scale']} ask for two sizes; send one of them")
        options["scale"] = scale
    mask = _mask(form, size)
    _check_neutral(form, served)
    format_ = _text(form, "output_format") or "png"
    if format_ not in FORMATS:
        raise _wrong("output_format", f"output_format {_short(format_)} is not one of {', '.join(FORMATS)}")
    sizes: dict[str, Any] = {name: options[name] for name in ("tile", "overlap", "steps", "scale") if name in options}
    try:
        layers = (mask is not None) + ("color" in options)
        room = service.room_for(served, size, sizes, layers=layers, file=_length(image))
    except UsageError as error:
        raise Refusal(422, str(error), "invalid_value") from None
    longest = service.settings.deadline_s
    chosen = _number(form, "deadline_s")
    seconds = longest if chosen is None else chosen
    if not 0 < seconds <= longest:
        raise _wrong("deadline_s", f"deadline_s={seconds:g} is not above 0 and at most {longest:g}")
    return ImageRequest(model, image, *room, format=format_, options=options | arguments, mask=mask, seconds=seconds)


def _image(form: FormData) -> BinaryIO:
    images = [*form.getlist("image"), *form.getlist("image[]")]
    if len(images) > 1:
        raise _wrong("image", f"{len(images)} images are sent; send one in each request")
    if not images:
        raise _wrong("image", "no image is sent; send a file in the field image")
    if not isinstance(images[0], UploadFile):
        raise _wrong("image", "image is a text; send the file itself, no path, no URL and no base64")
    return images[0].file


def _mask(form: FormData, size: tuple[int, int]) -> BinaryIO | None:
    """The mask, if there is one. It has the size of the image."""
    values = form.getlist("mask")
    if not values:
        return None
    if len(values) > 1 or not isinstance(values[0], UploadFile):
        raise _wrong("mask", "mask is not one file; send the file itself, once")
    try:
        width, height = image_size(values[0].file)
    except InputError as error:
        raise Refusal(415, str(error).replace("image", "mask", 1), "unsupported_image", "mask") from None
    if (width, height) != size:
        text = f"the mask has {width}x{height} px and the image {size[0]}x{size[1]}; send one of the image's size"
        raise _wrong("mask", text)
    return values[0].file


def _arguments(form: FormData, served: ServedBundle) -> dict[str, Any]:
    """The bundle's arguments. An empty prompt is the bundle's default, as OpenAI's clients always send one."""
    listed = served.bundle.arguments
    usual = {*NEUTRAL, *IGNORED, *WHOLE, *FILES}
    usual |= {"model", "prompt", "size", "output_format", "stream", "parts", "partial_images", "deadline_s"}
    usual |= {"color", "jitter"}
    if unknown := [name for name in form if name not in usual and name not in listed]:
        takes = ", ".join(listed) or "no arguments of its own"
        raise _wrong(unknown[0], f"unknown field {_short(unknown[0])}; {served.name} takes {takes}")
    if _text(form, "prompt") and "prompt" not in listed:
        raise _wrong("prompt", f"{served.name} takes no prompt; send an empty one, or none")
    values: dict[str, Any] = {}
    for name, argument in listed.items():
        if name not in form:
            continue
        if argument.kind == "tensors":
            raise _wrong(name, f"{name} is a file of tensors, which the service does not take; leave it out")
        text = _text(form, name) or ""
        if text or (argument.kind == "words" and name != "prompt"):
            values[name] = _value(name, text, argument, served.bundle.program.inputs.get(name))
    for name, argument in listed.items():
        if argument.needed and argument.kind != "tensors" and name not in values:
            raise _wrong(name, f"{name} has no default; send it: {argument.help or argument.takes}")
    return values


def _value(name: str, text: str, argument: Argument, spec: Input | None) -> Any:
    if argument.kind == "words" or spec is None:
        return text
    value: Any = text
    if not spec.choices:
        try:
            value = float(text) if "float" in spec.dtype else int(text)
        except ValueError:
            raise _wrong(name, f"{name}={_short(text)} is not {argument.takes}") from None
    try:
        checked(name, f"{name}={_short(text)}", spec, value)
    except UsageError as error:
        raise _wrong(name, str(error)) from None
    return value


def _check_steps(options: Mapping[str, Any], served: ServedBundle) -> None:
    if "steps" in options and not any(p.steps for p in served.bundle.program.passes):
        raise _wrong("steps", f"steps={options['steps']}: {served.name} has no steps; leave it out")


def _color(form: FormData) -> dict[str, str]:
    color = _text(form, "color") or "off"
    if color not in COLORS:
        raise _wrong("color", f"color={_short(color)} is not one of {', '.join(COLORS)}")
    return {} if color == "off" else {"color": color}


def _scale_of_size(form: FormData, size: tuple[int, int], served: ServedBundle) -> int | None:
    """The scale that gives the size of the result that is asked for."""
    text = _text(form, "size") or "auto"
    if text == "auto":
        return None
    program = served.bundle.program
    parsed = SIZE.fullmatch(text)
    sides = (int(parsed[1]), int(parsed[2])) if parsed else (0, 0)
    scale = max(1, sides[0] // size[0])
    able = range(1, 17) if program.any_scale else (program.scale,)
    if scale not in able or sides != (size[0] * scale, size[1] * scale):
        near = min(able, key=lambda n: abs(n - scale))
        possible = f"{size[0] * near}x{size[1] * near}"
        raise _wrong("size", f"size {_short(text)} is no size that this image can get; send auto, or {possible}")
    return scale


def _check_neutral(form: FormData, served: ServedBundle) -> None:
    for name, accepted in NEUTRAL.items():
        text = _text(form, name)
        if text and text not in accepted and name not in served.bundle.arguments:
            raise _wrong(
                name, f"{name}={_short(text)} does not work here; send {' or '.join(accepted)}, or leave it out"
            )


def _text(form: FormData, name: str) -> str | None:
    values = form.getlist(name)
    if not values:
        return None
    if len(values) > 1 or not isinstance(values[0], str):
        raise _wrong(name, f"{_short(name)} is not one text; send it once, as a plain field")
    return values[0]


def _truth(form: FormData, name: str) -> bool:
    text = (_text(form, name) or "false").lower()
    if text not in TRUTH:
        raise _wrong(name, f"{name}={_short(text)} is not true or false")
    return TRUTH[text]


def _whole(form: FormData, name: str, least: int, most: int) -> int | None:
    text = _text(form, name)
    if not text:
        return None
    number = int(text) if re.fullmatch(r"\d{1,20}", text, re.ASCII) else -1
    if not least <= number <= most:
        raise _wrong(name, f"{name}={_short(text)} is not a whole number from {least} to {most}")
    return number


def _number(form: FormData, name: str) -> float | None:
    text = _text(form, name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(name, f"{name}={_short(text)} is not a number")
    return number


def _length(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _short(text: str) -> str:
    """A text of a client as one short line."""
    shown = repr(text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[: LONGEST_SHOWN - 4]}...'"


def _wrong(name: str, text: str) -> Refusal:
    return Refusal(422, text, "invalid_value", name if len(name) <= LONGEST_SHOWN else None)
