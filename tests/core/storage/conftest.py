"""Servers that start once for all tests of storages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server, in a process of its own."""
    with s3_server() as server:
        yield server
