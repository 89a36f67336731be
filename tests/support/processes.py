"""Processes for tests: forked from a server that has imported what they need, and has started no thread.

One costs milliseconds, where a spawned one imports torch for seconds of CPU.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "pytest",
    "shardferry.dcp",
    "shardferry.load",
    "shardferry.storage.obstore",
    "tests.support.matrix",
    "torch._dynamo",  # DTensors import it with their first operation
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.distributed.checkpoint.state_dict",
]


def forking() -> ForkServerContext:
    """Like the module `multiprocessing`; the server starts with the first process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
