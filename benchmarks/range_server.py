"""What the loopback web servers of the tests and benchmarks share: they serve ranges of a directory's files, with versions."""

from __future__ import annotations

import os
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """A thread a connection; many clients may connect at once."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers for directories and for missing files. A subclass answers for files, in `answer_file`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the acknowledgement of its headers: 40 ms

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            super().do_GET() if body else super().do_HEAD()
        elif path.is_file():
            self.answer_file(path, path.stat(), body=body)
        else:
            self.refuse(404)

    def answer_file(self, path: Path, status: os.stat_result, *, body: bool) -> None:
        """Answer a request for a file; without ``body`` for its size and version."""
        raise NotImplementedError

    def asks_for_range(self) -> bool:
        """Whether the request is for a part of a file."""
        return "Range" in self.headers

    def asked_range(self, size: int) -> tuple[int, int]:
        """First byte and the byte after the last one that are asked for, of a file of ``size`` bytes; it may be shorter."""
        if not self.asks_for_range():
            return 0, size
        start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(start), int(last) + 1 if last else size

    def refusal(self, start: int, status: os.stat_result) -> int | None:
        """The HTTP status that refuses a request from ``start`` on: another version, or nothing there. None: it is served."""
        if self.headers.get("If-Match", etag_of(status)) != etag_of(status):
            return 412
        return 416 if start >= status.st_size and self.asks_for_range() else None

    def begin(self, start: int, stop: int, size: int) -> None:
        """The status and the headers of a body from ``start`` to ``stop``."""
        self.send_response(206 if self.asks_for_range() else 200)
        if self.asks_for_range():
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))

    def refuse(self, status: int) -> None:
        """Answer with an HTTP status alone."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def etag_of(status: os.stat_result) -> str:
    """The version of a file, in quotes."""
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
