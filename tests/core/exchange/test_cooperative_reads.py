"""Ranks of a node that read for each other: real gloo ranks, real memory files, counted bytes, every element bitwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shardferry.config import MessageLimits
from shardferry.errors import RankError, ShardferryError
from shardferry.load_live import load_optimizer_state
from tests.support.cooperative import SHAPES, TOPOLOGIES, UNIQUE_BYTES, load, total
from tests.support.damage import short_file
from tests.support.models import save_fsdp2
from tests.support.oracle import full_tensor
from tests.support.range_server import Fault, served
from tests.support.ranks import RankPool


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cooperative") / "ckpt"
    ranks.run(4, save_fsdp2, str(path), SHAPES)
    return str(path)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_node_reads_each_byte_once(ranks: RankPool, saved: str, topology: str, size: int) -> None:
    results = ranks.run(size, load, saved, topology, "cooperative", [None])
    assert total(results, "read") <= 1.02 * UNIQUE_BYTES + 64 * 1024, "headers of a few chunks, and nothing twice"
    assert total(results, "done") == total(results, "needed")
    assert total(results, "sent") == total(results, "received")
    assert all(result["shared"] for result in results)
    if topology != "rows":
        assert total(results, "received") > 0
    if topology in ("columns", "whole"):
        reads = [result["read"] for result in results]
        assert max(reads) <= 1.25 * UNIQUE_BYTES / size + 64 * 1024, "readers take equal shares"


@pytest.mark.parametrize("topology", ["columns", "replicas"])
def test_direct_reads_are_no_ones_but_the_ranks_own(ranks: RankPool, saved: str, topology: str) -> None:
    results = ranks.run(4, load, saved, topology, "direct", [None])
    assert not any(result["shared"] or result["sent"] or result["received"] for result in results)
    assert total(results, "read") >= total(results, "needed")


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("size", "nodes"), [(2, ["a", "b"]), (4, ["a", "b"]), (8, ["a", "a", "b", "b", "c"])])
def test_several_nodes_read_each_byte_once_together(
    ranks: RankPool, saved: str, topology: str, size: int, nodes: list[str | None]
) -> None:
    """Ranks of different nodes share no memory: what one reads for another goes through the process group."""
    results = ranks.run(size, load, saved, topology, "cooperative", nodes)
    assert total(results, "read") <= 1.02 * UNIQUE_BYTES + 64 * 1024
    assert total(results, "done") == total(results, "needed")
    assert total(results, "sent") == total(results, "received")
    assert all(result["shared"] for result in results)
    if topology == "whole":
        num_nodes = len({nodes[rank % len(nodes)] for rank in range(size)})
        steps = 4 * len(SHAPES)
        assert total(results, "forwarded") == (num_nodes - 1) * (UNIQUE_BYTES + steps), "to each other node once"


@pytest.mark.parametrize("topology", ["columns", "replicas", "whole"])
def test_small_messages_and_many_of_them(ranks: RankPool, saved: str, topology: str) -> None:
    results = ranks.run(4, load_with_small_messages, saved, topology)
    assert total(results, "read") <= 1.02 * UNIQUE_BYTES + 64 * 1024


def load_with_small_messages(path: str, topology: str) -> dict[str, int]:
    return load(path, topology, "cooperative", ["a", "b", "c", "d"], messages=MessageLimits(message_bytes=4096))


def load_to_two_names(path: str) -> list[bool]:
    """One saved parameter for two live ones, as where it was tied; whether each has what was saved."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 48, bias=False) for name in ("one", "other")})
    optimizer = torch.optim.AdamW(model.parameters())
    names = ["one.weight", "other.weight"]
    load_optimizer_state(
        model, optimizer, path, strategy="cooperative", rename={"w.weight": names}, keys="ignore_unexpected"
    )
    full = full_tensor("w.weight", "exp_avg", (48, 64))
    return [torch.equal(optimizer.state[parameter]["exp_avg"], full) for parameter in model.parameters()]


def test_a_saved_tensor_for_two_names_reaches_both(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_fsdp2, str(tmp_path / "ckpt"), {"w.weight": (48, 64)})
    assert ranks.run(2, load_to_two_names, str(tmp_path / "ckpt")) == [[True, True]] * 2


def load_damaged(path: str, nodes: list[str | None]) -> str:
    try:
        load(path, "whole", "cooperative", nodes)
    except ShardferryError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize("nodes", [[None], ["a", "b", "c"]], ids=["one node", "three nodes"])
def test_a_failing_reader_fails_all(ranks: RankPool, tmp_path: Path, nodes: list[str | None]) -> None:
    ranks.run(2, save_fsdp2, str(tmp_path / "ckpt"))
    short_file(tmp_path / "ckpt")
    messages = ranks.run(3, load_damaged, str(tmp_path / "ckpt"), nodes)
    assert all("is cut" in message for message in messages), messages
    assert not any(message == "loaded" for message in messages)


def die_before_reading(path: str) -> str:
    """Rank 1's arena is gone when the others write to it."""
    from shardferry.exchange import peer_memory as peers

    rank = dist.get_rank()
    original = peers.ArenaAddress.of

    def elsewhere(arena: object) -> peers.ArenaAddress:
        address = original(arena)  # type: ignore[arg-type]
        return peers.ArenaAddress(2**22 + os.getpid() % 2, address.descriptor, address.inode, address.directory_offset)

    if rank == 1:
        peers.ArenaAddress.of = staticmethod(elsewhere)  # type: ignore[method-assign, assignment]
    try:
        load(path, "whole", "cooperative", [None])
    except (RankError, ShardferryError) as error:
        return str(error)
    finally:
        peers.ArenaAddress.of = original  # type: ignore[method-assign]
    return "loaded"


def test_an_arena_that_is_gone_is_named(ranks: RankPool, saved: str) -> None:
    messages = ranks.run(3, die_before_reading, saved)
    assert all("the arena of rank 1 (process" in message for message in messages)


@pytest.mark.parametrize(("nodes", "is_cooperative"), [([None], 0), (["a", "b"], 1)], ids=["one node", "two nodes"])
def test_auto_reads_files_directly_on_one_node_and_cooperatively_on_several(
    ranks: RankPool, saved: str, nodes: list[str | None], is_cooperative: int
) -> None:
    results = ranks.run(2, load, saved, "whole", "auto", nodes)
    assert [result["shared"] for result in results] == [is_cooperative] * 2
    if is_cooperative:
        assert total(results, "read") <= 1.02 * UNIQUE_BYTES + 64 * 1024


@pytest.mark.parametrize("topology", ["columns", "replicas"])
def test_a_web_server_gives_each_byte_once(ranks: RankPool, saved: str, topology: str) -> None:
    """The server's own log is the judge, of bytes and of requests; one request is refused, and made again."""
    with served(Path(saved), faults=[Fault.BUSY]) as server:
        results = ranks.run(4, load, server.url, topology, "auto", [None])
        data = [one for one in server.ranges if one[0].endswith(".distcp")]
    assert all(result["shared"] for result in results)
    num_bytes = sum(stop - start for _, start, stop in data)
    assert num_bytes <= 1.02 * UNIQUE_BYTES + 64 * 1024
    assert len(data) <= 64, "4 files of 8 large and 8 small items each: no request for each small item"
