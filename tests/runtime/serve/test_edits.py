"""POST /v1/images/edits: the bytes of the runtime, the fields of OpenAI's and of the bundle, and every refusal."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from support.bundles import tint_bundle
from support.scenes import scene
from support.served import Served, pixels_of, png_of, served
from support.stepped import stepped
from tilewright.runtime import load


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return {"steps": stepped(root / "steps"), "tint": tint_bundle(root / "tint")}


@pytest.fixture(scope="module")
def service(bundles) -> Iterator[Served]:
    with served(*bundles.values(), max_pixels=100_000) as service:
        yield service


IMAGE = scene(40, 52)


@pytest.fixture(scope="module")
def restored(bundles) -> dict[str, np.ndarray]:
    pictures = {}
    with load(bundles["steps"], threads=1) as restorer:
        pictures["steps"] = restorer(IMAGE)
        pictures["steps, 2 steps, lift 0.25"] = restorer(IMAGE, steps=2, lift=0.25)
    with load(bundles["tint"], threads=1) as restorer:
        pictures["tint"] = restorer(IMAGE)
        pictures["tint, wavelet"] = restorer(IMAGE, color="wavelet")
        pictures["tint, dim, three times"] = restorer(IMAGE, prompt="dim warm", gain=-1.5, scale=3)
    return pictures


@pytest.mark.parametrize(
    ("fields", "picture"),
    [
        ({}, "steps"),
        ({"model": "steps", "prompt": "", "n": 1, "size": "52x40", "response_format": "b64_json"}, "steps"),
        ({"steps": 2, "lift": 0.25, "seed": 7, "user": "u", "quality": "high"}, "steps, 2 steps, lift 0.25"),
        ({"model": "tint", "prompt": ""}, "tint"),
        ({"model": "tint", "color": "wavelet", "jitter": "false"}, "tint, wavelet"),
        ({"model": "tint", "prompt": "dim warm", "gain": -1.5, "size": "156x120"}, "tint, dim, three times"),
        ({"model": "tint", "prompt": "dim warm", "gain": "-1.5", "scale": 3}, "tint, dim, three times"),
    ],
)
def test_an_image_comes_back_as_the_runtime_restores_it(service, restored, fields, picture) -> None:
    assert np.array_equal(pixels_of(service.edit(IMAGE, **fields)), restored[picture])


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_result_has_the_format_that_is_asked_for(service, restored, name, kind) -> None:
    answer = service.edit(IMAGE, output_format=name)
    assert answer.json()["output_format"] == name and answer.json()["size"] == "52x40"
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert picture.format == kind and picture.size == (52, 40)
    assert np.abs(np.asarray(picture).astype(int) - restored["steps"]).mean() < 4


@pytest.mark.parametrize("grey", [False, True])
def test_where_a_mask_is_not_transparent_the_enlarged_source_stays(service, grey) -> None:
    image = IMAGE[:, :, 0] if grey else IMAGE
    mask = np.zeros((40, 52, 4), np.uint8)
    mask[:, 26:, 3] = 255
    whole = pixels_of(service.edit(image, model="tint", gain=2, scale=2))
    files = {"image": ("a.png", png_of(image)), "mask": ("m.png", png_of(mask))}
    fields = {"model": "tint", "gain": "2", "scale": "2"}
    mixed = pixels_of(service.client.post("/v1/images/edits", files=files, data=fields))
    source = np.asarray(Image.fromarray(image).resize((104, 80), Image.Resampling.BICUBIC))
    assert np.array_equal(mixed[:, :50], whole[:, :50]) and not np.array_equal(whole, source)
    assert np.array_equal(mixed[:, 54:], source[:, 54:])


@pytest.mark.parametrize(
    ("mask", "status", "part"),
    [
        (np.zeros((40, 50, 4), np.uint8), 422, "the mask has 50x40 px and the image 52x40"),
        (np.zeros((40, 52, 3), np.uint8), 422, "the mask has no transparency; send a PNG of 52x40 px"),
        (b"no picture", 415, "the mask is damaged"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(service, mask, status, part) -> None:
    files = {"image": ("a.png", png_of(IMAGE)), "mask": ("m.png", png_of(mask))}
    answer = service.client.post("/v1/images/edits", files=files)
    assert answer.status_code == status and part in answer.json()["error"]["message"], answer.text


def test_a_turned_photo_comes_back_upright(service, bundles) -> None:
    turned = Image.fromarray(IMAGE)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    turned.save(file := io.BytesIO(), "PNG", exif=turned.getexif())
    answer = service.edit(file.getvalue())
    with load(bundles["steps"], threads=1) as restorer:
        assert np.array_equal(pixels_of(answer), restorer(np.ascontiguousarray(np.rot90(IMAGE, -1))))
    assert answer.json()["size"] == "40x52"


def assert_refused(answer, status: int, part: str, param: str | None = None) -> None:
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert part in error["message"] and "\n" not in error["message"] and len(error["message"]) < 300, error


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"n": 2}, "n", "n='2' does not work here; send 1, or leave it out"),
        ({"response_format": "url"}, "response_format", "send b64_json"),
        ({"size": "1024x1024"}, "size", "send auto, or 52x40"),
        ({"size": "big"}, "size", "'big' is no size"),
        ({"output_format": "gif"}, "output_format", "is not one of png, jpeg, webp"),
        ({"prompt": "a bridge"}, "prompt", "steps takes no prompt"),
        ({"gain": 1}, "gain", "unknown field 'gain'; steps takes lift"),
        ({"lift": "much"}, "lift", "lift='much' is not a number from 0 to 1"),
        ({"lift": 2}, "lift", "lift='2' is not a number from 0 to 1"),
        ({"lift": "nan"}, "lift", "not finite"),
        ({"steps": 0}, "steps", "is not a whole number from 1 to 10000"),
        ({"seed": "-1"}, "seed", "seed='-1' is not a whole number"),
        ({"scale": 2}, None, "scale=2 does not work with this bundle"),
        ({"color": "blue"}, "color", "color='blue' is not one of off, wavelet, adain"),
        ({"model": "tint", "jitter": "true"}, None, "has no pass that joins its tiles"),
        ({"stream": "maybe"}, "stream", "is not true or false"),
        ({"parts": "true"}, "parts", "parts needs stream=true"),
        ({"deadline_s": 0}, "deadline_s", "deadline_s=0 is not above 0"),
        ({"model": "tint", "steps": 3}, "steps", "tint has no steps"),
        ({"model": "tint", "look": "/etc/passwd"}, "look", "which the service does not take"),
        ({"model": "tint", "scale": 2, "size": "52x40"}, "size", "ask for two sizes"),
        ({"model": "tint", "scale": 17}, "scale", "from 1 to 16"),
        ({"tile": 3}, None, "tile=3"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(service, fields, param, part) -> None:
    assert_refused(service.edit(IMAGE, **fields), 422, part, param)


def test_a_request_carries_one_image_and_no_place_where_one_lies(service, tmp_path) -> None:
    (tmp_path / "in.png").write_bytes(png_of(IMAGE))
    post, two = service.client.post, [("image[]", ("a.png", png_of(IMAGE)))] * 2
    assert_refused(post("/v1/images/edits", files=two), 422, "2 images are sent", "image")
    only = {"prompt": (None, "")}
    assert_refused(post("/v1/images/edits", files=only), 422, "no image is sent", "image")
    for place in (str(tmp_path / "in.png"), "file:///etc/passwd", "http://127.0.0.1/a.png"):
        answer = post("/v1/images/edits", files={"image": (None, place)})
        assert_refused(answer, 422, "no path, no URL", "image")
    assert_refused(
        post("/v1/images/edits", files={"image": ("a", png_of(IMAGE)), "mask": (None, "x")}), 422, "mask", "mask"
    )


def test_bytes_that_are_no_image_and_bodies_that_are_no_form_are_told_apart(service) -> None:
    assert_refused(service.edit(b"no image"), 415, "is damaged or not an image", "image")
    assert_refused(service.client.post("/v1/images/edits", json={"image": "x"}), 415, "is no multipart/form-data")
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert_refused(service.client.post("/v1/images/edits", content=b"--y", headers=kind), 400, "Invalid multipart data")
    assert_refused(service.edit(png_of(IMAGE)[:-200]), 422, "replace the damaged or cut file")
    assert_refused(service.client.get("/v1/images/edits"), 405, "Method Not Allowed")
    assert_refused(service.client.get("/v1/nothing"), 404, "Not Found")
    assert_refused(service.edit(IMAGE, model="other"), 404, "'other' is not one of steps, tint", "model")


def test_a_large_image_is_refused_by_its_header(service) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    sizes = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = png_of(IMAGE)
    assert_refused(service.edit(data[:8] + sizes + data[33:]), 413, "60000x60000 = 3600000000 pixels, over", "image")


def test_bundles_are_listed_as_models(service) -> None:
    listed = service.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["steps", "tint"]
    tint = service.client.get("/v1/models/tint").json()
    assert tint == listed["data"][1]
    assert tint["any_scale"] and tint["arguments"].keys() == {"prompt", "gain"}  # a file is no field
    assert tint["arguments"]["gain"] | {"help": ""} == {
        "kind": "number", "help": "", "default": 1.0, "choices": [], "least": -8, "most": 8, "needed": False,
    }  # fmt: skip
    assert service.client.get("/v1/models/none").status_code == 404


@pytest.fixture(scope="module")
def client(service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_works(client, restored) -> None:
    assert [model.id for model in client.models.list()] == ["steps", "tint"]
    image = ("a.png", png_of(IMAGE))
    answer = client.images.edit(
        image=[image], prompt="dim warm", model="tint", n=1, size="156x120", extra_body={"gain": -1.5}
    )
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
    assert np.array_equal(pixels, restored["tint, dim, three times"]) and answer.size == "156x120"
    with pytest.raises(openai.UnprocessableEntityError, match="steps takes no prompt") as caught:
        client.images.edit(image=image, prompt="a bridge")
    assert caught.value.param == "prompt" and caught.value.code == "invalid_value"


@pytest.mark.slow
def test_the_official_client_gets_a_stream(client, restored) -> None:
    large = np.tile(IMAGE, (6, 6, 1))
    fields = {"parts": "true"}
    image = ("a.png", png_of(large))
    events = [*client.images.edit(image=image, prompt="", stream=True, partial_images=1, extra_body=fields)]
    *_, last = events
    assert last.type == "image_edit.completed" and last.size == "312x240"
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(last.b64_json))))
    assert whole.shape == large.shape
    painted = np.zeros_like(whole)
    for event in events:
        if event.type == "image_edit.part":
            part = np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))))
            assert part.shape[:2] == (event.height, event.width)
            painted[event.top : event.top + event.height, event.left : event.left + event.width] = part
        if event.type == "image_edit.partial_image":  # none comes if the picture is done before one is looked for
            partial = np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))))
            assert partial.shape == whole.shape and event.partial_image_index == 0
    assert np.array_equal(painted, whole)
    assert {"image_edit.part", "image_edit.completed"} <= {e.type for e in events}


def test_an_error_in_a_stream_is_the_official_clients(client) -> None:
    with pytest.raises(openai.APIError, match="replace the damaged or cut file"):
        [*client.images.edit(image=("a.png", png_of(IMAGE)[:-200]), prompt="", stream=True)]
