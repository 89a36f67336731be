"""Which programs made a report, and when. Nothing of them is imported: the dry run needs no Ray."""

from __future__ import annotations

import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shardferry import __version__


def made_by() -> dict[str, Any]:
    """The fields ``versions`` and ``finished`` of a report."""
    versions = {"shardferry": __version__}
    for name in ("torch", "ray"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": {**versions, "python": platform.python_version()}, "finished": now}
