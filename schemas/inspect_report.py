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


class InspectReport(BaseModel):
    """One checkpoint."""

    model_config = ConfigDict(frozen=True)

    location: str
    torch_metadata_version: str
    top_level_keys: list[str]
    num_tensors: int
    num_objects: int
    num_chunks: int
    num_files: int
    total_bytes: int
    topology: dict[str, int]  # how tensors were sharded when they were saved, in words: number of tensors
    tensors: list[TensorReport]
    problems: list[str]
    warnings: list[str] = []
