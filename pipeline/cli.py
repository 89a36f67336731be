"""The list of commands: ``shardferry inspect | init | diff | plan | run | report | verify | kept | demo``.

What they do is in `shardferry.pipeline.commands`. Each command imports its modules when it runs: ``--help`` imports neither torch nor Ray, ``inspect`` and ``plan`` import no Ray.

Exit status: 0 done; 1 the work failed; 2 the command or its spec is wrong; 130 interrupted. An error is one message on stderr.
"""

from __future__ import annotations

import shlex
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from shardferry import __version__
from shardferry.errors import LayoutError, ShardferryError, SpecError
from shardferry.pipeline.commands.interrupts import Interrupts

app = typer.Typer(
    name="shardferry",
    help="Load sharded optimizer state from PyTorch distributed checkpoints, in any topology.",
    epilog="Exit status: 0 done; 1 the work failed; 2 the command or its spec is wrong; 130 interrupted. COMMAND --help has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass
class _Settings:
    """Options of all commands; the context object of typer."""

    debug: bool = False
    command: str = ""  # the command line
    interrupts: Interrupts = field(default_factory=Interrupts)


_INTERRUPTED = 130  # typer's status for Ctrl-C, as shells have it
# Of all commands; the first line is kept as it is.
_STATUSES = (
    "Exit status: 0 done; 1 the work failed (one error on stderr); 2 the command or its spec is wrong; 130 interrupted."
)


def _epilog(*examples: str, statuses: str = _STATUSES) -> str:
    """The end of a command's help. ``\\b`` keeps the lines of a paragraph."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\n{statuses}"


CheckpointArg = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Directory of the checkpoint, or a URL that fsspec can open.")
]
SpecArg = Annotated[Path, typer.Argument(metavar="STAGE.yaml", help="The stage's spec, YAML or JSON.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
LocationOption = Annotated[str | None, typer.Option(help="Checkpoint to use instead of the spec's.")]
HtmlOption = Annotated[str | None, typer.Option(help="Write the report here, as an HTML page: a path or a URL.")]
FilterOption = Annotated[str | None, typer.Option("--filter", help="Only tensors whose key matches this glob.")]
KeyOption = Annotated[str | None, typer.Option("--key", help="Only what was saved under this key: optim, app.optim.")]


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


@app.command(
    epilog=_epilog(
        "shardferry inspect ckpt/step-1000 --filter '*.wq.weight.*'",
        "shardferry inspect s3://bucket/run/step-1000 --json | jq .problems",
    )
)
def inspect(
    checkpoint: CheckpointArg,
    glob: FilterOption = None,
    key: KeyOption = None,
    suggest: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANKS", help="Print a stage's spec for this many ranks, and nothing else."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the content of a checkpoint: optimizers, tensors, the topology it was saved in, sizes, versions, problems."""
    from shardferry.checkpoint.open import open_checkpoint
    from shardferry.pipeline.inspect import inspect_report

    catalog = open_checkpoint(checkpoint)
    if suggest is not None:
        from shardferry.pipeline.commands.suggest import suggested_spec

        if as_json:
            raise SpecError("--suggest: prints YAML; leave --json out")
        print(suggested_spec(catalog, {"dp_shard": suggest}), end="")
        return
    report = inspect_report(catalog, glob=glob, key=key)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        from shardferry.pipeline.commands.inspect import print_inspect

        print_inspect(report)


@app.command(
    epilog=_epilog(
        "shardferry init ckpt/step-1000 --mesh dp_shard=4,tp=2 > stage.yaml",
        "shardferry init s3://bucket/run/step-1000 --mesh pp=2,dp_shard=8 > stage.yaml",
    )
)
def init(
    checkpoint: CheckpointArg,
    mesh: Annotated[str, typer.Option(help="The target's mesh: name=size,name=size, outermost first.")],
) -> None:
    """Write a stage's spec, with comments, from what is in a checkpoint, to stdout.

    The axes' names say what they do: dp_shard and fsdp cut each parameter, dp_replicate copies, tp cuts matrices by the names
    of their modules, pp gives each layer to one stage.
    """
    from shardferry.checkpoint.open import open_checkpoint
    from shardferry.pipeline.commands.suggest import suggested_spec
    from shardferry.pipeline.dry_run.overrides import parse_mesh

    print(suggested_spec(open_checkpoint(checkpoint), parse_mesh(mesh)), end="")


@app.command(
    epilog=_epilog(
        "shardferry diff ckpt/step-1000 ckpt/step-2000",
        "shardferry diff before after --values --key optim --json | jq '.tensors[].relative_norm'",
        statuses="Exit status: 0 no difference; 1 they differ, or the work failed (one error on stderr); 2 the command is wrong.",
    )
)
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A checkpoint, as for inspect, or kept state: shardferry+memory://NAME.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    values: Annotated[
        bool, typer.Option("--values", help="Read both, and tell which tensors differ, and by how much.")
    ] = False,
    glob: FilterOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the keys, shapes and dtypes of two checkpoints, or of a checkpoint and kept state, and with --values each element."""
    from shardferry.checkpoint.open import open_checkpoint
    from shardferry.pipeline.commands.diff import diff_report, print_diff
    from shardferry.pipeline.display import byte_progress
    from shardferry.pipeline.inspect import is_selected

    catalogs = open_checkpoint(first), open_checkpoint(second)
    with byte_progress("comparing") as bar:
        report = diff_report(
            *catalogs,
            with_values=values,
            selects=lambda name: is_selected(name, glob, key),
            on_bytes=bar.show,
        )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_diff(report)
    if not report.is_same:
        raise typer.Exit(1)


@app.command(
    epilog=_epilog(
        "shardferry plan stage.yaml --world-size 64",
        "shardferry plan stage.yaml --mesh dp_replicate=8,dp_shard=256,tp=8 --storage-bandwidth 100GB",
    )
)
def plan(
    context: typer.Context,
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
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Dry run from the checkpoint's metadata alone: the bytes that each rank would read. Starts no Ray and reads no data."""
    from shardferry.pipeline.commands.outputs import page_output
    from shardferry.pipeline.display import print_plan
    from shardferry.pipeline.dry_run.forecast import plan_report
    from shardferry.pipeline.dry_run.overrides import override
    from shardferry.pipeline.preflight import open_checkpoint_of
    from shardferry.schemas.stage_config import StageConfig

    config = override(
        StageConfig.from_file(spec), mesh=mesh, world_size=world_size, storage_bandwidth=storage_bandwidth
    )
    page = page_output(html)
    found = plan_report(config, open_checkpoint_of(config, location), request_latency_s=request_latency)
    report = found.model_copy(update={"command": context.ensure_object(_Settings).command})
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_plan(report)
    if page is not None:
        from shardferry.pipeline.exports import page_of

        page.write(page_of(report))


