"""Requests that no client would send: no answer is an error of ours. FUZZ_REQUESTS=100000 sends more of them."""

import http.client
import json
import os
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bundles import tint_bundle
from support.pictures import chunk
from support.scenes import scene
from support.served import Served, png_of, served
from support.stepped import stepped

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "400"))
IMAGE = png_of(scene(9, 11))
FIELDS = (
    *("image", "image[]", "mask", "model", "prompt", "size", "n", "response_format", "output_format", "stream"),
    *("parts", "partial_images", "seed", "steps", "scale", "tile", "overlap", "deadline_s", "lift", "gain", "look"),
    *("quality", "background", "user", "__proto__", "", "a" * 300, "\x00", "ids", "self", "resume", "on_progress"),
)
VALUES = (
    *(
        "",
        "0",
        "1",
        "-1",
        "1e400",
        "nan",
        "inf",
        "\u0661",
        "9" * 400,
        "true",
        "None",
        "null",
        "[]",
        "{}",
        "auto",
        "52x40",
    ),
    *("11x9", "0x0", "1x1", "png", "jpeg", "b64_json", "url", "steps", "tint", "../steps", "/etc/passwd", "%00", "\n"),
    *("file:///etc/passwd", "http://127.0.0.1/", "dim", "é" * 50, "\ud7ff", "0.5", "2", "16", "17", "1_0", " 3 "),
)
PATHS = (
    *("/v1/images/edits", "/v1/jobs", "/v1/images/edits?x=%00", "/v1/jobs/x/result", "/v1/models/..%2f..%2fetc"),
    *("/v1/models/%ff", "//v1/models", "/v1/images/edits/", "/*", "/metrics", "/v2/health/ready", "/%2e%2e/", "/"),
)
HEADERS = (
    *(("content-length", "99999999999999999999"), ("content-length", "-1"), ("authorization", "Bearer \xff")),
    *(("host", ""), ("host", "[::1"), ("origin", "null"), ("transfer-encoding", "chunked"), ("range", "bytes=0-")),
    *(("expect", "100-continue"), ("content-encoding", "gzip"), ("accept", "\xff"), ("cookie", "=" * 3000)),
)
TYPES = (
    *("multipart/form-data; boundary=x", "multipart/form-data", "multipart/form-data; boundary=", "application/json"),
    *("application/x-www-form-urlencoded", "multipart/form-data; boundary=x; charset=utf-16", "", "\xff/\xff"),
    *("multipart/form-data; boundary=" + "y" * 200, "multipart/mixed; boundary=x", "MULTIPART/FORM-DATA; BOUNDARY=x"),
)


def damaged(dice: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, cut out or repeated."""
    block = bytearray(data)
    for _ in range(dice.choice((0, 1, 1, 2, 8))):
        at, length = dice.randrange(len(block) + 1), dice.choice((1, 1, 4, 40))
        kind = dice.randrange(3)
        if kind == 0:
            block[at : at + length] = dice.randbytes(length)
        elif kind == 1:
            del block[at : at + length]
        else:
            block[at:at] = block[at : at + length]
    return bytes(block)


def image_like(dice: random.Random) -> bytes:
    """Something that may be an image."""
    size = dice.randbytes(8) + dice.choice((b"\x08\x02", b"\x10\x06", b"\x01\x00", dice.randbytes(2))) + bytes(3)
    starts = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size), b"\xff\xd8\xff\xe0", b"II*\x00\x08\0\0\0", b"GIF89a", b"BM")
    return dice.choice((IMAGE, damaged(dice, IMAGE), dice.choice(starts) + dice.randbytes(dice.randrange(60)), b""))


def form(dice: random.Random) -> bytes:
    """The body of a form, with the boundary x."""
    lines = b""
    names = [
        *dice.choices(FIELDS, k=dice.choice((0, 0, 0, 1, 1, 2, 5))),
        *dice.choices(("image", "mask", "prompt"), (20, 1, 1)),
    ]
    for name in names:
        is_file = dice.random() < (0.9 if name in ("image", "image[]", "mask") else 0.05)
        value = image_like(dice) if is_file else dice.choice(VALUES).encode("utf-8", "surrogatepass")
        filename = '; filename="../../x.png"' if is_file else ""
        lines += f'--x\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + value + b"\r\n"
    body = lines + b"--x--\r\n"
    return damaged(dice, body) if dice.random() < 0.3 else body


def request(dice: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """A request: method, path, headers and body."""
    path = dice.choice(PATHS[:1] * 40 + PATHS)
    method = dice.choice(("POST",) * 60 + ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"))
    headers = {"content-type": dice.choice(TYPES[:1] * 60 + TYPES)}
    headers |= dict(dice.sample(HEADERS, k=dice.choice((0,) * 9 + (1, 2))))
    kind = dice.random()
    if kind < 0.75:
        return method, path, headers, form(dice)
    if kind < 0.9:
        document = {dice.choice(FIELDS): dice.choice([*VALUES, 3, None, [], {}]) for _ in range(3)}
        return method, path, headers | {"content-type": "application/json"}, json.dumps(document).encode()
    return method, path, headers, "".join(dice.choices(string.printable, k=dice.randrange(200))).encode()


def answer_to(service: Served, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer; status 0 if the server hangs up, as it may at broken HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", service.client.base_url.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value.encode("latin-1"))
        if not {"content-length", "transfer-encoding"} & headers.keys():
            connection.putheader("content-length", str(len(body)))
        connection.endheaders()
        if "content-length" not in headers or "transfer-encoding" in headers:
            connection.send(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, ConnectionError):
        return 0, b""
    finally:
        connection.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root: Path = tmp_path_factory.mktemp("bundles")
    with served(stepped(root / "steps"), tint_bundle(root / "tint"), upload_s=0.2, max_queue=8, keep_s=5) as service:
        yield service


@pytest.mark.slow
def test_no_request_is_an_error_of_ours(service, caplog) -> None:
    counts: dict[int, int] = {}
    for number in range(REQUESTS):
        method, path, headers, body = request(random.Random(number))
        status, text = answer_to(service, method, path, headers, body)
        assert status < 500 or status == 503, f"request {number}: {status}, {text!r}"
        assert b"Traceback" not in text and b"/tmp" not in text, f"request {number}: {text!r}"
        counts[status] = counts.get(status, 0) + 1
        if status >= 400 and method != "HEAD" and text.startswith(b"{"):
            assert "\n" not in json.loads(text)["error"]["message"]
    ours = [record for record in caplog.records if record.name == "tilewright"]
    assert not [record.message for record in ours if record.levelname == "ERROR"], counts
    assert {200, 400, 404, 405, 413, 415, 422} <= counts.keys(), counts
    assert service.edit(IMAGE).status_code == 200
    print(dict(sorted(counts.items())))
