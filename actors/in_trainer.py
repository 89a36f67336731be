"""Load in a trainer's process, over its own process group: the transport ``in_process``. Called through ``__ray_call__``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from shardferry.actors.rank_report import measures_of_this_process
from shardferry.config import PartRequests, ReadOptions
from shardferry.load_live import LoadPart, load_parts
from shardferry.optimizer.parts import live_parts
from shardferry.receiver import receipt_of


def load_in_trainer(
    trainer: Any, location: Any, requests: PartRequests, storage_options: Mapping[str, Any], read: ReadOptions
) -> dict[str, Any]:
    """Load into what the trainer's method ``shardferry_target`` returns.

    Returns:
        The receipt, see `shardferry.receiver.Delivery.settle`, with the load's ``figures`` and the ``measures`` of the process.

    Raises:
        ShardferryError: nothing of the models and optimizers of any rank has been changed.
    """

    def parts() -> list[LoadPart]:
        live = live_parts(*trainer.shardferry_target())
        return [LoadPart(p.live, requests.of(p.key, with_weights=p.with_weights), location) for p in live]

    report, figures = load_parts(parts, lambda: read, storage_options, None)
    rank = dist.get_rank() if dist.is_initialized() else 0
    measures = measures_of_this_process(figures.device)
    return {"transport": "in_process", "figures": figures, "measures": measures, **receipt_of(rank, report)}
