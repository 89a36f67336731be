"""Ray workers that are forked from a process that has imported torch: importing it takes 5 s of CPU.

Ray starts a worker as ``python SETUP_WORKER ARGUMENTS``. `forked_workers` puts `tests.support.start_forked_worker` in the place of
SETUP_WORKER, which asks the fork server for a child with its own arguments, environment, directory and standard files. The raylets, the
workers and their start are Ray's; tests of jobs and of a first start don't use this.

``python -m tests.support.forked_workers run MODULE ARGUMENTS`` is ``python -m MODULE ARGUMENTS`` with such workers.

This is the one place that knows Ray's private names for it; tests/support/test_forked_workers.py fails where they change.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support import start_forked_worker
from tests.support.start_forked_worker import ORIGINAL, SOCKET

_POLL_S = 1.0

# Not Ray itself: it reads the environment while it is imported.
_PRELOADED = (
    "shardferry.load_live",
    "shardferry.receiver",
    "shardferry.schemas",
    "tests.support.models",
    "numpy.random",
    "psutil",
    "google.protobuf.json_format",  # from here on: what Ray imports, half of its time
    "jsonschema",
    "requests",
    "yaml",
)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Within the ``with``, the raylets that this process starts fork their workers. A parent's fork server serves its children."""
    from ray._private import ray_constants
    from ray._private.services import RAY_PATH

    file = ray_constants.SETUP_WORKER_FILENAME
    with contextlib.nullcontext() if SOCKET in os.environ else _fork_server():
        os.environ[ORIGINAL] = str(Path(RAY_PATH) / "_private" / "workers" / file)
        ray_constants.SETUP_WORKER_FILENAME = start_forked_worker.__file__
        try:
            yield
        finally:
            ray_constants.SETUP_WORKER_FILENAME = file


@contextlib.contextmanager
def _fork_server() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="sf-fork-") as directory:
        os.environ[SOCKET] = str(Path(directory) / "socket")
        command = [sys.executable, "-m", "tests.support.forked_workers", "serve", os.environ[SOCKET]]
        server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        try:
            yield
        finally:
            del os.environ[SOCKET]
            server.kill()
            server.wait()


def _serve(path: str) -> None:
    """Fork a child for each connection, as long as the process that has started this one lives."""
    parent = os.getppid()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)  # who connects meanwhile waits for the imports
    listener.listen(256)
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listener.settimeout(_POLL_S)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _be_worker(connection)
            connection.close()


def _be_worker(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # as Ray does with the workers that it starts
    connection.settimeout(None)
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += connection.recv(1 << 16)
    wanted = json.loads(content)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["directory"])
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    sys.argv = wanted["arguments"]
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


def _end_with(connection: socket.socket) -> None:
    """Ray may kill the process that it has started, before it knows this one."""
    connection.recv(1)
    os._exit(1)


def _run(module: str) -> None:
    """As ``python -m MODULE ARGUMENTS``, with forked workers."""
    with forked_workers():
        sys.argv = sys.argv[2:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    {"serve": _serve, "run": _run}[sys.argv[1]](sys.argv[2])
