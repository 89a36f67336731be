"""A web server on the loopback that serves ranges of a directory's files as object stores do, with their faults.

In a test::

    with served(directory, faults=[Fault.BUSY]) as server:
        open_storage(server.url).read_into(...)
    assert server.ranges == [("__0_0.distcp", 0, 100)]
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.range_server import LoopbackServer, RangeHandler, etag_of


class Fault(Enum):
    """What goes wrong with one request."""

    SERVER_ERROR = 500
    BUSY = 503
    TOO_MANY = 429
    DENIED = 403
    RESET = "reset"  # the connection is reset before an answer
    CUT = "cut"  # the connection ends in the middle of the body
    SHORT = "short"  # half of the range, which is said to be all there is


class Asked(NamedTuple):
    """One request for a file."""

    method: str
    name: str
    start: int  # bytes
    stop: int  # bytes, exclusive
    fault: Fault | None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class RangeServer:
    """A server that runs, and what it was asked for.

    ``faults`` are met by the next requests for files, one each, sizes (HEAD) included.
    """

    def __init__(self, directory: Path, *, serves_ranges: bool, latency_s: float, faults: Sequence[Fault]) -> None:
        self.log: list[Asked] = []
        self.faults = list(faults)
        self.serves_ranges = serves_ranges
        self.tells_versions = True
        self.latency_s = latency_s  # of each request, before its first byte
        self._lock = threading.Lock()
        handler = functools.partial(_Handler, self, directory=str(directory))
        self._server = LoopbackServer(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """File, start, stop of each range that was asked for."""
        return [(asked.name, asked.start, asked.stop) for asked in self.log if asked.method == "GET"]

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        self._server.shutdown()

    def close(self) -> None:
        self._server.server_close()

    def note(self, method: str, name: str, start: int, stop: int) -> Fault | None:
        """Log a request. Returns what goes wrong with it."""
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.log.append(Asked(method, name, start, stop, fault))
        return fault


class _Handler(RangeHandler):
    def __init__(self, served: RangeServer, *args: Any, **kwargs: Any) -> None:
        self._served = served
        super().__init__(*args, **kwargs)

    def asks_for_range(self) -> bool:
        return self._served.serves_ranges and super().asks_for_range()

    def answer_file(self, path: Path, status: os.stat_result, *, body: bool) -> None:
        start, stop = self.asked_range(status.st_size)
        fault = self._served.note("GET" if body else "HEAD", path.name, start, stop)
        time.sleep(self._served.latency_s)
        if fault is Fault.RESET:
            self._reset()
            return
        refusal = fault.value if fault is not None and isinstance(fault.value, int) else self.refusal(start, status)
        if refusal is not None:
            self.refuse(refusal)
        else:
            self._send(path, start, min(stop, status.st_size), status, fault, body=body)

    def _send(
        self, path: Path, start: int, stop: int, status: os.stat_result, fault: Fault | None, *, body: bool
    ) -> None:
        middle = start + (stop - start) // 2
        stop = middle if fault is Fault.SHORT else stop
        self.begin(start, stop, status.st_size)
        self.send_header("Accept-Ranges", "bytes" if self._served.serves_ranges else "none")
        if self._served.tells_versions:
            self.send_header("ETag", etag_of(status))
        self.end_headers()
        if body:
            self._send_body(path, start, middle if fault is Fault.CUT else stop)
        if fault is Fault.CUT:
            self.close_connection = True

    def _send_body(self, path: Path, start: int, stop: int) -> None:
        if start < stop:
            with path.open("rb") as file:
                self.connection.sendfile(file, start, stop - start)

    def _reset(self) -> None:
        self.close_connection = True
        # No time to linger: what closes the connection resets it.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


@contextmanager
def served(
    directory: Path,
    *,
    serves_ranges: bool = True,
    latency_s: float = 0.0,
    faults: Sequence[Fault] = (),
) -> Iterator[RangeServer]:
    """A server of a directory, in threads of this process."""
    server = RangeServer(directory, serves_ranges=serves_ranges, latency_s=latency_s, faults=faults)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        server.close()
