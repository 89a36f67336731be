"""Say what is asked of a checkpoint: which keys, under which names, and what to do where they don't fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

import torch

from shardferry.errors import SpecError


class DtypePolicy(StrEnum):
    """What to do with state that was saved in another dtype than is wanted."""

    ERROR = "error"
    CAST = "cast"


def dtype_policy(name: str) -> DtypePolicy:
    """From ``"error"`` or ``"cast"``. Raises SpecError."""
    try:
        return DtypePolicy(name)
    except ValueError:
        raise SpecError(f"dtype: {name!r} is no policy; there are {', '.join(DtypePolicy)}") from None


def can_convert(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a cast keeps what numbers mean: between floating-point dtypes, or integer ones, or complex ones."""

    def kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
        return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool

    return kind(saved) == kind(wanted)


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """What may not fit: by default nothing (strict)."""

    allow_missing: bool = False  # wanted, not saved: the live state and hyperparameters stay as they are
    ignore_unexpected: bool = False  # saved, wanted by no rank: left where it is

    @classmethod
    def of(cls, names: str | Sequence[str]) -> KeyPolicy:
        """From ``"strict"``, ``"allow_missing"``, ``"ignore_unexpected"``, or a list of these. Raises SpecError."""
        given = {names} if isinstance(names, str) else set(names)
        known = {"strict", "allow_missing", "ignore_unexpected"}
        if unknown := sorted(given - known):
            raise SpecError(f"keys: {unknown[0]!r} is no policy; there are {', '.join(sorted(known))}")
        if "strict" in given and len(given) > 1:
            raise SpecError(f"keys: strict goes with no other policy (found {', '.join(sorted(given))})")
        return cls("allow_missing" in given, "ignore_unexpected" in given)


@dataclass(frozen=True, slots=True)
class Renaming:
    """``_orig_mod.*`` to ``*``: what a star stands for in the saved name, the star in the wanted name stands for."""

    saved: str
    wanted: str

    def __post_init__(self) -> None:
        if self.saved.count("*") != self.wanted.count("*"):
            raise SpecError(
                f"rename: {self.saved!r} has {self.saved.count('*')} stars, {self.wanted!r} has {self.wanted.count('*')}; "
                "each star of the saved name must have its place in the wanted one"
            )
        if not (self.saved and self.wanted):
            raise SpecError(f"rename: {self.saved!r} to {self.wanted!r}: an empty name is the name of no parameter")

    def apply(self, fqn: str) -> str | None:
        """The wanted name; None where the saved one is another."""
        pattern = "(.*)".join(map(re.escape, self.saved.split("*")))
        found = re.fullmatch(pattern, fqn, flags=re.DOTALL)
        if found is None:
            return None
        pieces = self.wanted.split("*")
        return pieces[0] + "".join(star + piece for star, piece in zip(found.groups(), pieces[1:], strict=True))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which parameters are meant, and how they are called here."""

    rename: tuple[Renaming, ...] = ()  # saved FQN to wanted FQN; the first that fits
    include: tuple[str, ...] = ()  # shell globs over wanted FQNs; none: all
    exclude: tuple[str, ...] = ()  # shell globs over wanted FQNs

    @classmethod
    def of(
        cls, rename: Mapping[str, str] | None, include: Sequence[str] | None, exclude: Sequence[str] | None
    ) -> Selection:
        """From what people write. Raises SpecError."""
        for word, globs in (("include", include), ("exclude", exclude)):
            if isinstance(globs, str):
                raise SpecError(f"{word}: {globs!r} is one string; give a list of globs, [{globs!r}]")
        renamings = tuple(Renaming(saved, wanted) for saved, wanted in (rename or {}).items())
        return cls(renamings, tuple(include or ()), tuple(exclude or ()))

    @property
    def is_everything(self) -> bool:
        """Whether all parameters are meant, as they were called when they were saved."""
        return not (self.rename or self.include or self.exclude)

    def wanted_name(self, saved_fqn: str) -> str:
        """What a saved FQN is called here."""
        if not self.rename:
            return saved_fqn
        names = (renaming.apply(saved_fqn) for renaming in self.rename)
        return next((name for name in names if name is not None), saved_fqn)

    def selects(self, fqn: str) -> bool:
        """Whether a wanted FQN is meant."""
        included = not self.include or any(fnmatchcase(fqn, glob) for glob in self.include)
        return included and not any(fnmatchcase(fqn, glob) for glob in self.exclude)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What one load wants of a checkpoint."""

    optimizer_key: str = "optim"  # in the state dict that was saved; dots lead into nested ones
    model_key: str | None = None  # of the weights, where they are wanted too
    selection: Selection = Selection()
    keys: KeyPolicy = KeyPolicy()
    dtype: DtypePolicy = DtypePolicy.ERROR
    wanted_dtypes: tuple[tuple[str, torch.dtype], ...] = ()  # glob over state names; what live state has comes first

    def wanted_dtype(self, name: str) -> torch.dtype | None:
        """The dtype that is asked for a state entry by name; None where any will do."""
        return next((dtype for glob, dtype in self.wanted_dtypes if fnmatchcase(name, glob)), None)
