"""The verb `tilewright runtime serve`."""

import argparse
import logging
import sys
from pathlib import Path

from tilewright.cli.engine_arguments import engine_arguments
from tilewright.cli.restore import minutes
from tilewright.cli.terminal import answer, note
from tilewright.runtime.memory.machine import bytes_of

__all__ = ["serve", "serve_arguments"]


def serve_arguments(serve: argparse.ArgumentParser) -> None:
    """Add what a service takes."""
    serve.add_argument(
        "--bundle", type=Path, action="append", required=True, metavar="DIR", help="may be given several times"
    )
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="0 is any that is free (default: 8080)")
    serve.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a file with a secret that requests must carry, readable by you only",
    )
    serve.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    serve.add_argument(
        "--max-pixels", type=int, metavar="N", default=100_000_000, help="refuse larger inputs (default: 100 million)"
    )
    serve.add_argument("--max-body", default="64MiB", metavar="SIZE", help="refuse larger requests (default: 64MiB)")
    serve.add_argument("--deadline", type=float, default=3600.0, metavar="SECONDS", help="of a request (default: 3600)")
    serve.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="keep jobs there (default: they end with the service)"
    )
    serve.add_argument(
        "--checkpoint",
        type=minutes,
        default=1.0,
        metavar="MINUTES",
        help="keep finished parts of jobs in --state-dir this often; 0 is only at a stop (default: 1)",
    )
    serve.add_argument(
        "--keep", type=float, default=24.0, metavar="HOURS", help="remove the result of a job after this (default: 24)"
    )
    engine_arguments(serve)


def serve(arguments: argparse.Namespace) -> None:
    """Run a service until a signal ends it."""
    from tilewright.runtime.bundle.read import require_bundle
    from tilewright.runtime.serve.settings import Settings, is_loopback, listen, name_of, read_token

    for bundle in arguments.bundle:
        require_bundle(bundle)
    token = read_token(arguments.token_file) if arguments.token_file else None
    local = is_loopback(arguments.host)
    limit = None if arguments.memory_limit is None else bytes_of(arguments.memory_limit)
    engines = {
        "engine": arguments.engine,
        "memory": arguments.memory,
        "threads": arguments.threads,
        "devices": arguments.devices.split(","),
        "batch": arguments.batch,
        "weights_dir": arguments.weights_dir,
        "cluster": arguments.cluster,
    }
    settings = Settings(
        bundles=arguments.bundle,
        engines=engines,
        memory_limit=limit,
        max_queue=arguments.max_queue,
        max_pixels=arguments.max_pixels,
        max_body=bytes_of(arguments.max_body, "max_body"),
        deadline_s=arguments.deadline,
        token=token,
        state_dir=arguments.state_dir,
        checkpoint_s=60 * arguments.checkpoint,
        keep_s=3600 * arguments.keep,
        hosts=("localhost", "127.0.0.1", "::1", arguments.host) if local else (),
    )
    listener = listen(arguments.host, arguments.port)
    from PIL import Image

    from tilewright.runtime.serve.server import serve as run

    Image.MAX_IMAGE_PIXELS = None  # --max-pixels decides alone; this process runs nothing else
    if not arguments.quiet:
        logging.getLogger("tilewright").setLevel(logging.INFO)
    if not local and token is None:
        note(arguments, f"whoever reaches {arguments.host} may use this service; add --token-file")
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    value = {"url": url, "bundles": [name_of(path) for path in arguments.bundle]}

    def ready() -> None:
        answer(arguments, value, f"serving {', '.join(value['bundles'])} at {url}; Ctrl-C ends it")
        sys.stdout.flush()

    with listener:
        run(settings, listener, ready)
