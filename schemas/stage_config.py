"""A stage's spec: checkpoint, topology, actors, how to read, and how shards are handed off to trainers.

Where the core has the same option, the default is the core's (shardferry/config.py).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from torch.distributed.tensor import Placement

from shardferry.config import (
    LOAD_TIMEOUT_S,
    MIN_MEMORY_BUDGET_BYTES,
    DtypePolicy,
    HyperparameterPolicy,
    KeyPolicy,
    LoadRequest,
    PartRequests,
    ReadOptions,
    Selection,
    StalePolicy,
    Strategy,
    can_convert,
)
from shardferry.errors import LayoutError, SpecError
from shardferry.handoff.transports import AUTO, needs_host_arena, stage_transport_names
from shardferry.layout.mesh import Mesh, parse_placement
from shardferry.layout.spec import HeldBy, Rule, SpecLayout
from shardferry.storage.joined import with_weights_from

KeyPolicyName = Literal["strict", "allow_missing", "ignore_unexpected"]
_MAX_RANKS = 1 << 20
_READ = ReadOptions()
_REQUEST = LoadRequest()
_FOUND = reprlib.Repr()  # a value of a few lines of YAML may have a representation of gigabytes
_FOUND.maxstring = _FOUND.maxother = 200
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Spec(BaseModel):
    """Base of all specs: unknown fields are errors, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointSpec(Spec):
    """Which checkpoint is read, and what of it is loaded."""

    location: str | None = Field(
        None, description="directory or URL of the checkpoint; null: the caller of `run` or `submit` gives it"
    )
    optimizer_key: str | None = Field(
        _REQUEST.optimizer_key,
        description="key of the optimizer in the saved state dict; dots separate nested keys; '': the whole checkpoint; null: no "
        "optimizer is loaded",
    )
    storage_options: dict[str, Any] = Field({}, description="credentials, an endpoint; see docs/storage.md")
    cache: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="directory that keeps catalogs, so that large metadata is read once; see docs/scale.md"
    )
    model_key: str | dict[str, str] | None = Field(
        _REQUEST.model_key,
        description="key of the model in the saved state dict; '': weights on the top level; null: weights are not loaded; optimizer "
        "key to model key, where trainers have several optimizers under keys of their own",
    )
    model_location: str | None = Field(
        None,
        description="directory or URL of the checkpoint that has the weights; null: `location` has them. `storage_options` "
        "are for both where both are of one kind",
    )
    rename: dict[str, str | tuple[str, ...]] = Field(
        {},
        description="saved FQN to wanted FQN, or to several; `*` stands for the same text in both; the first match wins",
    )
    include: tuple[str, ...] = Field(
        _REQUEST.selection.include, description="globs over wanted FQNs: only these are loaded; empty: all"
    )
    exclude: tuple[str, ...] = Field(
        _REQUEST.selection.exclude, description="globs over wanted FQNs: these are not loaded"
    )
    keys: tuple[KeyPolicyName, ...] = Field(
        ("strict",),
        description="which key mismatches are tolerated: one policy or a list; strict: none; see docs/strict.md",
    )
    dtype: DtypePolicy = Field(
        _REQUEST.dtype, description="if the saved and the wanted dtype differ: raise an error, or cast"
    )
    wanted_dtypes: dict[str, str] = Field(
        {},
        description="glob over state names to the wanted dtype, such as `float32`; the dtype of live state takes precedence",
    )

    hyperparameters: Literal["saved", "live"] | dict[Literal["live"], tuple[str, ...]] = Field(
        "saved",
        description="whose hyperparameters hold after the load: the saved ones, the live ones, or `{live: [lr, ...]}`: the live ones of "
        "these names",
    )

    safe_globals: tuple[str, ...] = Field(
        _REQUEST.safe_globals,
        description="dotted names of classes that saved Python objects may be of; they are imported",
    )

    stale: StalePolicy = Field(
        _REQUEST.stale,
        description="if data files are younger than the metadata that describes them by more than the save took (a later save was "
        "killed): warn, or raise an error",
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("wanted_dtypes")
    @classmethod
    def _are_dtypes(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"{name!r} is not a torch dtype; write float32, bfloat16, ...")  # noqa: TRY004 - pydantic takes ValueError alone
            if not can_convert(torch.float32, getattr(torch, name)):
                raise ValueError(f"state can't be converted to {name}; write float32, bfloat16, ...")
        return value

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.model_location is not None and self.model_key is None:
            raise ValueError("model_location is given without model_key, the key of the weights there")
        self.request()
        return self

    def options_for(self, location: Any) -> Mapping[str, Any]:
        """The storage options with which a location is opened, and the weights with it."""
        return with_weights_from(self.storage_options, location, self.model_location)

    def request(self) -> LoadRequest:
        """The same as the core's `LoadRequest`. Raises ValueError: a renaming or a key policy that is not valid."""
        return LoadRequest(
            optimizer_key=self.optimizer_key,
            model_key=None if isinstance(self.model_key, dict) else self.model_key,
            selection=Selection.of(self.rename, self.include, self.exclude),
            keys=KeyPolicy.of(self.keys),
            dtype=self.dtype,
            wanted_dtypes=tuple((glob, getattr(torch, name)) for glob, name in self.wanted_dtypes.items()),
            hyperparameters=HyperparameterPolicy.of(self.hyperparameters),
            safe_globals=self.safe_globals,
            stale=self.stale,
        )

    def requests(self) -> PartRequests:
        """Those of a trainer's optimizers."""
        return PartRequests(self.request(), self.model_key if isinstance(self.model_key, dict) else {})


class RuleSpec(Spec):
    """Placements for the parameters whose FQN matches."""

    match: str = Field(min_length=1, description="shell glob over parameter FQNs")
    placements: dict[str, str] = Field(
        description="mesh axis to `Shard(<dim>)` or `Replicate`; axes that are not named replicate"
    )
    state: str | None = Field(
        None,
        min_length=1,
        description="glob over state names: the rule applies to these entries only, whatever their shape; null: to the parameter "
        "and all state of its shape",
    )


class HeldBySpec(Spec):
    """Parameters that only some ranks have: the layers of a pipeline stage, the experts of a rank."""

    match: str = Field(min_length=1, description="shell glob over parameter FQNs")
    ranks: dict[str, tuple[int, ...]] = Field(
        min_length=1, description="mesh axis to the coordinates on it that have the parameters"
    )


class TopologySpec(Spec):
    """The target mesh and the placements of each parameter on it."""

    mesh: dict[str, PositiveInt] = Field(min_length=1, description="axis name to size, outermost axis first")
    rules: tuple[RuleSpec, ...] = Field(
        (), description="placements by FQN; the first match wins; a rule that matches nothing is an error"
    )
    default: dict[str, str] = Field(
        {},
        description="placements where no rule matches; axes that are not named replicate, as does an axis whose dimension the "
        "tensor lacks",
    )
    held_by: tuple[HeldBySpec, ...] = Field(
        (),
        description="which ranks have which parameters; per axis the first match wins; other parameters are on all ranks; a "
        "glob that matches nothing is an error",
    )

    @field_validator("mesh")
    @classmethod
    def _is_a_valid_mesh(cls, value: dict[str, int]) -> dict[str, int]:
        if "" in value:
            raise ValueError("an axis has no name")
        if (num_ranks := math.prod(value.values())) > _MAX_RANKS:
            raise ValueError(f"makes {num_ranks} ranks; the most are {_MAX_RANKS}")
        return value

    @model_validator(mode="after")
    def _placements_fit_the_mesh(self) -> Self:
        self.layout()
        return self

    def layout(self) -> SpecLayout:
        """The same as the core's `SpecLayout`. Raises ValueError: an unknown axis, or text that is not a placement."""
        rules = [
            Rule(rule.match, _placements(rule.placements, f"rules[{index}]"), rule.state)
            for index, rule in enumerate(self.rules)
        ]
        held_by = tuple(HeldBy(held.match, held.ranks) for held in self.held_by)
        return SpecLayout(Mesh(tuple(self.mesh.items())), tuple(rules), _placements(self.default, "default"), held_by)


def _placements(texts: dict[str, str], where: str) -> dict[str, Placement]:
    try:
        return {axis: parse_placement(text) for axis, text in texts.items()}
    except LayoutError as error:
        raise LayoutError(f"{where}: {error}") from None


def _check_amount(value: object) -> object:
    """Refuse what is neither an amount nor ``auto``, with one error for both."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (is_number and math.isfinite(value) and value >= 0):  # type: ignore[arg-type, operator]
        raise ValueError("is neither auto nor a finite number that is 0 or more")
    return value


Amount = Annotated[Annotated[float, Field(ge=0)] | Literal["auto"], BeforeValidator(_check_amount)]


class ActorsSpec(Spec):
    """The loader actors, one per rank."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="memory that the state is loaded into; auto: a GPU where the trainer can map it, else host memory",
    )
    gpus_per_actor: Amount = Field(
        "auto",
        description="GPUs per loader actor; auto: 0 with trainers, else 1, or what a placement group of yours has; 0 on clusters "
        "without GPUs",
    )
    cpus_per_actor: Amount = Field("auto", description="CPUs per loader actor; auto: as gpus_per_actor")
    placement: Literal["auto", "PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "auto",
        description="where loaders run; auto: each beside its trainer, without trainers as PACK; else the strategy of the stage's "
        "placement group",
    )
    label_selector: dict[str, str] = Field(
        {},
        description="labels of the nodes for loaders, as Ray's label_selector; beside a trainer its node must have them",
    )
    autoscaling: bool = Field(
        False,
        description="wait up to timeouts.start_s for resources that the cluster does not have yet; false: raise an error at once",
    )

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value > 1 and value != int(value):
            raise ValueError(f"{value} GPUs: above 1, Ray gives whole GPUs only")
        return value


