"""Measure loading: Shardferry, stock ``dcp.load``, stock ``load_sharded_optimizer_state_dict``, and the floor.

A checkpoint of a GPT's AdamW state is written once by real FSDP2 ranks with stock ``dcp.save``; then every case runs on
live ranks, contenders interleaved. Each loaded element is compared with what was saved. Speed never fails a run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case
from benchmarks.checkpoint import disk_directory, file_system, save_checkpoint, warm_page_cache
from benchmarks.gpt import GptSize, gpt_of
from benchmarks.limits import verdicts
from benchmarks.machine import describe
from benchmarks.ranks import RankFailed, RankPool
from benchmarks.run import Figures, run_case, summarize
from benchmarks.table import Results, markdown, show, tables

_DEFAULT_MEGABYTES = 1500
_QUICK_MEGABYTES = 200
_MODEL_SHARE = 1.5  # a checkpoint holds the weights too: half as much as two moments

_EXAMPLES = """\
examples:
  python -m benchmarks.load --quick                             a first look, 200 MB
  python -m benchmarks.load --cases 4-4,rows-columns-2          two of the cases, full size
  python -m benchmarks.load --rounds 9 --json load.json         all samples and figures in a file
  python -m benchmarks.load --markdown > table.md               a table to paste
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    cases: Sequence[Case]
    rounds: int
    megabytes: int
    directory: str | None
    json: Path | None
    markdown: bool


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Exits with status 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_MEGABYTES} MB of state instead of {_DEFAULT_MEGABYTES}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, one more goes before (default: 5)")
    parser.add_argument("--megabytes", type=int, help="optimizer state to load, in 10**6 bytes")
    parser.add_argument("--cases", help=f"some of {','.join(case.name for case in CASES)} (default: all)")
    parser.add_argument(
        "--directory", help="where checkpoints are written, on a disk (default: the temporary directory)"
    )
    parser.add_argument("--json", type=Path, help="write machine, figures and limits to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    given = parser.parse_args(arguments)
    by_name = {case.name: case for case in CASES}
    names = given.cases.split(",") if given.cases else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"--cases: no case {unknown[0]!r}; there are {', '.join(by_name)}")
    if given.rounds < 1 or (given.megabytes is not None and given.megabytes < 1):
        parser.error("--rounds and --megabytes begin at 1")
    megabytes = given.megabytes or (_QUICK_MEGABYTES if given.quick else _DEFAULT_MEGABYTES)
    return Options(
        [by_name[name] for name in names], given.rounds, megabytes, given.directory, given.json, given.markdown
    )


def measure(options: Options, size: GptSize, directory: str) -> Results:
    """Write the checkpoints and run the cases. Raises RankFailed where a result is wrong."""
    shapes = size.shapes()
    results: dict[Case, Mapping[str, Figures]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="shardferry-bench-", dir=directory) as folder,
        RankPool(max(max(case.ranks, case.saved_by) for case in options.cases)) as pool,
    ):
        paths = {ranks: str(Path(folder, f"saved-by-{ranks}")) for ranks in {case.saved_by for case in options.cases}}
        for ranks, path in paths.items():
            _say(f"{ranks} FSDP2 ranks save {size.state_bytes / 1e6:.0f} MB of AdamW state and the weights")
            pool.run(ranks, save_checkpoint, path, size)
        for case in options.cases:
            _say(f"{case.title}: {options.rounds} rounds")
            path = paths[case.saved_by]
            warm_page_cache(path)
            results[case] = summarize(case, pool.run(case.ranks, run_case, case, path, shapes, options.rounds))
    return results


def report(options: Options, size: GptSize, machine: Mapping[str, str], results: Results) -> dict[str, Any]:
    """All of a run as plain data, for ``--json``."""
    return {
        "machine": dict(machine),
        "model": {**asdict(size), "num_parameters": len(size.shapes()), "state_bytes": size.state_bytes},
        "rounds": options.rounds,
        "cases": {
            case.name: {
                "contenders": {name: asdict(found) for name, found in figures.items()},
                "limits": [asdict(verdict) for verdict in verdicts(figures)],
            }
            for case, figures in results.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 where something loaded is not what was saved."""
    options = parse_options(arguments)
    size = gpt_of(options.megabytes)
    try:
        needed = len({case.saved_by for case in options.cases}) * int(_MODEL_SHARE * size.state_bytes)
        directory = disk_directory(options.directory, needed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    machine = describe(file_system(directory))
    try:
        results = measure(options, size, directory)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return 1
    facts = ", ".join(f"{what} {value}" for what, value in machine.items())
    state = f"{size.state_bytes / 1e6:.0f} MB of AdamW state in {2 * len(size.shapes())} tensors"
    print(f"{facts}\n{state}; medians of {options.rounds} interleaved rounds; every load compared bit for bit\n")
    for table in tables(results):
        if options.markdown:
            print(markdown(table))
        else:
            show(table)
    if options.json:
        options.json.write_text(json.dumps(report(options, size, machine, results), indent=2) + os.linesep)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
