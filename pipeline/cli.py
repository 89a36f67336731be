"""The command line: ``shardferry inspect | plan | run | verify | demo``.

Each command imports its modules when it runs: ``--help`` imports neither torch nor Ray, ``inspect`` and ``plan`` import no Ray.

Exit status: 0 done; 1 the work failed; 2 the command or its spec is wrong. An error is one message on stderr.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shardferry import __version__
from shardferry.errors import LayoutError, ShardferryError, SpecError

_MAX_SHOWN = 40  # tensors on the terminal; JSON has all

app = typer.Typer(
    name="shardferry",
    help="Load sharded optimizer state from PyTorch distributed checkpoints, in any topology.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass
class _Settings:
    """Options of all commands; the context object of typer."""

    debug: bool = False


CheckpointArg = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Directory of the checkpoint, or a URL that fsspec can open.")
]
SpecArg = Annotated[Path, typer.Argument(metavar="STAGE.yaml", help="The stage's spec, YAML or JSON.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LocationOption = Annotated[str | None, typer.Option(help="Checkpoint to use instead of the spec's.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"shardferry {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    context.ensure_object(_Settings).debug = debug


@app.command(epilog="Example: shardferry inspect ckpt/step-1000 --json | jq .problems")
def inspect(checkpoint: CheckpointArg, as_json: JsonOption = False) -> None:
    """Show the content of a checkpoint: tensors, the topology it was saved in, sizes, versions, problems."""
    from shardferry.checkpoint.open import open_checkpoint
    from shardferry.pipeline.display import human_bytes, print_table
    from shardferry.pipeline.inspect import inspect_report

    report = inspect_report(open_checkpoint(checkpoint))
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    print_table(
        report.location,
        ("tensor", "shape", "dtype", "chunks", "size"),
        [(t.fqn, t.shape, t.dtype, t.num_chunks, human_bytes(t.nbytes)) for t in report.tensors[:_MAX_SHOWN]],
    )
    if len(report.tensors) > _MAX_SHOWN:
        print(f"... and {len(report.tensors) - _MAX_SHOWN} more tensors; --json lists all")
    print(
        f"{report.num_tensors} tensors and {report.num_objects} objects in {report.num_chunks} chunks of {report.num_files} files, "
        f"{human_bytes(report.total_bytes)}; metadata version {report.torch_metadata_version}; keys: {', '.join(report.top_level_keys)}"
    )
    print("saved as: " + "; ".join(f"{count} x {sharding}" for sharding, count in report.topology.items()))
    print("".join(f"warning: {warning}\n" for warning in report.warnings), end="")
    print("problems: " + ("none" if not report.problems else "".join(f"\n  {problem}" for problem in report.problems)))


@app.command(
    epilog="Example: shardferry plan stage.yaml --mesh dp_replicate=8,dp_shard=256,tp=8 --storage-bandwidth 100GB"
)
def plan(
    spec: SpecArg,
    location: LocationOption = None,
    mesh: Annotated[
        str | None, typer.Option(help="Mesh to use instead of the spec's: name=size,name=size, outermost first.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of ranks: the size of the axis dp_shard, else of the outermost, is changed to match."
        ),
    ] = None,
    storage_bandwidth: Annotated[
        str | None, typer.Option(help="Bytes per second that the storage gives to the whole job: 100GB.")
    ] = None,
    request_latency: Annotated[float, typer.Option(min=0, help="Seconds that a request waits for its first byte.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Dry run from the checkpoint's metadata alone: the bytes that each rank would read. Starts no Ray and reads no data."""
    from shardferry.pipeline.display import print_plan
    from shardferry.pipeline.dry_run.forecast import plan_report
    from shardferry.pipeline.dry_run.overrides import override
    from shardferry.pipeline.preflight import open_checkpoint_of
    from shardferry.schemas.stage_config import StageConfig

    config = override(
        StageConfig.from_file(spec), mesh=mesh, world_size=world_size, storage_bandwidth=storage_bandwidth
    )
    report = plan_report(config, open_checkpoint_of(config, location), request_latency_s=request_latency)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_plan(report)


