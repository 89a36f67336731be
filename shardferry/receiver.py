"""A trainer as a stage sees it: what it wants, and how loaded state gets into its model and optimizer.

A class mixes in `OptimizerReceiver`. One that can't inherit has methods of the same names, made of `describe_layout` and
`receive`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import gpu_identity, host_identity
from shardferry.errors import InstallError, LayoutError
from shardferry.handoff.handle import Shard, ShardHandle
from shardferry.handoff.transport import Recipient
from shardferry.layout.rank_layout import RankLayout
from shardferry.optimizer.install import Checked, Installation, check, fit
from shardferry.optimizer.live import LiveModel
from shardferry.optimizer.live_layout import live_layout
from shardferry.optimizer.parts import Models, Optimizers, live_parts
from shardferry.plan.load_plan import Manifest
from shardferry.plan.match_keys import KeyReport


@dataclass(frozen=True, slots=True)
class WantedPart:
    """What one optimizer, with its modules, wants of a load."""

    optimizer_key: str | None  # None: the key of the stage's spec
    layout: RankLayout
    with_weights: bool = True  # False: another part takes the weights of the same modules


@dataclass(frozen=True, slots=True)
class TrainerProcess:
    """The process that a trainer runs in."""

    host: str  # see `shardferry.arena.host_identity`
    pid: int
    gpu: str | None = None  # of its model, see `shardferry.arena.gpu_identity`

    @classmethod
    def this(cls, device: torch.device) -> TrainerProcess:
        """The calling process, with a model on this device."""
        return cls(host_identity(), os.getpid(), gpu_identity(device))

    def recipient(self) -> Recipient:
        """The trainer as seen from the calling process."""
        same_host = self.host == host_identity()
        return Recipient(same_host=same_host, same_process=same_host and self.pid == os.getpid(), gpu=self.gpu)


@dataclass(frozen=True, slots=True)
class Reception:
    """A trainer's answer to the stage: what it wants, and the process that it runs in."""

    parts: tuple[WantedPart, ...]  # one; several where optimizers have keys of their own
    process: TrainerProcess
    in_steps: bool = True  # False: `shardferry_receive` alone takes the shard


class Delivery:
    """A shard on its way into a live model and its optimizers, in steps, so that several trainers change all or nothing.

    Args:
        handle: of this rank's shard.

    Raises:
        HandoffError: the shard can't be opened here.
        InstallError: the shard doesn't fit the model and the optimizer. Nothing was changed.
    """

    def __init__(self, handle: ShardHandle, model: Models, optimizer: Optimizers) -> None:
        parts = _live_parts(handle, model, optimizer)
        shards: list[Shard] = []
        try:
            shards += [part.open() for part in handle.parts]
            checked = [check(shard, live) for shard, live in zip(shards, parts, strict=True)]
            fitted = [fit(*each) for each in zip(shards, parts, checked, strict=True)]
        finally:
            for shard in shards:
                shard.release()
        self._receipts = [receipt_of(handle.world_rank, one) for one in checked]
        self._transport = handle.transport
        self._installation = Installation([step for each in fitted for step in each.steps])
        self._is_installed = False
        self._installed_s = (0.0, 0.0)

    def install(self) -> None:
        """Change the model and the optimizers; `settle` can still put everything back. Raises InstallError, and changes nothing."""
        start = time.time()
        try:
            self._installation.apply()
        except BaseException:
            self._installation.undo()
            raise
        self._installed_s = start, time.time()
        self._is_installed = True

    def settle(self, *, keep: bool) -> dict[str, Any]:
        """Keep what was installed, or put back what was there before.

        Returns:
            The receipt: ``world_rank``, the ``transport`` of the shard, ``installed_s`` (when `install` began and ended, seconds
            since the epoch), and what the stage's report lists of the load: ``overwritten`` hyperparameters (group, name, old and new value in words), ``missing_entries``,
            ``unexpected_entries``, ``warnings``.
        """
        if self._is_installed:
            (self._installation.finish if keep else self._installation.undo)()
            self._is_installed = False
        first = self._receipts[0]
        lists = {name: [x for r in self._receipts for x in r[name]] for name in first if name != "world_rank"}
        return {"transport": self._transport, "installed_s": self._installed_s, **first, **lists}


def receipt_of(world_rank: int, report: Checked | KeyReport) -> dict[str, Any]:
    """What a trainer answers to the stage; see `Delivery.settle`."""
    return {
        "world_rank": world_rank,
        "overwritten": [(c.group, c.name, repr(c.old), repr(c.new)) for c in report.overwritten],
        "missing_entries": list(report.missing_entries),
        "unexpected_entries": list(report.unexpected_entries),
        "warnings": list(report.warnings),
    }


