"""Checkpoints on the nodes' own disks: one error says what each node lacks, on all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardferry
from shardferry.errors import MissingFile
from shardferry.exchange.node_files import NodeFiles, lacking_error
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
    model = fully_shard(nn.Linear(6, 12), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer


def save(path: str) -> None:
    model, optimizer = network()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)


def load(base: str, strategy: str) -> str:
    """As on node ``rank // 2`` of two, each with a disk of its own."""
    node = str(dist.get_rank() // 2)
    model, optimizer = network()
    try:
        shardferry.load_optimizer_state(model, optimizer, f"{base}/{node}", strategy=strategy, node=node)
    except MissingFile as error:
        assert not optimizer.state
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("world_size", "strategy", "lacked"),
    [
        pytest.param(4, "direct", {1: "01"}, id="what two ranks need"),
        pytest.param(3, "direct", {0: "23", 1: "01"}, id="values that rank 0 reads for all"),
    ],
)
def test_all_ranks_say_which_files_which_node_lacks(
    world_size: int, strategy: str, lacked: dict[int, str], ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(4, save, str(tmp_path / "ckpt"))
    for node in (0, 1):
        (tmp_path / str(node)).mkdir()
        for of_rank in (2 * node, 2 * node + 1):
            (file,) = (tmp_path / "ckpt").glob(f"__{of_rank}_*.distcp")
            shutil.copy2(file, tmp_path / str(node))
            if 0 not in lacked:
                shutil.copy2(file, tmp_path / "0")
    shutil.copy2(tmp_path / "ckpt" / ".metadata", tmp_path / "0")
    for message in ranks.run(world_size, load, str(tmp_path), strategy):
        for node in (0, 1):
            assert (f"node {node} (rank {2 * node}" in message) == (node in lacked)
        for node, files in lacked.items():
            names = ", ".join(f"__{file}_0.distcp" for file in files)
            assert f"node {node} (rank {2 * node}" in message
            assert f"lacks {len(files)} of the files ({names})" in message
