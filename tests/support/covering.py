"""Choose a few pairs of topologies that show what all pairs would."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from tests.support.topologies import Topology

Pair = tuple[Topology, Topology]  # source and target
Trait = tuple[str, ...]

_TIMES = {"source": 2, "target": 2}  # each topology; of all other traits one pair is enough


def traits(source: Topology, target: Topology) -> list[Trait]:
    """What a load from one to the other shows: both topologies, how matrices are cut before and after, the sizes."""
    sizes = "shrink" if source.world_size > target.world_size else "grow"
    sizes = "same" if source.world_size == target.world_size else sizes
    turned = "transpose" if source.cuts != target.cuts else "keep"
    return [("source", source.name), ("target", target.name), ("cuts", source.cuts, target.cuts), (sizes, turned)]


def covering_pairs(topologies: Sequence[Topology]) -> list[Pair]:
    """Greedily: next is the pair that shows most of what is still missing, until all that any pair shows is shown."""
    pairs = list(itertools.product(topologies, topologies))
    missing = Counter({trait: _TIMES.get(trait[0], 1) for pair in pairs for trait in traits(*pair)})
    chosen: list[Pair] = []
    while missing.total():
        best = max(pairs, key=lambda pair: sum(missing[trait] > 0 for trait in traits(*pair)))
        pairs.remove(best)
        chosen.append(best)
        missing -= Counter(traits(*best))
    return chosen
