"""A real S3 server (moto's) on the loopback, in a process of its own, that logs what it is asked for.

``python -m tests.support.s3_server`` prints its port, then a line for each request, and serves until its standard input
is closed.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKET = "bucket"
_START_S = 120


class Asked(NamedTuple):
    """One request."""

    method: str
    key: str  # without the bucket
    range: str  # as in the header: "bytes=0-9"; empty without one

    @property
    def nbytes(self) -> int:
        start, _, last = self.range.removeprefix("bytes=").partition("-")
        return int(last) + 1 - int(start)


@dataclass
class S3Server:
    """A server that runs, with one bucket."""

    port: int
    _lines: queue.Queue[str] = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """``storage_options`` for it."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}",
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        }

    def filesystem(self) -> Any:
        """pyarrow's filesystem of it."""
        from pyarrow.fs import S3FileSystem

        return S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            access_key="test",
            secret_key="test",
        )

    def put(self, prefix: str, files: Mapping[str, bytes]) -> None:
        import obstore
        from obstore.store import S3Store

        store = S3Store(BUCKET, prefix=prefix, config=self.options, client_options={"allow_http": True})
        for name, data in files.items():
            obstore.put(store, name, data)

    def asked(self) -> list[Asked]:
        """The requests since the last call. Complete, as a request is logged before it is answered."""
        found = []
        mark = f"/{BUCKET}/mark"
        _request("HEAD", f"http://127.0.0.1:{self.port}{mark}")
        while (line := self._lines.get(timeout=60)) != f"HEAD\t{mark}\t":
            method, path, asked_range = line.split("\t")
            found.append(Asked(method, path.removeprefix(f"/{BUCKET}/"), asked_range))
        return found


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with an empty bucket."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.s3_server"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    lines: queue.Queue[str] = queue.Queue()
    reading = threading.Thread(target=lambda out: [lines.put(line.rstrip("\n")) for line in out], args=[process.stdout])
    reading.start()
    try:
        port = int(lines.get(timeout=_START_S))
        _request("PUT", f"http://127.0.0.1:{port}/{BUCKET}")
        lines.get(timeout=60)
        yield S3Server(port, lines)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        reading.join()
        process.stdout.close()


def _request(method: str, url: str) -> None:
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request(method, parts.path)
    connection.getresponse().read()
    connection.close()


def _serve() -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    answer = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()

    def logged(environ: dict[str, Any], start_response: Any) -> Any:
        with writing:
            print(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""), sep="\t", flush=True)
        return answer(environ, start_response)

    server = make_server("127.0.0.1", 0, logged, threaded=True)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
