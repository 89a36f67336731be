"""Every option of a load, with its one name and default, for the stage's spec and for the keywords of `load_optimizer_state`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict, TypeVar, get_args

import torch

from shardferry.errors import SpecError

# Wrappers put these into the names of parameters; the FQNs of checkpoints are mostly without them.
_WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "_forward_module.",  # Lightning Fabric's module has both, mostly the same one
    "_original_module.",
)


def clean_fqn(name: str) -> str:
    """A parameter's name without what wrappers of modules have put in. To support one more wrapper, add its prefix above."""
    for prefix in _WRAPPERS:
        name = name.replace(prefix, "")
    return name


class DtypePolicy(StrEnum):
    """What happens to state that was saved in another dtype than is wanted."""

    ERROR = "error"
    CAST = "cast"


class StalePolicy(StrEnum):
    """What happens where data files are younger than the metadata that describes them."""

    WARN = "warn"
    ERROR = "error"


_Choice = TypeVar("_Choice", bound=StrEnum)


def one_of(choices: type[_Choice], option: str, name: str) -> _Choice:
    """The choice of this name. Raises SpecError, which names the option and the choices."""
    try:
        return choices(name)
    except ValueError:
        raise SpecError(f"{option}: {name!r} is not one of {', '.join(choices)}") from None


def can_convert(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a cast keeps the numbers: between floating-point dtypes, between integer ones, or between complex ones."""
    kinds = {(dtype.is_floating_point, dtype.is_complex, dtype is torch.bool) for dtype in (saved, wanted)}
    return len(kinds) == 1


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
        cls,
        rename: Mapping[str, str | Sequence[str]] | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
    ) -> Selection:
        """From what people write. Raises SpecError."""
        for word, globs in (("include", include), ("exclude", exclude)):
            if isinstance(globs, str):
                raise SpecError(f"{word}: {globs!r} is one string; give a list of globs, [{globs!r}]")
        renamings = tuple(
            Renaming(saved, name)
            for saved, wanted in (rename or {}).items()
            for name in ([wanted] if isinstance(wanted, str) else wanted)
        )
        return cls(renamings, tuple(include or ()), tuple(exclude or ()))

    @property
    def is_everything(self) -> bool:
        """Whether all parameters are loaded under their saved FQNs."""
        return not (self.rename or self.include or self.exclude)

    @property
    def gives_several_names(self) -> bool:
        """Whether a renaming gives one saved FQN to several: ranks may then hold one saved tensor under different names."""
        return len({renaming.saved for renaming in self.rename}) < len(self.rename)

    def wanted_names(self, saved: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The FQNs here of saved FQNs.

        A renaming decides. Without one it is the saved FQN without what wrappers of modules have put in, unless another
        saved FQN would be the same.
        """
        renamed = {fqn: self._renamed(fqn) for fqn in saved}
        cleaned = {fqn: clean_fqn(fqn) for fqn, names in renamed.items() if not names}
        count = Counter(cleaned.values())
        return {fqn: names or (cleaned[fqn] if count[cleaned[fqn]] == 1 else fqn,) for fqn, names in renamed.items()}

    def _renamed(self, saved_fqn: str) -> tuple[str, ...]:
        """By the first pattern that matches; empty where none does."""
        if not self.rename:
            return ()
        found = next((renaming.saved for renaming in self.rename if renaming.apply(saved_fqn) is not None), None)
        return tuple(name for r in self.rename if r.saved == found and (name := r.apply(saved_fqn)) is not None)

    def selects(self, fqn: str) -> bool:
        """Whether a parameter is loaded, by its FQN here."""
        included = not self.include or any(fnmatchcase(fqn, glob) for glob in self.include)
        return included and not any(fnmatchcase(fqn, glob) for glob in self.exclude)


@dataclass(frozen=True, slots=True)
class HyperparameterPolicy:
    """Which hyperparameters stay as the live optimizer has them; all others become the saved ones."""

    live: tuple[str, ...] | None = ()  # names; None: all of them

    @classmethod
    def of(cls, given: str | Mapping[Any, Sequence[str]]) -> HyperparameterPolicy:
        """From ``"saved"``, ``"live"``, or ``{"live": ["lr", ...]}``. Raises SpecError."""
        if given == "saved":
            return cls()
        if given == "live":
            return cls(None)
        if isinstance(given, Mapping) and list(given) == ["live"] and not isinstance(given["live"], str):
            return cls(tuple(given["live"]))
        raise SpecError(f"hyperparameters: {given!r} is neither 'saved' nor 'live' nor {{'live': [names]}}")

    def keeps(self, name: str) -> bool:
        """Whether a hyperparameter stays as it is."""
        return self.live is None or name in self.live


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What one load takes from a checkpoint."""

    optimizer_key: str | None = (
        "optim"  # in the state dict that was saved; dots lead into nested ones; None: no optimizer
    )
    model_key: str | None = None  # of the weights, where they are wanted too
    selection: Selection = Selection()
    keys: KeyPolicy = KeyPolicy()
    dtype: DtypePolicy = DtypePolicy.ERROR
    wanted_dtypes: tuple[tuple[str, torch.dtype], ...] = ()  # glob over state names; what live state has comes first
    hyperparameters: HyperparameterPolicy = HyperparameterPolicy()
    safe_globals: tuple[str, ...] = ()  # dotted names of classes that saved Python objects may be of
    stale: StalePolicy = StalePolicy.WARN

    def wanted_dtype(self, name: str) -> torch.dtype | None:
        """The dtype asked for a state entry, by name; None: any."""
        return next((dtype for glob, dtype in self.wanted_dtypes if fnmatchcase(name, glob)), None)


@dataclass(frozen=True, slots=True)
class PartRequests:
    """The requests of one trainer's optimizers: alike but for their keys."""

    request: LoadRequest  # of an optimizer without a key of its own
    model_keys: Mapping[str, str] = field(
        default_factory=dict
    )  # by optimizer key, where weights have keys of their own

    def of(self, optimizer_key: str | None, *, with_weights: bool = True) -> LoadRequest:
        """Of one optimizer. Raises SpecError: its weights' key is not given.

        Args:
            optimizer_key: None: the request's own.
            with_weights: False: another optimizer's request takes the weights.
        """
        if optimizer_key is None:
            return self.request
        model_key = self.request.model_key
        if self.model_keys:
            if optimizer_key not in self.model_keys:
                raise SpecError(
                    f"checkpoint.model_key: has no key for {optimizer_key!r}, but for {list(self.model_keys)}"
                )
            model_key = self.model_keys[optimizer_key]
        return replace(self.request, optimizer_key=optimizer_key, model_key=model_key if with_weights else None)


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
    # Boxes that share nothing, with contiguous runs this long, are read by their own ranks.
    long_run_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLimits:
    """How boxes travel between ranks that share no memory."""

    message_bytes: int = 8 << 20  # a message is sent when the next box doesn't fit
    min_message_bytes: int = 64 << 10  # where many relays share the budget
    max_in_flight: int = 8  # messages of one rank, in each direction
