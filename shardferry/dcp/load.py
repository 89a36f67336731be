"""Load a checkpoint's optimizer state, cut as the model's parameters are cut now.

Two ways lead there. Torch's own readers are only asked where the files are, which are then read in ranges. Other readers
and planners do the work themselves, as `dcp.load` has them do it; here is proven before that there is something to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint.planner import LoadPlanner

from shardferry.dcp.by_reader import load_by_reader
from shardferry.dcp.groups import group_of_call
from shardferry.dcp.ranged import load_ranged
from shardferry.dcp.storages import has_ranges
from shardferry.errors import SpecError
from shardferry.exchange.agreement import Agreement


def load_sharded_optimizer_state_dict(
    model_state_dict: Mapping[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Load a checkpoint's optimizer state, cut as the model's parameters are cut now.

    Args:
        model_state_dict: the sharded state dict of the model, by FQN. State with its parameter's shape comes as the
            parameter stands here: a ShardedTensor over the same process group, a DTensor on the same mesh, a plain tensor.
            State of a parameter that isn't here comes as a ShardedTensor cut along dimension 0 over the process group.
            State with another shape comes whole.
        optimizer_key: the optimizer's key in the state dict that was saved.
        storage_reader: any. Files of torch's own file-system readers are read in ranges, others by the reader's code.
        planner: any; where it isn't torch's default one, its own code plans and places. It sees a flat dict of the
            tensors to fill, each with its place in the saved tensor, and strings where Python objects go.
        process_group: whose ranks all call this; default: the whole job.

    Returns:
        ``{optimizer_key: {"state": {fqn: {name: tensor}}, "param_groups": [...]}}``.

    Raises:
        SpecError: an argument has the wrong type, or ranks disagree on one; torch.distributed isn't initialised.
        PlanError: nothing is saved under the key; an element is in no saved chunk, or in two.
        LayoutError: the model's tensors lie in a way that isn't supported.
        RankError: another rank failed, or the reader's or the planner's code did.
    """
    group = group_of_call(process_group)
    agreement = Agreement(group)
    arguments = (model_state_dict, optimizer_key, storage_reader, planner)
    ranged = _agree_on_the_way(agreement, arguments)
    if ranged:
        return load_ranged(model_state_dict, optimizer_key, storage_reader, group, agreement)
    return load_by_reader(model_state_dict, optimizer_key, storage_reader, planner, group, agreement)


def _agree_on_the_way(agreement: Agreement, arguments: tuple[Any, Any, Any, Any]) -> bool:
    """Whether to read in ranges: the same on all ranks, or an error on all of them."""

    def check() -> tuple[str, bool, str]:
        _check_types(*arguments)
        _, optimizer_key, reader, planner = arguments
        ranged = has_ranges(reader) and (planner is None or type(planner) is DefaultLoadPlanner)
        return optimizer_key, ranged, f"{type(reader).__name__} and {type(planner).__name__}"

    answers = agreement.gather("looking at the arguments", check)
    for rank, (optimizer_key, ranged, how) in enumerate(answers):
        if (optimizer_key, ranged) != answers[0][:2]:
            raise SpecError(
                f"ranks of the process group disagree: rank 0 asks for {answers[0][0]!r} by {answers[0][2]}, "
                f"rank {rank} for {optimizer_key!r} by {how}; give all ranks the same"
            )
    return answers[0][1]


def _check_types(model: Any, optimizer_key: Any, reader: Any, planner: Any) -> None:
    wanted = (
        ("model_state_dict", model, Mapping, "a state dict"),
        ("optimizer_key", optimizer_key, str, "a string"),
        ("storage_reader", reader, StorageReader, "a StorageReader"),
        ("planner", planner, LoadPlanner | None, "a LoadPlanner or None"),
    )
    for name, value, kind, words in wanted:
        if not isinstance(value, kind):
            raise SpecError(f"{name}: is a {type(value).__name__}, not {words}")
