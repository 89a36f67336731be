"""Which tests share a process of pytest-xdist, and which are started first: see `pytest_xdist_make_scheduler` in conftest.py.

The longest work comes first, so that at the end no process waits for one that has just begun.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# By the start of the file's path: tests that share something costly, a Ray or a server or ranks, run in one process.
_TOGETHER = (
    ("tests/pipeline/test_stage.py", "tests/examples/test_larger_pipeline.py", "tests/actors/"),
    ("tests/pipeline/test_bad_input.py", "tests/programs/", "tests/package/"),
    ("tests/pipeline/test_cli.py",),
    ("tests/conformance/test_matrix.py",),
    ("benchmarks/",),
    ("tests/pipeline/test_job.py",),
    ("tests/core/storage/",),
)


class LongestFirst(LoadScopeScheduling):
    """Gives each process the tests of whole files."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((starts[0] for starts in _TOGETHER if file.startswith(starts)), file)


def place_of(nodeid: str) -> int:
    """Where the test's group stands among all: the longest have places of their own, the others share the last."""
    return next((place for place, starts in enumerate(_TOGETHER) if nodeid.startswith(starts)), len(_TOGETHER))
