"""Find saved tensors of classes of their own, such as low-bit state, which only their class can cut or join.

They are known by their items: these hold codes and scales, and are shorter than the elements would be.
"""

from __future__ import annotations

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedTensor, ZipItem
from shardferry.errors import LayoutError
from shardferry.layout.tensor_layout import TensorLayout


def has_class(catalog: Catalog, saved: SavedTensor) -> bool:
    """Whether an item of a tensor is shorter than its elements. Items of others may not be: a class may leave small parts plain."""
    lengths = catalog.chunk_byte_length[saved.chunks.start : saved.chunks.stop]
    if not saved.chunks or lengths.min() >= saved.nbytes:  # most: a chunk has no more elements than the whole
        return False
    _, sizes = catalog.boxes(saved)
    is_short = lengths < sizes.prod(axis=1) * saved.dtype.itemsize
    return any(_is_zip(catalog, saved.chunks.start + row) for row in is_short.nonzero()[0].tolist())


def _is_zip(catalog: Catalog, chunk: int) -> bool:
    is_stored = catalog.chunk_file[chunk] != NO_FILE
    return is_stored and isinstance(catalog.formats[catalog.chunk_format[chunk]], ZipItem)


def only_chunk(catalog: Catalog, saved: SavedTensor, layout: TensorLayout, *, fqn: str, name: str) -> int:
    """The row of the saved chunk that is all a rank wants of such a tensor.

    Args:
        layout: of the tensor on this rank, which wants something of it.

    Raises:
        LayoutError: there is none.
    """
    wanted = [box.region for box in layout.boxes]
    for chunk in saved.chunks:
        region = catalog.region(saved, chunk)
        if wanted == [region] and layout.local_shape == region.sizes:
            return chunk
    raise LayoutError(
        f"{fqn}: quantised state: {name!r} was saved as tensors of a class of its own (their items are shorter than {saved.dtype} "
        f"elements), in {len(saved.chunks)} chunks; this rank wants {' and '.join(map(str, wanted))} of {saved.shape}, which is "
        "not one of them, and only that class can cut or join them. Load it where each rank holds what one rank saved; leave the "
        "parameter out with exclude; or save it dequantised, as a plain tensor"
    )