@app.command(epilog="Example: ray job submit --working-dir . -- python -m pipeline run stage.yaml --report report.json")
def run(
    spec: SpecArg,
    location: LocationOption = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the phases here, as a Chrome trace.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here, as an HTML page.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else an embedded one.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="(Logical) GPUs of an embedded Ray.")] = None,
) -> None:
    """Run the stage, on an embedded Ray if no cluster is given."""
    from shardferry.pipeline.preflight import check_checkpoint, check_topology, open_checkpoint_of, target_layout
    from shardferry.schemas.stage_config import StageConfig

    config = StageConfig.from_file(spec)
    catalog = open_checkpoint_of(config, location)  # a wrong path is refused before a cluster is started
    _check_writable(report, trace, html)
    from shardferry.pipeline.cluster import ray_for
    from shardferry.pipeline.display import byte_progress, print_stage, show_ranks
    from shardferry.pipeline.exports import chrome_trace, html_page
    from shardferry.pipeline.stage import OptimizerLoadStage

    layout = target_layout(config)
    check_checkpoint(catalog, config.checkpoint.request())
    check_topology(catalog, layout, config.checkpoint.request())
    with ray_for(config, layout.world_size, address=address, num_gpus=num_gpus), byte_progress("loading") as bar:
        result = OptimizerLoadStage(config).run(
            location=catalog.location, on_progress=lambda ranks: show_ranks(bar, ranks)
        )
        done = result.report
        show_ranks(bar, result.final_progress())
        result.close()
    if report:
        report.write_text(done.model_dump_json(indent=2), encoding="utf-8")
    if trace:
        trace.write_text(chrome_trace(done), encoding="utf-8")
    if html:
        html.write_text(html_page(done), encoding="utf-8")
    print_stage(done)


@app.command(epilog="Example: shardferry verify ckpt/step-1000")
def verify(
    checkpoint: CheckpointArg,
    concurrency: Annotated[int, typer.Option(min=1, help="Items read at the same time.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Read each byte once, and check cover, lengths, headers and checksums."""
    import json
    import threading

    from shardferry.checkpoint.open import open_checkpoint, opened_storage
    from shardferry.pipeline.display import byte_progress, human_bytes
    from shardferry.read.verify import verified_bytes, verify_checkpoint

    catalog = open_checkpoint(checkpoint)
    total, lock, done = verified_bytes(catalog), threading.Lock(), [0]
    with byte_progress("verifying") as bar, opened_storage(catalog) as storage:

        def on_item(nbytes: int) -> None:
            with lock:
                done[0] += nbytes
                bar.show(done[0], total)

        problems = verify_checkpoint(catalog, storage, concurrency=concurrency, on_item=on_item)
    warnings = [catalog.stale] if catalog.stale else []
    if as_json:
        found = {"location": catalog.location, "bytes_read": total, "problems": problems, "warnings": warnings}
        print(json.dumps(found, indent=2))
    else:
        print("".join(f"warning: {warning}\n" for warning in warnings), end="")
        print(f"{catalog.location}: {human_bytes(total)} in {len(catalog.files)} files, {len(problems)} problems")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    if problems:
        raise typer.Exit(1)


@app.command(epilog="Example: shardferry demo")
def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Keep the checkpoint here; default: a temporary directory.")
    ] = None,
) -> None:
    """Train on 4 processes, save, load on 2 through the stage, train further, and compare the losses, on one machine."""
    from shardferry.pipeline.demo.story import tell

    if not tell(directory):
        raise typer.Exit(1)


def _check_writable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise SpecError(f"{path}: its directory does not exist; make it first")


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; default: that of the process.

    Returns:
        The exit status.
    """
    settings = _Settings()
    try:
        app(arguments, obj=settings)
    except SystemExit as stop:  # typer ends each command so, and prints its own message for wrong usage
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail("interrupted", 1, settings)
    except (SpecError, LayoutError) as error:
        return _fail(str(error), 2, settings)
    except (ShardferryError, OSError) as error:
        return _fail(str(error), 1, settings)
    return 0


def _fail(message: str, status: int, settings: _Settings) -> int:
    if settings.debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status
