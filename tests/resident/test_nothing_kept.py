"""A cluster in whose memory nothing is kept."""

from __future__ import annotations

import json

from shardferry import kept
from tests.support.commands import Command


def test_the_list_says_so(cluster: None, shardferry: Command) -> None:
    assert kept() == []
    assert shardferry("kept").stdout == "nothing is kept in this cluster\n"
    assert json.loads(shardferry("kept", "--json").stdout) == {"kept": []}
