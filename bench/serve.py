"""The service under load, and what it adds to the runtime. Prints JSON.

- load: 1,000 requests of 32 clients. 5 % are malformed, 5 % hang up. Every good answer is compared with the runtime's.
- throughput: images a second of the service by those of `restore IN_DIR`, on the same images, in turns.
- latency: the median time of one request less that of the same restoration in Python.
- stop: SIGTERM while clients send; every request that was accepted must get its picture.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image

from tilewright.runtime import encode_image, load
from tilewright.runtime.folder import restore_images

CLIENTS, REQUESTS, WARM = 32, 1000, 100
KINDS = ("good",) * 18 + ("malformed", "hang up")
ROUNDS = 5
BOUNDARY = "b" * 20


@contextlib.contextmanager
def service(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its address."""
    words = ["runtime", "serve", "--bundle", str(bundle), "--port", "0", "--json", "-q", *options]
    command = [sys.executable, "-m", "tilewright", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = ""
        while not lines.endswith("\n}\n"):
            lines += process.stdout.readline()
        try:
            yield process, json.loads(lines)["url"]
        finally:
            process.terminate()


def scene(side: int, key: int) -> np.ndarray:
    """A picture with soft shapes and noise."""
    y, x = np.mgrid[:side, :side]
    soft = np.stack([120 + 60 * np.sin((y + key) / 9 + c) * np.cos(x / 7) for c in range(3)], axis=2)
    noise = np.random.default_rng(key).normal(0, 8, soft.shape)
    return (soft + noise).clip(0, 255).astype(np.uint8)


def rss(process: int) -> int:
    """The memory of a process that is in use."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


def picture(answer: httpx2.Response) -> np.ndarray:
    """The pixels of an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def hang_up(url: str, file: bytes) -> None:
    """Send an image, and hang up soon."""
    place = urlsplit(url)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode()
    body = head + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    lines = (
        f"POST /v1/images/edits HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {len(body)}\r\n"
        f"content-type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(lines.encode() + body)
        time.sleep(random.uniform(0, 0.2))


def load_of(bundle: Path, side: int, *options: str) -> dict[str, Any]:
    """Many requests of many clients."""
    images = [scene(side, key) for key in range(8)]
    with load(bundle, threads=1, batch=1) as restorer:
        expected = [restorer(image) for image in images]
    files = [encode_image(image) for image in images]
    dice = random.Random(0)
    kinds = [dice.choice(KINDS) for _ in range(REQUESTS)]
    counts: Counter[str] = Counter()
    after: dict[int, int] = {}
    lock = threading.Lock()
    with (
        service(bundle, "--threads", "1", "--batch", "1", *options) as (process, url),
        httpx2.Client(base_url=url, timeout=600, limits=httpx2.Limits(max_connections=CLIENTS)) as client,
    ):

        def send(number: int) -> None:
            kind, which = kinds[number], number % len(images)
            if kind == "hang up":
                hang_up(url, files[which])
                said = "hung up"
            elif kind == "malformed":
                broken, fields, code = random.Random(number).choice(
                    [
                        (files[which][: len(files[which]) // 2], {}, 422),
                        (b"text", {}, 415),
                        (files[which], {"n": "2"}, 422),
                    ]
                )
                answer = client.post("/v1/images/edits", files={"image": ("a.png", broken)}, data=fields)
                said = "malformed: its code" if answer.status_code == code else f"malformed: {answer.status_code}"
            else:
                answer = client.post("/v1/images/edits", files={"image": ("a.png", files[which])})
                same = answer.status_code == 200 and np.array_equal(picture(answer), expected[which])
                said = "good: right bytes" if same else f"good: {answer.status_code}"
            with lock:
                counts[said] += 1
                if sum(counts.values()) in (WARM, REQUESTS):
                    after[sum(counts.values())] = rss(process.pid)

        begun = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(send, range(REQUESTS)))
        seconds = time.perf_counter() - begun
        left = client.get("/metrics").text
    running = [line for line in left.splitlines() if line.startswith(("tilewright_queue ", "tilewright_running "))]
    return {
        "answers": dict(sorted(counts.items())),
        "seconds": seconds,
        "rss_after_100": after[WARM],
        "rss_at_end": after[REQUESTS],
        "growth": after[REQUESTS] / after[WARM] - 1,
        "left": running,
    }


def cpu_s(process: int) -> float:
    """The CPU time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(bundle: Path, side: int, count: int) -> dict[str, Any]:
    """Images a second and CPU time an image, of the service and of a folder, in turns.

    The clients of the service run in this process; their CPU time does not count.
    """
    rates: dict[str, list[float]] = {"folder": [], "service": []}
    cpu: dict[str, list[float]] = {"folder": [], "service": []}
    with (
        tempfile.TemporaryDirectory() as place,
        service(bundle, "--threads", "1") as (process, url),
        load(bundle, threads=1) as restorer,
        httpx2.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        folder = Path(place) / "in"
        folder.mkdir()
        for key in range(count):
            (folder / f"{key:03}.png").write_bytes(encode_image(scene(side, key)))
        files = [path.read_bytes() for path in sorted(folder.iterdir())]

        def send(file: bytes) -> int:
            return client.post("/v1/images/edits", files={"image": ("a.png", file)}).status_code

        assert send(files[0]) == 200
        restorer(scene(side, 0))
        for number in range(ROUNDS):
            out = Path(place) / f"out{number}"
            out.mkdir()
            begun, spent = time.perf_counter(), time.process_time()
            ends = restore_images(restorer, [(p, out / p.name) for p in sorted(folder.iterdir())])
            rates["folder"].append(count / (time.perf_counter() - begun))
            cpu["folder"].append((time.process_time() - spent) / count)
            assert not any(end.error for end in ends)
            begun, spent = time.perf_counter(), cpu_s(process.pid)
            assert set(pool.map(send, files)) == {200}
            rates["service"].append(count / (time.perf_counter() - begun))
            cpu["service"].append((cpu_s(process.pid) - spent) / count)
    rate, time_of = ({name: statistics.median(v) for name, v in values.items()} for values in (rates, cpu))
    return {
        "images_per_s": rates,
        "cpu_s_per_image": cpu,
        "ratio": rate["service"] / rate["folder"],
        "cpu_ratio": time_of["service"] / time_of["folder"],
        "images": count,
        "side": side,
    }


def latency(bundle: Path, side: int, runs: int) -> dict[str, Any]:
    """What a request adds to a restoration with a file in and a file out."""
    image = encode_image(scene(side, 0))
    rounds: dict[str, list[float]] = {"python_p50_s": [], "http_p50_s": [], "added_p50_s": []}
    with (
        service(bundle, "--threads", "1") as (_, url),
        httpx2.Client(base_url=url) as client,
        load(bundle, threads=1) as restorer,
    ):
        for _ in range(ROUNDS):
            in_python, over_http = [], []
            for number in range(runs + 5):
                begun = time.perf_counter()
                encode_image(restorer(image))
                middle = time.perf_counter()
                answer = client.post("/v1/images/edits", files={"image": ("a.png", image)})
                ended = time.perf_counter()
                assert answer.status_code == 200
                if number >= 5:  # the first ones warm up
                    in_python.append(middle - begun)
                    over_http.append(ended - middle)
            rounds["python_p50_s"].append(statistics.median(in_python))
            rounds["http_p50_s"].append(statistics.median(over_http))
            rounds["added_p50_s"].append(statistics.median(over_http) - statistics.median(in_python))
    return rounds | {"added_median_s": statistics.median(rounds["added_p50_s"]), "runs": runs, "side": side}


def stop(bundle: Path, side: int, count: int) -> dict[str, Any]:
    """SIGTERM while clients send."""
    file = encode_image(scene(side, 0))
    counts: Counter[str] = Counter()
    with service(bundle, "--threads", "1", "--max-queue", "1000") as (process, url):

        def send(_: int) -> str:
            try:
                answer = httpx2.post(f"{url}/v1/images/edits", files={"image": ("a.png", file)}, timeout=600)
            except httpx2.TransportError as error:
                return type(error).__name__
            return str(answer.status_code)

        with ThreadPoolExecutor(count) as pool:
            ends = [pool.submit(send, number) for number in range(count)]
            while sum(end.done() for end in ends) < 3:
                time.sleep(0.01)
            numbers = httpx2.get(f"{url}/metrics").text.splitlines()
            names = ("tilewright_queue ", "tilewright_running ", "tilewright_images_total")
            accepted = sum(int(float(line.split()[1])) for line in numbers if line.startswith(names))
            os.kill(process.pid, signal.SIGTERM)
            counts.update(end.result() for end in ends)
        code = process.wait()
    return {
        "accepted_before": accepted,
        "answers": dict(counts),
        "exit": code,
        "lost": max(0, accepted - counts["200"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of hitoksr tiny")
    parser.add_argument("--only", choices=("load", "throughput", "latency", "stop"))
    arguments = parser.parse_args()
    parts = {
        "load": lambda: load_of(arguments.bundle, 24, "--max-queue", "100"),
        "throughput": lambda: throughput(arguments.bundle, 96, 24),
        "latency": lambda: latency(arguments.bundle, 24, 200),
        "stop": lambda: stop(arguments.bundle, 96, 32),
    }
    chosen = [arguments.only] if arguments.only else list(parts)
    print(json.dumps({name: parts[name]() for name in chosen}, indent=1))