def _as_bytes(count: int | None) -> ByteSize | None:
    return None if count is None else ByteSize(count)


class ReadSpec(Spec):
    """How each rank reads. Names and defaults are those of `shardferry.config.ReadOptions`."""

    strategy: Strategy = Field(
        _READ.strategy,
        description="direct: each rank reads the bytes it wants; cooperative: ranks read for each other, each byte once; "
        "auto: direct from local files on one node, else cooperative; see docs/cooperation.md",
    )
    concurrency: int = Field(
        _READ.concurrency, ge=1, le=1024, description="largest number of requests in flight per rank"
    )
    memory_budget: ByteSize = Field(
        ByteSize(_READ.memory_budget),
        description="largest size of all read buffers of a rank, beside the loaded state; reads in place take no buffer",
    )
    max_gap: ByteSize | None = Field(
        _as_bytes(_READ.max_gap),
        description="largest gap between two byte ranges that are fetched in one request; null: by the kind of storage",
    )
    max_request: ByteSize | None = Field(
        _as_bytes(_READ.max_request), gt=0, description="largest size of one request; null: by the kind of storage"
    )
    max_attempts: int = Field(
        _READ.max_attempts,
        ge=1,
        le=100,
        description="attempts per request, if it fails with a transient error such as a timeout or HTTP 503",
    )
    storage_bandwidth: ByteSize | None = Field(
        None,
        description="bandwidth of the storage to the whole job, for the lower bound in reports; it does not limit reads",
    )
    node_bandwidth: ByteSize | None = Field(
        None, gt=0, description="bandwidth of the storage to one node, for the lower bound in reports"
    )
    exchange_bandwidth: ByteSize | None = Field(
        None, gt=0, description="bandwidth from one rank to other nodes, for the lower bound in reports"
    )

    @field_validator("memory_budget")
    @classmethod
    def _holds_one_request(cls, value: ByteSize) -> ByteSize:
        if value < MIN_MEMORY_BUDGET_BYTES:
            raise ValueError(
                f"{value} bytes don't hold one request; the least is {MIN_MEMORY_BUDGET_BYTES} bytes (8MiB)"
            )
        return value

    def options(self, load_s: float) -> ReadOptions:
        """The same as the core's `ReadOptions`.

        Args:
            load_s: seconds for planning and reading.
        """
        return ReadOptions(
            strategy=self.strategy,
            concurrency=self.concurrency,
            memory_budget=self.memory_budget,
            max_gap=self.max_gap,
            max_request=self.max_request,
            max_attempts=self.max_attempts,
            load_s=load_s,
        )


