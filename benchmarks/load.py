"""Measure loading: Shardferry, stock torch, other systems, and the floor; from a page cache, a disk and an object store.

Checkpoints of AdamW state are written once by real FSDP2 ranks with stock ``dcp.save``; then every case runs on live
ranks, contenders interleaved. Each loaded element is compared with what was saved. Speed never fails a run.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.cases import CASES, Case
from benchmarks.checkpoint import disk_directory, file_system, save_checkpoint
from benchmarks.contenders import contenders_of
from benchmarks.machine import describe
from benchmarks.many_ranks import save_as_many
from benchmarks.models import Shapes, gpt_of, small_tensors, state_bytes
from benchmarks.ranks import RankFailed, RankPool
from benchmarks.record import Record
from benchmarks.run import Figures, run_case, summarize
from benchmarks.stores import Store, StoreKind, object_store, warm_page_cache
from benchmarks.table import markdown, show, summary_table, tables, tables_of_store
from benchmarks.task import OwnFormat

_MODEL_SHARE = 1.5  # a checkpoint holds the weights too: half as much as two moments

_EXAMPLES = """\
examples:
  python -m benchmarks.load --quick                              a first look at every store
  python -m benchmarks.load --store warm --cases 4-4,1-4         two of the cases with a warm page cache, full size
  python -m benchmarks.load --store throttled --throttled-megabytes 1000 --ours    large, without the others
  python -m benchmarks.load --rounds 9 --json load.json          all samples and figures in a file
  python -m benchmarks.load --readme                             all, into benchmarks/results/, the table of benchmarks/README.md and the plot
  python -m benchmarks.load --of warm.json --of cold.json --readme    the same of runs that are over, a store each
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Optimizer state to load, in 10**6 bytes."""

    files: int
    throttled: int  # the line has 400 of them a second
    small: int  # the case of many small tensors, everywhere

    def shapes(self, case: Case, kind: StoreKind) -> Shapes:
        """Of the parameters of a case's model."""
        if case.model == "small":
            return small_tensors(self.small)
        return gpt_of(self.throttled if kind is StoreKind.THROTTLED else self.files)


