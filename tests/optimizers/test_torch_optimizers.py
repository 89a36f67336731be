"""Every torch.optim class under every wrapper: state, groups and the next step are those of the uninterrupted run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.optimizers.table import WRAPPERS, as_plain, run_table
from tests.optimizers.torch_cases import cases
from tests.support.ranks import RankPool

# What torch itself can't do with DTensors, in its words.
ON_DTENSORS = {
    "Adafactor": "aten.pow_.Scalar: in-place operations that require placement changes are not supported",
    "LBFGS": "Cannot flatten unevenly sharded tensor",
    "Rprop": "aten.index_put_.default: in-place operations that require placement changes are not supported",
    "SparseAdam": "Operator aten._to_sparse.default does not have a sharding strategy registered",
}
# More ranks than a matrix has rows
CANNOT = {("Muon", "FSDP2 4 → 2"): "aten.add_.Tensor: in-place operations that require placement changes"}
# Its steps round to bfloat16, at other places on another number of ranks.
ROUNDED = {("Muon", "FSDP2 2 → 3")}


@pytest.mark.parametrize("wrapper", range(len(WRAPPERS)), ids=["plain", "ddp", "fsdp2-4-to-2", "fsdp2-2-to-3"])
def test_torch_optimizers(
    ranks: RankPool, tmp_path: Path, wrapper: int, record_property: Callable[[str, object], None]
) -> None:
    found = run_table(ranks, tmp_path, wrapper, cases)
    name = WRAPPERS[wrapper].name
    record_property("optimizers", ("torch.optim", name, as_plain(found)))
    cannot = ON_DTENSORS if name.startswith("FSDP2") else {}
    for optimizer, outcome in found.items():
        if words := cannot.get(optimizer) or CANNOT.get((optimizer, name)):
            assert (outcome.verdict, words in outcome.words) == ("cannot", True), (optimizer, outcome)
        else:
            wanted = "rounded" if (optimizer, name) in ROUNDED else "right"
            assert outcome.verdict == wanted, (optimizer, outcome)