_TRANSPORTS = stage_transport_names()


def _check_transport(value: object) -> object:
    """Refuse a name that is not in the registry of transports, with the error of a Literal of its names."""
    if value not in _TRANSPORTS:
        *names, last = map(repr, _TRANSPORTS)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(names)} or {last}"})
    return value


TransportName = Annotated[str, BeforeValidator(_check_transport), Field(json_schema_extra={"enum": list(_TRANSPORTS)})]


class KeepSpec(Spec):
    """State that stays in the memory of the cluster after the load; see docs/resident.md."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$", description="under which trainers attach to it")
    ttl_s: Seconds = Field(3600, description="it is dropped if nobody has attached for so long")
    replace: bool = Field(
        False, description="a name that is taken is given to the new state, once that is complete; false: an error"
    )
    memory_fraction: float = Field(
        0.8,
        gt=0,
        le=1,
        description="most of a node's available memory that the state may take; more is refused before anything is read",
    )


class HandoffSpec(Spec):
    """How a loaded shard reaches its trainer."""

    keep: KeepSpec | None = Field(None, description="keep what is loaded in the memory of the cluster; null: don't")

    transport: TransportName = Field(
        AUTO,
        description="auto: shared memory on the loader's node, else the object store; in_process: no loaders, each trainer loads; "
        "collective: a process group of loader and trainer; nixl: through NIXL, where installed; "
        "see docs/handoff.md",
    )
    retries: int = Field(
        1,
        ge=0,
        le=100,
        description="how often `attach` reads the part of a loader that has died again from the checkpoint; 0: an error",
    )


class TimeoutsSpec(Spec):
    """Deadlines of every wait."""

    start_s: Seconds = Field(
        120, description="deadline for placing and starting the actors, and for joining their process group"
    )
    load_s: Seconds = Field(LOAD_TIMEOUT_S, description="deadline for planning and reading")
    handoff_s: Seconds = Field(600, description="deadline for the handoff to the trainers")


class StageConfig(Spec):
    """The spec of a stage."""

    checkpoint: CheckpointSpec = CheckpointSpec()
    topology: TopologySpec | None = Field(None, description="the topology to load for; null: the trainers are asked")
    actors: ActorsSpec = ActorsSpec()
    read: ReadSpec = ReadSpec()
    handoff: HandoffSpec = HandoffSpec()
    timeouts: TimeoutsSpec = TimeoutsSpec()

    @model_validator(mode="after")
    def _device_and_transport_fit(self) -> Self:
        if self.actors.device == "cuda" and needs_host_arena(self.handoff.transport):
            raise ValueError(
                f"handoff.transport {self.handoff.transport} needs arenas on the host; actors.device is cuda"
            )
        if self.actors.device == "cpu" and self.handoff.transport == "cuda_ipc":
            raise ValueError("handoff.transport cuda_ipc needs arenas on a GPU; actors.device is cpu")
        if self.handoff.keep is not None and self.actors.device == "cuda":
            raise ValueError("handoff.keep keeps state in host memory; actors.device is cuda")
        if self.handoff.keep is not None and self.handoff.transport == "in_process":
            raise ValueError("handoff.keep needs loaders; handoff.transport is in_process")
        if self.actors.device == "cuda" and self.actors.gpus_per_actor == 0:
            raise ValueError("actors.device is cuda, but actors.gpus_per_actor is 0")
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> StageConfig:
        """Read a spec from a YAML or JSON file.

        Raises:
            SpecError: the file can't be read, or a field is wrong; the message has the field's path.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
        except OSError as error:
            raise SpecError(f"{path}: can't be read: {error.strerror or error}; give the file of a spec") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise SpecError(f"{path}: not readable as a spec: {' '.join(str(error).split())}") from error
        except RecursionError:
            raise SpecError(f"{path}: not readable as a spec: it is nested too deeply") from None
        if not isinstance(values, dict):
            raise SpecError(f"{path}: is a {type(values).__name__}, not a spec with the fields {_fields()}")
        return cls.from_values(values, source=str(path))

    @classmethod
    def from_values(cls, values: dict[str, Any], *, source: str) -> StageConfig:
        """Validate plain values.

        Args:
            values: section name to fields.
            source: the file or the options that they come from, for the message.

        Raises:
            SpecError: a field is wrong; the message has the path of each wrong field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(f"{source}: " + "; ".join(_message(problem) for problem in error.errors())) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice. PyYAML alone silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for place, key in enumerate(scalars) if key in scalars[:place]]:
            raise yaml.MarkedYAMLError(problem=f"the key {twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _fields() -> str:
    return ", ".join(StageConfig.model_fields)


def _message(problem: Any) -> str:
    path = ".".join(map(str, problem["loc"])) or "spec"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown field (found {_FOUND.repr(problem['input'])}); known are {_siblings(problem['loc'])}"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    shown = "" if isinstance(problem["input"], dict) else f" (found {_FOUND.repr(problem['input'])})"
    return f"{path}: {message}{shown}"


def _siblings(location: tuple[str | int, ...]) -> str:
    model: Any = StageConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return ", ".join(model.model_fields)