_FULL, _QUICK = Sizes(400, 200, 80), Sizes(60, 40, 10)
_QUICK_CASES = ("4-4", "rows-columns-4", "hsdp-2x2")
_ROUNDS, _QUICK_ROUNDS = 5, 2
_HERE = Path(__file__).parent
_BEGIN, _END = "<!-- results -->\n", "<!-- end of results -->\n"  # in README.md


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    cases: Sequence[Case]
    stores: Sequence[StoreKind]
    rounds: int
    ours_alone: bool
    sizes: Sizes
    directory: str | None
    json: Path | None
    plot: Path | None
    markdown: bool
    readme: bool
    earlier: Sequence[Path]  # JSON files; where there are any nothing is measured


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = [kind.value for kind in StoreKind]
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"small checkpoints, {_QUICK_ROUNDS} rounds, cases {','.join(_QUICK_CASES)}",
    )
    parser.add_argument("--store", choices=kinds, action="append", help="again for another one (default: all)")
    parser.add_argument("--rounds", type=int, help=f"counted rounds, one more goes before (default: {_ROUNDS})")
    parser.add_argument(
        "--ours", action="store_true", help="the floor and Shardferry alone: at sizes where the others take hours"
    )
    parser.add_argument("--megabytes", type=int, help=f"state in files, in 10**6 bytes (default: {_FULL.files})")
    parser.add_argument(
        "--throttled-megabytes", type=int, help=f"state in the object store (default: {_FULL.throttled})"
    )
    parser.add_argument("--cases", help=f"some of {','.join(case.name for case in CASES)} (default: all)")
    parser.add_argument(
        "--directory", help="where checkpoints are written, on a disk (default: the temporary directory)"
    )
    parser.add_argument("--json", type=Path, help="write machine, samples, figures and limits to this file")
    parser.add_argument("--plot", type=Path, help="draw times and bytes into this file (.svg); needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write the tables of each store into benchmarks/results/, the summary into benchmarks/README.md, and the plot",
    )
    parser.add_argument(
        "--of",
        type=Path,
        action="append",
        metavar="FILE",
        help="measure nothing: show what an earlier run wrote with --json; again for another run",
    )
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Exits with status 2 where the arguments are wrong."""
    parser = _parser()
    given = parser.parse_args(arguments)
    measuring = ("quick", "store", "rounds", "ours", "megabytes", "throttled_megabytes", "cases", "directory")
    if given.of and (asked := [name for name in measuring if getattr(given, name) not in (None, False)]):
        parser.error(
            f"--of shows what was measured before, all of it: --{asked[0].replace('_', '-')} has no meaning there"
        )
    by_name = {case.name: case for case in CASES}
    names = given.cases.split(",") if given.cases else list(_QUICK_CASES if given.quick else by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"--cases: no case {unknown[0]!r}; there are {', '.join(by_name)}")
    rounds = given.rounds if given.rounds is not None else _QUICK_ROUNDS if given.quick else _ROUNDS
    if rounds < 1 or any(size is not None and size < 1 for size in (given.megabytes, given.throttled_megabytes)):
        parser.error("--rounds and sizes begin at 1")
    if given.ours and given.readme:
        parser.error("--readme puts in what all contenders have done, --ours leaves most of them out")
    if (given.plot or given.readme) and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot and --readme need matplotlib: pip install --no-deps -r benchmarks/requirements.txt")
    standard = _QUICK if given.quick else _FULL
    sizes = Sizes(given.megabytes or standard.files, given.throttled_megabytes or standard.throttled, standard.small)
    return Options(
        [by_name[name] for name in names],
        [StoreKind(kind) for kind in dict.fromkeys(given.store or StoreKind)],
        rounds,
        given.ours,
        sizes,
        given.directory,
        given.json,
        given.plot or (_HERE / "results.svg" if given.readme else None),
        given.markdown,
        given.readme,
        given.of or [],
    )


def measure(options: Options) -> Record:
    """Write the checkpoints and run the cases.

    Raises:
        ValueError: there is no room on the disk.
        RankFailed: a result is wrong.
    """
    directory = disk_directory(options.directory, needed_bytes(options))
    machine = describe(file_system(directory))
    results: dict[StoreKind, Mapping[Case, Mapping[str, Figures]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="shardferry-bench-", dir=directory) as folder,
        object_store(folder) if StoreKind.THROTTLED in options.stores else nullcontext("") as url,
        RankPool() as pool,
    ):
        for kind in options.stores:
            root = url if kind is StoreKind.THROTTLED else folder
            results[kind] = {case: _measure_case(case, kind, folder, root, options, pool) for case in options.cases}
    sizes = {
        kind: {c.name: state_bytes(options.sizes.shapes(c, kind)) for c in cases} for kind, cases in results.items()
    }
    return Record(machine, options.rounds, results, sizes)


def _measure_case(
    case: Case, kind: StoreKind, folder: str, root: str, options: Options, pool: RankPool
) -> Mapping[str, Figures]:
    shapes = options.sizes.shapes(case, kind)
    name = f"{case.model}-{state_bytes(shapes)}-saved-by-{case.saved_by}"
    store = Store(kind, f"{folder}/{name}", f"{root}/{name}")
    _save_missing(case, store, shapes, pool, ours_alone=options.ours_alone)
    _say(f"{kind.value}, {case.title}: {options.rounds} rounds")
    work = partial(run_case, ours_alone=options.ours_alone)
    return summarize(pool.run(case.ranks, work, case, store, shapes, options.rounds))


def _save_missing(case: Case, store: Store, shapes: Shapes, pool: RankPool, *, ours_alone: bool) -> None:
    """Write the checkpoint, in every format that is read there, and have all of it in the page cache."""
    size = f"{state_bytes(shapes) / 1e6:.0f} MB of AdamW state"
    if not Path(store.directory).exists():
        if case.model == "small":
            _say(f"one process writes {size} as {case.saved_by} ranks would")
            pool.run(1, save_as_many, store.directory, shapes, case.saved_by)
        else:
            _say(f"{case.saved_by} FSDP2 ranks save {size} and the weights")
            pool.run(case.saved_by, save_checkpoint, store.directory, shapes)
    warm_page_cache(store.directory)
    for contender in contenders_of(case, store.kind, ours_alone=ours_alone):
        if not issubclass(contender, OwnFormat):
            continue
        directory = store.sibling(contender.name).directory
        if not Path(directory).exists():
            _say(f"{case.saved_by} FSDP2 ranks save {size} with {contender.name}")
            pool.run(case.saved_by, contender.save, directory, shapes)
        warm_page_cache(directory)


def needed_bytes(options: Options) -> int:
    """Of disk: all checkpoints, in every format."""
    formats: dict[tuple[object, ...], int] = {}
    for kind in options.stores:
        for case in options.cases:
            nbytes = state_bytes(options.sizes.shapes(case, kind))
            formats[case.checkpoint, nbytes, "stock"] = int(_MODEL_SHARE * nbytes)
            for contender in contenders_of(case, kind, ours_alone=options.ours_alone):
                if issubclass(contender, OwnFormat):
                    formats[case.checkpoint, nbytes, contender.name] = nbytes
    return sum(formats.values())


def write_results(record: Record, directory: Path) -> None:
    """Write every table of each store into ``results/<store>.md``, and the summary where the last one was in ``README.md``."""
    facts = "\n".join(f"> {line}  " for line in record.facts().splitlines())
    for kind, cases in record.results.items():
        body = "\n".join(markdown(table) for table in tables_of_store(kind, cases))
        page = directory / "results" / f"{kind.value}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(
            f"# {kind.title}\n\n`scripts/bench --store {kind.value}` ([method](../README.md)):\n\n{facts}\n\n{body}"
        )
    readme = directory / "README.md"
    text = readme.read_text()
    before, after = text.partition(_BEGIN)[0], text.partition(_END)[2]
    readme.write_text(f"{before}{_BEGIN}\n{facts}\n\n{markdown(summary_table(record.results))}\n{_END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where something loaded is not what was saved; 2 where the options can't be followed."""
    options = parse_options(arguments)
    try:
        record = Record.read(options.earlier) if options.earlier else measure(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except RankFailed as error:
        print(error, file=sys.stderr)
        return 1
    found = tables(record.results)
    print(record.facts() + "\n")
    for table in found:
        if options.markdown:
            print(markdown(table))
        else:
            show(table)
    if options.json:
        record.write(options.json)
    if options.readme:
        write_results(record, _HERE)
    if options.plot:
        from benchmarks.plot import draw

        draw(record.results, options.plot)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
