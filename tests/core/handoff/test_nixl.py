"""The transport `nixl` beside what its contract says: who has no package is told, and nothing stays of an arena that is gone."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from shardferry.arena import HostArena
from shardferry.errors import HandoffError
from shardferry.handoff import nixl
from shardferry.handoff.nixl import Nixl
from shardferry.handoff.transport import Route
from shardferry.handoff.transports import transport_named
from tests.support.transport_contract import content, is_content


def filled(nbytes: int = 1000) -> HostArena:
    arena = HostArena(nbytes)
    arena.as_bytes().copy_(content(1, nbytes))
    return arena


def test_the_tests_have_the_package() -> None:
    """Else those of the contract would be skipped."""
    transport_named("nixl").load().require()


def test_what_is_registered_goes_with_the_arena() -> None:
    arena, before = filled(), len(nixl._SERVING)
    sent = Nixl.from_arena(arena, exclusive=False)
    assert is_content(sent.open(), 1, 1000)
    assert len(nixl._SERVING) == before + 1
    del arena
    assert len(nixl._SERVING) == before
    with pytest.raises(HandoffError, match=f"the loader \\(process {sent.pid}\\) that held this shard has ended"):
        replace(sent, route=Route(timeout_s=20.0)).open()


def test_without_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = filled()
    sent = Nixl.from_arena(arena, exclusive=False)
    monkeypatch.setitem(sys.modules, "nixl", None)
    for act in (Nixl.require, lambda: Nixl.from_arena(arena, exclusive=False), sent.open):
        with pytest.raises(HandoffError, match=r"handoff\.transport nixl needs the package nixl .*pip install"):
            act()


def test_the_handle_tells_no_address() -> None:
    arena = filled()
    assert "agent" not in repr(Nixl.from_arena(arena, exclusive=False))
    assert torch.equal(arena.as_bytes(), content(1, 1000)), "the arena is not changed"
