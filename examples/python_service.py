"""A service of your own: POST an image, and get it restored as PNG.

python examples/python_service.py BUNDLE PORT
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore

from tilewright.runtime import TilewrightError, encode_image, load

PLACES = BoundedSemaphore(2)  # images at once: each needs memory


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            with PLACES:  # a third client waits here
                restored = restorer.restore(self.rfile.read(int(self.headers["Content-Length"])), max_pixels=10_000_000)
            status, body = 200, encode_image(restored.image, ".png", icc=restored.icc, exif=restored.exif)
        except TilewrightError as error:  # one line that says what to do
            status, body = 422, f"{error}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "image/png" if status == 200 else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


with load(sys.argv[1], memory_limit="4GiB") as restorer:
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
