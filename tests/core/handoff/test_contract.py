"""The contract of transports, for arenas on the host; tests/gpu has it for those on a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch

from shardferry.arena import HostArena
from shardferry.errors import HandoffError
from shardferry.handoff.transports import TRANSPORTS, TransportEntry
from tests.support.leftovers import no_shared_files_left
from tests.support.processes import forking
from tests.support.transport_contract import TransportContract, carriers, content

CARRIERS = carriers(torch.device("cpu"))
WITHIN = [transport for transport in TRANSPORTS if not transport.crosses_processes]


@pytest.fixture(params=CARRIERS, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> TransportEntry:
    found: TransportEntry = request.param
    return found


class TestArenasOnTheHost(TransportContract):
    device = torch.device("cpu")
    context = forking()

    @pytest.fixture(autouse=True)
    def _nothing_left(self) -> Iterator[None]:
        with no_shared_files_left():
            yield


def test_every_transport_is_tested_somewhere() -> None:
    """Those that carry no arena on the host are tested by tests/gpu, as they keep one on its device."""
    assert {"shared_memory", "object_store", "collective", "nixl"} <= {transport.name for transport in CARRIERS}
    assert all(transport.keeps_on_device for transport in TRANSPORTS if transport not in CARRIERS)


@pytest.mark.parametrize("within", WITHIN, ids=lambda transport: transport.name)
@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
def test_within_a_process_all_have_the_arena_itself(within: TransportEntry, exclusive: bool) -> None:
    arenas = [HostArena(100, is_shareable=False), HostArena(100)]
    for seed, arena in enumerate(arenas):
        arena.as_bytes().copy_(content(seed, 100))
    one, other = (within.load().from_arena(arena, exclusive=exclusive) for arena in arenas)
    first, again, second = one.open(), one.open(), other.open()
    assert torch.equal(first, content(0, 100))
    assert torch.equal(second, content(1, 100))
    first.fill_(7)
    assert torch.equal(again, first)
    assert torch.equal(second, content(1, 100))
    for arena in arenas:
        arena.close()
    assert torch.equal(second, content(1, 100)), "memory lives as long as a tensor uses it"
    with pytest.raises(HandoffError, match="can't leave its process"):
        pickle.dumps(one)
