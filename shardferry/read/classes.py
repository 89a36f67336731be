"""Read saved tensors of classes of their own, such as quantised state: whole items, which only their classes can make."""

from __future__ import annotations

from dataclasses import replace

import torch

from shardferry.checkpoint.catalog import Catalog
from shardferry.plan.load_plan import LoadPlan, PlannedValue
from shardferry.read.items import read_item, tensor_item, value_of
from shardferry.read.objects import ForeignClass, allowed_classes
from shardferry.read.zip_header import QuantisedState
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader


def with_classes(plan: LoadPlan, catalog: Catalog, storage: RangeReader, counters: Counters) -> LoadPlan:
    """The plan with this rank's tensors of classes of their own, read whole and made by their classes.

    Raises:
        StorageError, DecodeError: an item can't be read. QuantisedState: its class is not allowed, and `keys` are strict.
        SpecError: a class that the request allows can't be imported.
    """
    if all(value.chunk is None for value in plan.values):
        return plan
    values = []
    with torch.serialization.safe_globals(allowed_classes(plan.request.safe_globals)):
        for value in plan.values:
            if value.chunk is None:
                values.append(value)
                continue
            try:
                values.append(replace(value, value=_tensor_of_class(value, value.chunk, catalog, storage, counters)))
            except QuantisedState:
                if not plan.request.keys.allow_missing:
                    raise
    return replace(plan, values=tuple(values))


def _tensor_of_class(
    value: PlannedValue, chunk: int, catalog: Catalog, storage: RangeReader, counters: Counters
) -> torch.Tensor:
    saved = catalog.tensors[value.key]
    item = tensor_item(catalog, key=value.key, dtype=saved.dtype, shape=value.chunk_shape, chunk=chunk)
    try:
        with counters.request(item.path, item.byte_length):
            data = read_item(item, storage, item.byte_length)
        found = value_of(item, data)
    except ForeignClass as error:
        raise QuantisedState(
            f"{value.fqn}: quantised state: {value.name!r} was saved as a tensor of {', '.join(error.names)}, which was not imported. "
            "If you trust it, allow it with torch.serialization.add_safe_globals or checkpoint.safe_globals; else leave the "
            "parameter out with exclude, or save it dequantised, as a plain tensor"
        ) from error
    if not isinstance(found, torch.Tensor) or found.shape != value.chunk_shape:
        raise item.damaged(f"it holds no tensor of the shape {value.chunk_shape}")
    return found
