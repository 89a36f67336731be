"""Every torch.optim class under every wrapper: state, groups and the next step are those of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.optimizers.table import WRAPPERS, Outcome, run_table
from tests.optimizers.torch_cases import cases
from tests.support.ranks import RankPool

# What torch itself can't do, in its words.
CANNOT: dict[tuple[str, str], str] = {}


@pytest.mark.conformance(22)
@pytest.mark.parametrize("wrapper", range(len(WRAPPERS)), ids=[w.name for w in WRAPPERS])
def test_torch_optimizers(ranks: RankPool, tmp_path: Path, wrapper: int) -> None:
    found = run_table(ranks, tmp_path, wrapper, cases)
    for n, o in found.items(): print(n, o)
    kind = WRAPPERS[wrapper].name.partition(" ")[0]
    assert {name: outcome for name, outcome in found.items() if outcome != expected(name, kind, outcome)} == {}


def expected(name: str, kind: str, found: Outcome) -> Outcome:
    words = CANNOT.get((name, kind))
    return Outcome("right") if words is None else Outcome("cannot", found.words if words in found.words else words)
