"""``shardferry inspect``: print what is in a checkpoint, the optimizer first, with equal layers in one line."""

from __future__ import annotations

from shardferry.pipeline.display import human_bytes, print_table
from shardferry.pipeline.inspect import alike, fold_layers
from shardferry.schemas.inspect_report import InspectReport

_MAX_SHOWN = 40  # lines of tensors on the terminal; JSON has all


def print_inspect(report: InspectReport) -> None:
    """Print a checkpoint's content on stdout."""
    for optimizer in report.optimizers:
        print(
            f"optimizer {optimizer.key!r}: {optimizer.num_parameters} parameters with {', '.join(optimizer.state_names)}; "
            f"{human_bytes(optimizer.nbytes)}"
        )
    if not report.optimizers:
        print("no optimizer is in it")
    groups = alike(report.tensors)
    rows = []
    for group in groups[:_MAX_SHOWN]:
        name, count = fold_layers([tensor.fqn for tensor in group])
        first, nbytes = group[0], sum(tensor.nbytes for tensor in group)
        shown = f"{name} x {count}" if count > 1 else name
        rows.append((shown, first.shape, first.dtype, first.num_chunks, human_bytes(nbytes)))
    print_table(report.location, ("tensor", "shape", "dtype", "chunks", "size"), rows)
    if len(groups) > _MAX_SHOWN:
        more = sum(map(len, groups[_MAX_SHOWN:]))
        print(f"... and {more} more tensors; --filter and --key select some, --json lists all")
    if len(report.tensors) < report.num_tensors:
        print(f"selected {len(report.tensors)} of {report.num_tensors} tensors")
    print(
        f"{report.num_tensors} tensors and {report.num_objects} objects in {report.num_chunks} chunks of {report.num_files} files, "
        f"{human_bytes(report.total_bytes)}; keys: {', '.join(report.top_level_keys)}"
    )
    ranks = "" if report.num_writers is None else f" (by {report.num_writers} rank{'s' * (report.num_writers != 1)})"
    print("saved as: " + "; ".join(f"{count} x {sharding}" for sharding, count in report.topology.items()) + ranks)
    writer = "" if report.writer is None else f"written by {report.writer}; "
    print(f"{writer}metadata version {report.torch_metadata_version}")
    print("".join(f"warning: {warning}\n" for warning in report.warnings), end="")
    print("problems: " + ("none" if not report.problems else "".join(f"\n  {problem}" for problem in report.problems)))
