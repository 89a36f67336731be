"""Every option of a load, with its one default: which keys, how they are read, and the limits that follow from a storage.

People set these through the stage's spec (schemas/stage_config.py) or as keywords of `load_optimizer_state`; both take their
names and defaults from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict, get_args

import torch

from shardferry.errors import SpecError


class DtypePolicy(StrEnum):
    """What happens to state that was saved in another dtype than is wanted."""

    ERROR = "error"
    CAST = "cast"


def dtype_policy(name: str) -> DtypePolicy:
    """From ``"error"`` or ``"cast"``. Raises SpecError."""
    try:
        return DtypePolicy(name)
    except ValueError:
        raise SpecError(f"dtype: {name!r} is not one of {', '.join(DtypePolicy)}") from None


def can_convert(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a cast keeps the numbers: between floating-point dtypes, between integer ones, or between complex ones."""

    def kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
        return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool

    return kind(saved) == kind(wanted)


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """Which key mismatches are tolerated; none by default (strict)."""

    allow_missing: bool = False  # wanted, not saved: the live state and hyperparameters stay as they are
    ignore_unexpected: bool = False  # saved, wanted by no rank: left where it is

    @classmethod
    def of(cls, names: str | Sequence[str]) -> KeyPolicy:
        """From ``"strict"``, ``"allow_missing"``, ``"ignore_unexpected"``, or a list of these. Raises SpecError."""
        given = {names} if isinstance(names, str) else set(names)
        known = {"strict", "allow_missing", "ignore_unexpected"}
        if unknown := sorted(given - known):
            raise SpecError(f"keys: {unknown[0]!r} is not one of {', '.join(sorted(known))}")
        if "strict" in given and len(given) > 1:
            raise SpecError(f"keys: strict goes with no other policy (found {', '.join(sorted(given))})")
        return cls("allow_missing" in given, "ignore_unexpected" in given)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A rule that renames FQNs, such as ``_orig_mod.*`` to ``*``: each star of the wanted name is replaced by that of the saved one."""

    saved: str
    wanted: str

    def __post_init__(self) -> None:
        if self.saved.count("*") != self.wanted.count("*"):
            raise SpecError(
                f"rename: {self.saved!r} has {self.saved.count('*')} stars, {self.wanted!r} has {self.wanted.count('*')}; "
                "each star of the saved name must have its place in the wanted one"
            )
        if not (self.saved and self.wanted):
            raise SpecError(f"rename: {self.saved!r} to {self.wanted!r}: an empty name")

    def apply(self, fqn: str) -> str | None:
        """The wanted name; None if the rule doesn't match."""
        pattern = "(.*)".join(map(re.escape, self.saved.split("*")))
        found = re.fullmatch(pattern, fqn, flags=re.DOTALL)
        if found is None:
            return None
        pieces = self.wanted.split("*")
        return pieces[0] + "".join(star + piece for star, piece in zip(found.groups(), pieces[1:], strict=True))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which parameters are loaded, and their FQNs here."""

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
        """Whether all parameters are loaded under their saved FQNs."""
        return not (self.rename or self.include or self.exclude)

    def wanted_name(self, saved_fqn: str) -> str:
        """The FQN here of a saved FQN."""
        if not self.rename:
            return saved_fqn
        names = (renaming.apply(saved_fqn) for renaming in self.rename)
        return next((name for name in names if name is not None), saved_fqn)

    def selects(self, fqn: str) -> bool:
        """Whether a parameter is loaded, by its FQN here."""
        included = not self.include or any(fnmatchcase(fqn, glob) for glob in self.include)
        return included and not any(fnmatchcase(fqn, glob) for glob in self.exclude)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What one load takes from a checkpoint."""

    optimizer_key: str = "optim"  # in the state dict that was saved; dots lead into nested ones
    model_key: str | None = None  # of the weights, where they are wanted too
    selection: Selection = Selection()
    keys: KeyPolicy = KeyPolicy()
    dtype: DtypePolicy = DtypePolicy.ERROR
    wanted_dtypes: tuple[tuple[str, torch.dtype], ...] = ()  # glob over state names; what live state has comes first

    def wanted_dtype(self, name: str) -> torch.dtype | None:
        """The dtype asked for a state entry, by name; None: any."""
        return next((dtype for glob, dtype in self.wanted_dtypes if fnmatchcase(name, glob)), None)


Strategy = Literal["auto", "direct", "cooperative"]
LOAD_TIMEOUT_S = 3600.0  # for planning and reading, of a stage and of a call
MIN_MEMORY_BUDGET_BYTES = 8 << 20  # room for one request


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How one rank reads. The names are those of the spec's ``read`` section, and ``timeouts.load_s``."""

    strategy: Strategy = "auto"  # direct: each rank reads what it needs; cooperative: each byte once for all ranks
    concurrency: int = 16  # requests in flight
    memory_budget: int = 1 << 30  # bytes of buffers beside the arena
    max_gap: int | None = None  # bytes between two byte ranges of one request; None: the storage's own limit
    max_request: int | None = None  # bytes of one request; None: the storage's own limit
    max_attempts: int = 5  # of a request that fails for a passing reason
    load_s: float | None = LOAD_TIMEOUT_S  # seconds for planning and reading; None: no deadline
    node: str | None = None  # ranks with the same name share memory; None: detected

    def __post_init__(self) -> None:
        """Raises SpecError."""
        if self.strategy not in get_args(Strategy):
            raise SpecError(f"strategy: {self.strategy!r} is not one of {', '.join(get_args(Strategy))}")
        for name, least in (("concurrency", 1), ("max_attempts", 1), ("max_gap", 0), ("max_request", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SpecError(f"{name}: {value} is below {least}, the least")

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> ReadOptions:
        """From keywords of a call. Raises SpecError for a name that is not an option."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(keywords) - set(known)):
            raise SpecError(f"{unknown[0]!r} is not a read option; there are {', '.join(known)}")
        return cls(**keywords)


class ReadKeywords(TypedDict, total=False):
    """`ReadOptions` as keywords of a function."""

    strategy: Strategy
    concurrency: int
    memory_budget: int
    max_gap: int | None
    max_request: int | None
    max_attempts: int
    load_s: float | None
    node: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How far byte ranges of one file are coalesced into requests, and where requests are split. All in bytes."""

    max_gap_bytes: int  # between two ranges of one request
    max_over_read: float  # unwanted bytes of a request over the wanted ones
    max_request_bytes: int
    max_item_bytes: int  # a larger item is never fetched whole together with its neighbours
    maps_files: bool = False  # strided ranges are looked at through a mapping: the bytes between them are not fetched
    free_gap_bytes: int = 4096  # smaller gaps don't count as over-read: disks, page caches and networks give no less
    long_run_bytes: int = 64 * 1024  # of a mapped file: longer contiguous runs are read one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLimits:
    """How saved chunks are split among the ranks that read for each other. All in bytes."""

    max_part_bytes: int  # that one rank reads at a time for others; a single row may be longer
    window_bytes: int = 0  # of a file: small parts in one window have one reader; 0: each chunk has its own
    min_part_bytes: int = 1 << 20  # a part is divided among its ranks down to this
    long_run_bytes: int = (
        1 << 20
    )  # boxes that share nothing, with contiguous runs this long, are read by their own ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLimits:
    """How boxes travel between ranks that share no memory."""

    message_bytes: int = 8 << 20  # a message is sent when the next box doesn't fit
    min_message_bytes: int = 64 << 10  # where many relays share the budget
    max_in_flight: int = 8  # messages of one rank, in each direction
