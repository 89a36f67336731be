"""The optimizers of other libraries under every wrapper: right, or refused in words; see scripts/zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.optimizers.table import WRAPPERS, Cases, Outcome, as_plain, run_table
from tests.optimizers.zoo import LIBRARIES, cases
from tests.support.ranks import RankPool

_TOGETHER = 20  # cases in one process group
_DEADLINE_S = 400.0  # for as many; torchao compiles, and one optimizer hangs


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Processes of this table's own: imports of the libraries take long, and stay."""
    pool = RankPool(4, deadline_s=_DEADLINE_S)
    yield pool
    pool.close()


@pytest.mark.zoo
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("wrapper", range(len(WRAPPERS)), ids=["plain", "ddp", "fsdp2-4-to-2", "fsdp2-2-to-3"])
def test_zoo(
    ranks: RankPool, tmp_path: Path, wrapper: int, library: str, record_property: Callable[[str, object], None]
) -> None:
    of_library = partial(cases, library)
    found: dict[str, Outcome] = {}
    for start in range(0, len(of_library()), _TOGETHER):
        which = range(start, min(start + _TOGETHER, len(of_library())))
        found |= dict(_outcomes(ranks, tmp_path / str(start), wrapper, of_library, which))
    record_property("optimizers", (library, WRAPPERS[wrapper].name, as_plain(found)))
    assert {name: outcome.words for name, outcome in found.items() if outcome.verdict == "wrong"} == {}


def _outcomes(
    ranks: RankPool, directory: Path, wrapper: int, of_library: Cases, which: Sequence[int]
) -> Iterator[tuple[str, Outcome]]:
    """Of cases in one process group; where one breaks that, each in a group of its own."""
    try:
        yield from run_table(ranks, directory / "together", wrapper, of_library, which).items()
    except pytest.fail.Exception as failure:
        if len(which) == 1:
            name = of_library()[which[0]].name
            yield name, Outcome("cannot", f"ranks hang or die: {str(failure).splitlines()[-1]}")
            return
        for index in which:
            yield from _outcomes(ranks, directory / str(index), wrapper, of_library, [index])
