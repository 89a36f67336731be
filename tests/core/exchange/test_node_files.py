"""Checkpoints on the nodes' own disks: ranks read for each other what their node has, or one error says what each lacks."""

from __future__ import annotations

import math
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import shardferry
from shardferry.config import LoadRequest, ReadOptions, Selection
from shardferry.errors import ShardferryError
from shardferry.exchange.agreement import Agreement
from shardferry.exchange.node_files import NodeFiles, lacking_error
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import HeldBy, SpecLayout
from shardferry.load import LoadJob, load_rank, open_for_all
from shardferry.stats import Counters
from shardferry.storage.open import open_storage
from tests.support.cooperative import SHAPES, TOPOLOGIES, UNIQUE_BYTES, total
from tests.support.cooperative import load as load_spec
from tests.support.models import save_fsdp2
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool


def rank(node: str, lacking: str, needed: str, host: str = "") -> NodeFiles:
    return NodeFiles(node, host or node, frozenset(lacking), frozenset(needed))


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        pytest.param([rank("a", "", "pq"), rank("b", "", "pq")], [], id="shared"),
        pytest.param([rank("a", "q", "p"), rank("b", "p", "q")], [], id="each needs its own"),
        pytest.param([rank("a", "p", "p"), rank("b", "p", "p")], [], id="on no node"),
        pytest.param(
            [rank("a", "q", "pq"), rank("b", "p", "pq")],
            [
                "node a (rank 0) lacks 1 of the files (q), which rank 1 has",
                "node b (rank 1) lacks 1 of the files (p), which rank 0 has",
            ],
            id="both lack some",
        ),
        pytest.param(
            [rank("a", "qr", "q"), rank("a", "qr", "r"), rank("b", "p", "q")],
            ["node a (rank 0, 1) lacks 2 of the files (q, r), which rank 2 has"],
            id="two ranks of a node",
        ),
        pytest.param(
            [rank("a", "q", "q", "host"), rank("b", "", "", "host")], ["node a (rank 0)"], id="one host's name"
        ),
    ],
)
def test_the_error_of_all_ranks(ranks: list[NodeFiles], says: list[str]) -> None:
    error = lacking_error("ckpt", ranks, "read.strategy is direct")
    assert (error is not None) == bool(says)
    assert all(part in str(error) for part in says)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5))
    model = fully_shard(layers, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer


def save(path: str) -> None:
    model, optimizer = network()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.03
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)


def distribute(ckpt: Path, base: Path, files: dict[str, str]) -> None:
    """Give each node a directory with some ranks' files; node 0 has the metadata."""
    for node, of_ranks in files.items():
        (base / node).mkdir()
        for of_rank in of_ranks:
            (file,) = ckpt.glob(f"__{of_rank}_*.distcp")
            shutil.copy2(file, base / node)
    shutil.copy2(ckpt / ".metadata", base / "0")