def _live_parts(handle: ShardHandle, model: Models, optimizer: Optimizers) -> list[LiveModel]:
    """The live objects for each part of a handle. Raises InstallError."""
    found = [part.live for part in live_parts(model, optimizer)]
    if len(found) != len(handle.parts):
        keys = [part.manifest.request.optimizer_key for part in handle.parts]
        raise InstallError(
            f"the shard has the state of {len(keys)} optimizers ({', '.join(map(str, keys))}), the trainer takes {len(found)}"
        )
    return found


def describe_layout(model: Models, optimizer: Optimizers, world_rank: int, world_size: int) -> Reception:
    """What a trainer answers to the stage from ``shardferry_layout``.

    Args:
        model, optimizer: as `OptimizerReceiver.shardferry_target` returns them.
        world_rank: this trainer's place in the list of trainers that the stage was given.
        world_size: length of that list.

    Raises:
        InstallError: the optimizer trains a tensor that is not a parameter of the model.
        LayoutError: the layout of a parameter is not supported, or the trainers are not in the order of their ranks.
    """
    own = dist.get_rank() if dist.is_initialized() else 0
    if dist.is_initialized() and dist.get_world_size() == world_size and own != world_rank:
        raise LayoutError(
            f"trainer {world_rank} of the list given to the stage is rank {own} of its process group; give the trainers "
            "in the order of their ranks"
        )
    live = live_parts(model, optimizer)
    parts = tuple(
        WantedPart(part.key, live_layout(part.live, world_rank=world_rank, world_size=world_size), part.with_weights)
        for part in live
    )
    device = next((part.live.device for part in live), torch.device("cpu"))
    return Reception(parts, TrainerProcess.this(device), in_steps=False)


def receive(handle: ShardHandle | Any, model: Models, optimizer: Optimizers) -> dict[str, Any]:
    """Install a loaded shard into a model and its optimizer.

    Args:
        handle: of this rank's shard, or an ObjectRef of one.
        model, optimizer: as `OptimizerReceiver.shardferry_target` returns them.

    Returns:
        The receipt, see `Delivery.settle`.

    Raises:
        HandoffError: the shard can't be opened here.
        InstallError: the shard doesn't fit the model and the optimizer. Nothing was changed.
    """
    found = handle if isinstance(handle, ShardHandle) else handle.future().result()
    delivery = Delivery(found, model, optimizer)
    delivery.install()
    return delivery.settle(keep=True)


class OptimizerReceiver:
    """Mix into a trainer's actor class that has the attributes ``model`` and ``optimizer``.

    ```python
    @ray.remote(num_gpus=1)
    class Trainer(shardferry.OptimizerReceiver):
        def __init__(self): self.model, self.optimizer = ...

    stage.run(trainers)
    ```

    Where the attributes have other names, override `shardferry_target`.
    """

    model: Module
    optimizer: Optimizer
    _shardferry_delivery: Delivery | None = None

    def shardferry_target(self) -> tuple[Models, Optimizers]:
        """The wrapped model, and the optimizer that gets the loaded state.

        Several of each where a rank has several. A dict ``{optimizer_key: optimizer}`` where each was saved under a key of
        its own; the models may be a dict of the same keys.
        """
        return self.model, self.optimizer

    def shardferry_layout(self, world_rank: int, world_size: int) -> Reception:
        """What this trainer wants; the stage calls this before it loads. Arguments and errors as `describe_layout` has them."""
        # By name, as Ray's actors may have a copy of the function.
        own = type(self).shardferry_receive.__qualname__ != OptimizerReceiver.shardferry_receive.__qualname__
        return replace(describe_layout(*self.shardferry_target(), world_rank, world_size), in_steps=not own)

    def shardferry_check(self, part: int, manifest: Manifest) -> None:
        """Check what will be loaded for a part, before it is read. Raises InstallError."""
        check(Shard(manifest, None), live_parts(*self.shardferry_target())[part].live)

    def shardferry_fit(self, handle: ShardHandle) -> None:
        """Open this rank's shard and check that it fits; nothing is changed. Raises HandoffError, InstallError."""
        self.shardferry_settle(keep=False)  # of a stage that ended between the steps
        self._shardferry_delivery = Delivery(handle, *self.shardferry_target())

    def shardferry_install(self) -> None:
        """Install the shard that `shardferry_fit` has opened. Raises InstallError, and changes nothing."""
        assert self._shardferry_delivery is not None, "shardferry_fit comes before shardferry_install"
        self._shardferry_delivery.install()

    def shardferry_settle(self, *, keep: bool) -> dict[str, Any]:
        """Keep the installed state, or put back what was there before. Returns the receipt, see `Delivery.settle`."""
        delivery, self._shardferry_delivery = self._shardferry_delivery, None
        return {} if delivery is None else delivery.settle(keep=keep)

    def shardferry_receive(self, handle: ShardHandle) -> dict[str, Any]:
        """Install this rank's shard at once; returns and raises as `receive`. The stage calls it where a class overrides it."""
        return receive(handle, *self.shardferry_target())
