"""How two checkpoints differ: the JSON of ``shardferry diff --json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TensorDiff(BaseModel):
    """One tensor that both have, and that differs."""

    model_config = ConfigDict(frozen=True)

    fqn: str
    shapes: list[list[int]] | None = None  # of both, where they differ
    dtypes: list[str] | None = None  # of both, where they differ
    num_differing: int | None = None  # elements, where the values were compared and differ
    norm: float | None = None  # of the difference
    relative_norm: float | None = None  # of the difference, over that of the first one's tensor; None: that is 0
    max_abs: float | None = None  # of the difference


class ObjectDiff(BaseModel):
    """One Python value that both have, and that differs, as text."""

    model_config = ConfigDict(frozen=True)

    fqn: str
    values: list[str]  # of both


class DiffReport(BaseModel):
    """Two checkpoints."""

    model_config = ConfigDict(frozen=True)

    locations: list[str]
    only_in_first: list[str]  # keys of tensors and Python values
    only_in_second: list[str]
    num_compared: int  # tensors that both have
    with_values: bool
    tensors: list[TensorDiff]
    objects: list[ObjectDiff]

    @property
    def is_same(self) -> bool:
        """Whether no difference was found."""
        return not (self.only_in_first or self.only_in_second or self.tensors or self.objects)
