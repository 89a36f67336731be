"""The content of a checkpoint, from its metadata: the JSON of ``shardferry inspect --json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TensorReport(BaseModel):
    """One saved tensor."""

    model_config = ConfigDict(frozen=True)

    fqn: str
    shape: list[int]
    dtype: str
    num_chunks: int
    nbytes: int
    grid: list[int]  # number of chunks along each dimension


class OptimizerReport(BaseModel):
    """One saved optimizer."""

    model_config = ConfigDict(frozen=True)

    key: str  # what a spec's checkpoint.optimizer_key is for it
    num_parameters: int  # with state
    state_names: list[str]  # of all parameters: exp_avg, step, ...
    nbytes: int  # of its tensors


class InspectReport(BaseModel):
    """One checkpoint."""

    model_config = ConfigDict(frozen=True)

    location: str
    torch_metadata_version: str
    writer: str | None = None  # the program that saved it, where its keys tell
    num_writers: int | None = None  # ranks that wrote files, where the files' names tell
    top_level_keys: list[str]
    optimizers: list[OptimizerReport] = []
    num_tensors: int
    num_objects: int
    num_chunks: int
    num_files: int
    total_bytes: int
    topology: dict[str, int]  # how tensors were sharded when they were saved, in words: number of tensors
    tensors: list[TensorReport]  # those of optimizers first; with a filter, the selected ones
    problems: list[str]
    warnings: list[str] = []
