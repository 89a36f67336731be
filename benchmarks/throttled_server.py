"""A web server on the loopback that serves ranges of a directory's files at the speed of an object store.

``python -m benchmarks.throttled_server DIRECTORY --bandwidth 400e6 --latency 0.02`` prints its URL and serves until its
standard input is closed; ``GET /.asked`` says how much it has served.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ASKED_PATH = "/.asked"  # answers what was served so far; not throttled, not counted
_SLICE_BYTES = 256 * 1024  # sent at once, before the bandwidth is asked for more


class Line:
    """What all connections share, and what went through it."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self.latency_s = latency_s  # of each request, before its first byte
        self._bytes_per_s = bytes_per_s  # of all connections together
        self._lock = threading.Lock()
        self._free_at_s = 0.0  # when the line has sent all that it was given
        self._requests = 0
        self._bytes = 0

    def asked(self) -> dict[str, int]:
        """Requests for files and bytes of their bodies, so far."""
        with self._lock:
            return {"requests": self._requests, "bytes": self._bytes}

    def add_request(self) -> None:
        """Count a request, and wait for its latency."""
        with self._lock:
            self._requests += 1
        time.sleep(self.latency_s)

    def send(self, nbytes: int) -> None:
        """Wait until the bytes that were sent before, by anybody, and these have gone through."""
        with self._lock:
            self._bytes += nbytes
            start_s = max(time.monotonic(), self._free_at_s)
            self._free_at_s = start_s + nbytes / self._bytes_per_s
            wait_s = self._free_at_s - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the acknowledgement of its headers: 40 ms

    def __init__(self, line: Line, *args: Any, **kwargs: Any) -> None:
        self._line = line
        super().__init__(*args, **kwargs)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        if self.path == ASKED_PATH:
            text = json.dumps(self._line.asked()).encode()
            self._start(200, len(text))
            self.end_headers()
            self.wfile.write(text)
        else:
            self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            super().do_GET() if body else super().do_HEAD()
            return
        if not path.is_file():
            self._refuse(404)
            return
        self._line.add_request()
        status = path.stat()
        etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if self.headers.get("If-Match", etag) != etag:
            self._refuse(412)
            return
        start, stop = self._range(status.st_size)
        if start >= status.st_size and "Range" in self.headers:
            self._refuse(416)
            return
        self._describe(start, stop, status.st_size, etag)
        if body:
            self._send_body(path, start, stop)

    def _range(self, size: int) -> tuple[int, int]:
        if "Range" not in self.headers:
            return 0, size
        start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(start), min(int(last) + 1, size) if last else size

    def _describe(self, start: int, stop: int, size: int, etag: str) -> None:
        self._start(206 if "Range" in self.headers else 200, stop - start)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.end_headers()

    def _send_body(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as file:
            for place in range(start, stop, _SLICE_BYTES):
                count = min(_SLICE_BYTES, stop - place)
                self._line.send(count)
                self.connection.sendfile(file, place, count)

    def _refuse(self, status: int) -> None:
        self._start(status, 0)
        self.end_headers()

    def _start(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def main() -> None:
    """Serve a directory until standard input is closed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throttled_server", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bandwidth", type=float, default=float("inf"), help="bytes a second, of all together")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds a request")
    given = parser.parse_args()
    handler = functools.partial(_Handler, Line(given.bandwidth, given.latency), directory=str(given.directory))
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    server.shutdown()
    thread.join()
    server.server_close()


if __name__ == "__main__":
    main()
