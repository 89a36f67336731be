"""Started by a raylet in the place of Ray's own program: lets the fork server start a worker, and waits for its end.

See `tests.support.forked_workers`. It imports little, as it runs once for each worker.
"""

import json
import os
import socket
import sys

SOCKET = "SHARDFERRY_TESTS_FORK_SERVER"  # environment variable: the path of the fork server's socket
ORIGINAL = "SHARDFERRY_TESTS_SETUP_WORKER"  # environment variable: the path of Ray's own program
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="


def start_worker(arguments: list[str]) -> None:
    """A runtime environment that changes more than environment variables is left to Ray's own program."""
    context = json.loads(next((a.removeprefix(_CONTEXT) for a in arguments if a.startswith(_CONTEXT)), "{}"))
    variables = context.pop("env_vars", {})
    if f"{_LANGUAGE}PYTHON" not in arguments or any(v and v != sys.executable for v in context.values()):
        os.execv(sys.executable, [sys.executable, os.environ[ORIGINAL], *arguments])
    wanted = {
        "arguments": [a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE, "-s", "-S"))],
        "environment": {**os.environ, **variables},
        "directory": os.getcwd(),  # noqa: PTH109 - pathlib is one more import
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(os.environ[SOCKET])
        content = json.dumps(wanted).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        connection.recv(1)  # the child has ended


if __name__ == "__main__":
    start_worker(sys.argv[1:])
