"""The zoo's libraries are in its own environment only: see scripts/zoo."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("pytorch_optimizer") else ["test_zoo.py"]
