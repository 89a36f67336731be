"""The questions that planning asks about what one rank holds, whoever answers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from shardferry.layout.mesh import Mesh
from shardferry.layout.tensor_layout import TensorLayout


class RankLayout(ABC):
    """What one rank holds of every tensor: `SpecRank` knows it from a spec, `LiveLayout` from a live model."""

    world_rank: int  # the rank that this is the layout of
    world_size: int
    mesh: Mesh | None  # of all ranks; None if none is known

    def fqns(self) -> Sequence[str] | None:
        """The parameters whose state this rank wants; None: those of the checkpoint that `holds` admits."""
        return None

    @abstractmethod
    def holds(self, fqn: str) -> bool:
        """Whether this rank holds any part of a parameter."""

    def parameter_shape(self, fqn: str) -> tuple[int, ...] | None:
        """The parameter's global shape; None if only the checkpoint knows it."""
        return None

    @abstractmethod
    def parameter(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        """The layout of state that is sharded as its parameter is.

        Args:
            fqn: of the parameter.
            shape: the saved state's global shape.

        Raises:
            LayoutError: the parameter has another shape, or can't be placed so.
        """

    @abstractmethod
    def entry(self, fqn: str, name: str, shape: tuple[int, ...]) -> TensorLayout | None:
        """The layout of one state entry that doesn't follow its parameter; None: its shape decides whether it does.

        Args:
            fqn: of the parameter.
            name: of the state entry, ``exp_avg`` for one.
            shape: the saved entry's global shape.

        Raises:
            LayoutError: the entry has another shape, or can't be placed so.
        """

    def dtype(self, fqn: str, name: str) -> torch.dtype | None:
        """The dtype of one state entry on this rank, or of the parameter or buffer if the name is empty; None: any."""
        return None

    def weights(self) -> Sequence[str] | None:
        """The parameters and buffers whose values this rank wants; None: those of the checkpoint."""
        return None

    @abstractmethod
    def weight(self, fqn: str, shape: tuple[int, ...]) -> TensorLayout:
        """The layout of a parameter's or buffer's value.

        Args:
            fqn: of the parameter or buffer.
            shape: the saved value's global shape.

        Raises:
            LayoutError: it has another shape, or can't be placed so.
        """

    def aliases(self, fqn: str) -> Sequence[str]:
        """Other FQNs of the same (tied) parameter."""
        return ()

    def positions(self) -> Sequence[Sequence[str]] | None:
        """The FQNs of each live param group in order, for state that was saved by position; None if not known."""
        return None

    def may_lack(self, fqn: str) -> bool:
        """Whether a parameter is frozen, so that a checkpoint without state for it is complete."""
        return False