def load(base: str, strategy: str) -> str:
    """As on node ``rank // 2`` of two, each with a disk of its own."""
    node = str(dist.get_rank() // 2)
    model, optimizer = network()
    try:
        shardferry.load_optimizer_state(model, optimizer, f"{base}/{node}", strategy=strategy, node=node)
    except ShardferryError as error:
        assert not optimizer.state
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("world_size", "files", "lacked"),
    [
        pytest.param(4, {"0": "0123", "1": "23"}, {1: "01"}, id="what two ranks need"),
        pytest.param(3, {"0": "01", "1": "23"}, {0: "23", 1: "01"}, id="both lack some"),
        pytest.param(3, {"0": "", "1": "0123"}, {0: "0123"}, id="values that rank 0 reads for all"),
    ],
)
def test_direct_reads_say_on_all_ranks_which_files_which_node_lacks(
    world_size: int, files: dict[str, str], lacked: dict[int, str], ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(4, save, str(tmp_path / "ckpt"))
    distribute(tmp_path / "ckpt", tmp_path, files)
    for message in ranks.run(world_size, load, str(tmp_path), "direct"):
        assert message.startswith("MissingFile: ")
        for node in (0, 1):
            assert (f"node {node} (rank {2 * node}" in message) == (node in lacked)
        for of_ranks in lacked.values():
            names = ", ".join(f"__{of_rank}_0.distcp" for of_rank in of_ranks)
            assert f"lacks {len(of_ranks)} of the files ({names})" in message
        assert (
            "read.strategy is direct. Let ranks that have a file read it for the others (strategy: cooperative)"
            in message
        )


def compare(base: str, strategy: str, nodes: str) -> int:
    """Load from the node's own disk, and with stock torch from the whole checkpoint; bytes that are equal."""
    node = nodes[dist.get_rank()]
    (model, optimizer), (other_model, other) = network(), network()
    shardferry.load_optimizer_state(model, optimizer, f"{base}/{node}", strategy=strategy, node=node)
    other_model(torch.zeros(2, 6)).sum().backward()
    other.step()
    wanted = {"optim": get_optimizer_state_dict(other_model, other)}
    dcp.load(wanted, checkpoint_id=f"{base}/ckpt")
    set_optimizer_state_dict(other_model, other, wanted["optim"])
    assert [{**group, "params": 0} for group in optimizer.param_groups] == [
        {**group, "params": 0} for group in other.param_groups
    ]
    assert optimizer.param_groups[0]["lr"] == 0.03
    compared = 0
    for mine, its in zip(model.parameters(), other_model.parameters(), strict=True):
        assert optimizer.state[mine].keys() == other.state[its].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer.state[mine].items():
            found, expected = (getattr(t, "_local_tensor", t) for t in (value, other.state[its][name]))
            assert torch.equal(found, expected), name
            compared += found.nbytes
    return compared


DISKS = [
    pytest.param({"0": "01", "1": "23"}, id="each node has what its ranks saved"),
    pytest.param({"0": "23", "1": "01"}, id="each has the other's, with the values"),
    pytest.param({"0": "0123", "1": ""}, id="one has all"),
    pytest.param({"0": "", "1": "0123"}, id="one has the metadata alone"),
    pytest.param({"0": "013", "1": "132"}, id="some are on both"),
]


@pytest.mark.parametrize("files", DISKS)
@pytest.mark.parametrize(
    ("nodes", "strategy"), [("01", "auto"), ("0011", "cooperative"), ("011", "auto")], ids=["2", "4", "3"]
)
def test_ranks_read_for_each_other_what_their_node_has(
    nodes: str, strategy: str, files: dict[str, str], ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(4, save, str(tmp_path / "ckpt"))
    distribute(tmp_path / "ckpt", tmp_path, files)
    num_elements = sum(math.prod(shape) for shape in ((12, 6), (12,), (5, 12), (5,)))
    compared = ranks.run(len(nodes), compare, str(tmp_path), strategy, nodes)
    assert sum(compared) == 4 * (2 * num_elements + 4 * len(nodes))


def test_a_node_without_the_directory(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save, str(tmp_path / "ckpt"))
    distribute(tmp_path / "ckpt", tmp_path, {"0": "0123"})
    assert all(ranks.run(3, compare, str(tmp_path), "auto", "001"))
    for message in ranks.run(3, load, str(tmp_path), "direct"):
        assert "node 1 (rank 2) lacks 4 of the files" in message


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_no_node_has_the_metadata(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    """Rank 0 looks for it, and all ranks raise what it found."""
    ranks.run(4, save, str(tmp_path / "ckpt"))
    distribute(tmp_path / "ckpt", tmp_path, {"0": "01", "1": "23"})
    (tmp_path / "0" / ".metadata").rename(tmp_path / "1" / ".metadata")
    for message in ranks.run(3, load, str(tmp_path), strategy):
        assert message.startswith("CheckpointNotFound: ")
        assert "no .metadata file among 2 files" in message


@pytest.mark.parametrize(("strategy", "lost"), [("cooperative", 2), ("auto", 0), ("direct", 2)])
def test_what_no_node_has_is_missing(ranks: RankPool, tmp_path: Path, strategy: str, lost: int) -> None:
    ranks.run(4, save, str(tmp_path / "ckpt"))
    distribute(tmp_path / "ckpt", tmp_path, {"0": "0123".replace(str(lost), ""), "1": "0123".replace(str(lost), "")})
    for message in ranks.run(4, load, str(tmp_path), strategy):
        assert f"__{lost}_0.distcp: the file is missing" in message


def load_own_disk(base: str, topology: str, nodes: str) -> dict[str, int]:
    """By a spec, over the node's own disk; every element is compared."""
    return load_spec(f"{base}/{nodes[dist.get_rank()]}", topology, "auto", list(nodes))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("files", [DISKS[1], DISKS[4]])
def test_specs_read_each_byte_once_where_it_is(
    topology: str, files: dict[str, str], ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(4, save_fsdp2, str(tmp_path / "ckpt"), SHAPES)
    distribute(tmp_path / "ckpt", tmp_path, files)
    results = ranks.run(4, load_own_disk, str(tmp_path), topology, "0011")
    assert total(results, "read") <= 1.02 * UNIQUE_BYTES + 64 * 1024
    assert total(results, "done") == total(results, "needed")
    assert total(results, "sent") == total(results, "received")
    assert min(result["read"] for result in results) > 0, "ranks of a node take turns"


def load_held_by_one(base: str, nodes: str) -> dict[str, int]:
    """The last of four ranks holds everything, and no other holds anything."""
    TOPOLOGIES["one"] = lambda n: SpecLayout(Mesh((("pp", n),)), (), {}, (HeldBy("*", {"pp": (n - 1,)}),))
    return load_own_disk(base, "one", nodes)


def test_ranks_that_hold_nothing_read_for_one_that_lacks_the_files(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save_fsdp2, str(tmp_path / "ckpt"), SHAPES)
    distribute(tmp_path / "ckpt", tmp_path, {"0": "012", "1": "3"})
    results = ranks.run(4, load_held_by_one, str(tmp_path), "0011")
    assert [result["compared"] for result in results] == [0, 0, 0, UNIQUE_BYTES]
    assert total(results, "sent") == total(results, "received") > 0.7 * UNIQUE_BYTES
    assert min(result["sent"] for result in results[:2]) > 0.2 * UNIQUE_BYTES


def save_emb(path: str) -> None:
    state = {"emb": {"exp_avg": full_tensor("emb", "exp_avg", (8, 4))}}
    dcp.save({"optim": {"state": state, "param_groups": [{"params": ["emb"]}]}}, checkpoint_id=path)


def load_tied(base: str, nodes: str) -> list[str]:
    """On two pipeline stages, each of which has its own name for what was saved once; the names here."""
    stages = (HeldBy("emb", {"pp": (0,)}), HeldBy("head", {"pp": (1,)}))
    spec = SpecLayout(Mesh((("pp", 2), ("dp", 2))), (), {"dp": Shard(0)}, stages)
    world_rank, counters, agreement = dist.get_rank(), Counters(), Agreement(dist.group.WORLD)
    disk = world_rank // 2
    request = LoadRequest(selection=Selection.of({"emb": ["emb", "head"]}, None, None))
    options = ReadOptions(load_s=30, node=nodes[world_rank])
    with closing(open_storage(f"{base}/{disk}")) as storage:
        catalog, values = open_for_all(storage, agreement, request, options, counters)
        job = LoadJob(catalog, spec.rank(world_rank), request, torch.device("cpu"), options)
        loaded = load_rank(job, agreement, counters=counters, values=values, storage=storage)
    for tensor in loaded.plan.tensors:
        found = loaded.arena.tensor(tensor.arena_offset, tensor.layout.local_shape, tensor.dtype)
        assert torch.equal(found, full_tensor("emb", "exp_avg", (8, 4)).chunk(2)[world_rank % 2])
    return [tensor.fqn for tensor in loaded.plan.tensors]


@pytest.mark.parametrize("nodes", ["0011", "0000"], ids=["messages", "shared memory"])
def test_a_saved_tensor_that_stages_hold_under_their_own_names(nodes: str, ranks: RankPool, tmp_path: Path) -> None:
    """Only the first stage's disk has it."""
    ranks.run(1, save_emb, str(tmp_path / "0"))
    (tmp_path / "1").mkdir()
    assert ranks.run(4, load_tied, str(tmp_path), nodes) == [["emb"], ["emb"], ["head"], ["head"]]
