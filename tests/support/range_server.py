"""A web server on the loopback that lists a directory and serves ranges of its files, as object stores do."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, directory: Path, *, serves_ranges: bool) -> None:
        self.ranges: list[tuple[str, int, int]] = []  # file, start, stop of each range that was asked for
        self.serves_ranges = serves_ranges
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(directory)))


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if asked is None or not self.server.serves_ranges:
            super().do_GET()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        start, last = map(int, asked.removeprefix("bytes=").split("-"))
        self.server.ranges.append((path.name, start, last + 1))
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(last + 1 - start)
        if not data:
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read what they want to know from `_Server.ranges`."""


@contextmanager
def range_server(directory: Path, *, serves_ranges: bool = True) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """The directory's URL, and the list of ranges that grows as they are asked for."""
    server = _Server(directory, serves_ranges=serves_ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