@app.command(
    epilog=_epilog(
        "shardferry run stage.yaml --html report.html",
        "ray job submit --working-dir . -- python -m pipeline run stage.yaml --report s3://bucket/run/report.json",
    )
)
def run(
    context: typer.Context,
    spec: SpecArg,
    location: LocationOption = None,
    report: Annotated[
        str | None, typer.Option(help="Write the report here, as JSON: a path, a URL, or - for one line on stdout.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="Write the phases here, as a trace for ui.perfetto.dev: a path or a URL.")
    ] = None,
    html: HtmlOption = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else an embedded one.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="(Logical) GPUs of an embedded Ray.")] = None,
) -> None:
    """Run the stage, on an embedded Ray if no cluster is given. A run that fails writes its report and its page too."""
    from shardferry.pipeline.commands.run import run_stage

    settings = context.ensure_object(_Settings)
    run_stage(
        spec,
        location,
        {"report": report, "trace": trace, "html": html},
        address=address,
        num_gpus=num_gpus,
        command=settings.command,
        interrupts=settings.interrupts,
    )


@app.command(
    epilog=_epilog(
        "shardferry report report.json --html report.html",
        "shardferry report report.json --compare yesterday.json",
    )
)
def report(
    file: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What run --report has written.")],
    html: HtmlOption = None,
    trace: Annotated[str | None, typer.Option(help="Write its phases here, as a trace: a path or a URL.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER.json", help="Show it beside the report of another run, also on the page of --html."
        ),
    ] = None,
) -> None:
    """Show a run's report again: as the summary, as a page or a trace, or beside that of another run."""
    from shardferry.pipeline.commands.report import show_report

    show_report(file, html=html, trace=trace, compare=compare)


@app.command(
    epilog=_epilog("shardferry verify ckpt/step-1000", "shardferry verify s3://bucket/run/step-1000 --concurrency 64")
)
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


@app.command(epilog=_epilog("shardferry kept", "shardferry kept --drop run-7"))
def kept(
    drop: Annotated[str | None, typer.Option(metavar="NAME", help="Give the memory of this one back.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else the running one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the state that is kept in the memory of a Ray cluster, or drop some of it."""
    from shardferry.pipeline.commands.kept import list_kept

    list_kept(drop, address, as_json=as_json)


@app.command(epilog=_epilog("shardferry demo", "shardferry demo --directory demo-1"))
def demo(
    directory: Annotated[
        Path | None, typer.Option(help="Keep the checkpoint here; default: a temporary directory.")
    ] = None,
) -> None:
    """Train on 4 processes, save, load on 2 through the stage, train further, and compare the losses, on one machine."""
    from shardferry.pipeline.demo.story import tell

    if not tell(directory):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; default: that of the process.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if arguments is None else arguments
    settings = _Settings(command=shlex.join(["shardferry", *words]))
    try:
        with settings.interrupts.noticed():
            app(arguments, obj=settings)
    except SystemExit as stop:  # typer ends each command so, and prints its own message for wrong usage
        if stop.code == _INTERRUPTED:
            return _fail("interrupted", _INTERRUPTED, settings)
        return stop.code if isinstance(stop.code, int) else 1
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
