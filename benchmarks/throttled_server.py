"""A web server on the loopback that serves ranges of a directory's files at the speed of an object store.

``python -m benchmarks.throttled_server DIRECTORY --bandwidth 400e6 --latency 0.02`` prints its URL and serves until its
standard input is closed; ``GET /.asked`` says how much it has served.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.range_server import LoopbackServer, RangeHandler, etag_of

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


class _Handler(RangeHandler):
    def __init__(self, line: Line, *args: Any, **kwargs: Any) -> None:
        self._line = line
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if self.path == ASKED_PATH:
            text = json.dumps(self._line.asked()).encode()
            self.begin(0, len(text), len(text))
            self.end_headers()
            self.wfile.write(text)
        else:
            super().do_GET()

    def answer_file(self, path: Path, status: os.stat_result, *, body: bool) -> None:
        self._line.add_request()
        start, stop = self.asked_range(status.st_size)
        refusal = self.refusal(start, status)
        if refusal is not None:
            self.refuse(refusal)
            return
        stop = min(stop, status.st_size)
        self.begin(start, stop, status.st_size)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag_of(status))
        self.end_headers()
        if body:
            self._send_body(path, start, stop)

    def _send_body(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as file:
            for place in range(start, stop, _SLICE_BYTES):
                count = min(_SLICE_BYTES, stop - place)
                self._line.send(count)
                self.connection.sendfile(file, place, count)


def main() -> None:
    """Serve a directory until standard input is closed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throttled_server", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bandwidth", type=float, default=float("inf"), help="bytes a second, of all together")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds a request")
    given = parser.parse_args()
    handler = functools.partial(_Handler, Line(given.bandwidth, given.latency), directory=str(given.directory))
    server = LoopbackServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    server.shutdown()
    thread.join()
    server.server_close()


if __name__ == "__main__":
    main()
