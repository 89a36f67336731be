"""What a run has measured, as plain data: `--json` writes it, and stores that were measured one at a time are put together again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.limits import verdicts
from benchmarks.run import Figures
from benchmarks.stores import StoreKind
from benchmarks.table import Results

_CASES = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Record:
    """All that is told of one run, or of several of the same machine."""

    machine: Mapping[str, str]  # and versions, in words
    rounds: int
    results: Results
    state_bytes: Mapping[StoreKind, Mapping[str, int]]  # of each case, by its name

    @classmethod
    def read(cls, files: Sequence[Path]) -> Record:
        """What earlier runs wrote.

        Raises:
            ValueError: no such file, none of ours, or runs that don't belong side by side.
        """
        records = [_read(file) for file in files]
        first, results, state_bytes = records[0], dict(records[0].results), dict(records[0].state_bytes)
        for file, record in zip(files[1:], records[1:], strict=True):
            if (record.machine, record.rounds) != (first.machine, first.rounds):
                raise ValueError(f"{file}: measured on another machine, with other versions or rounds than {files[0]}")
            if twice := results.keys() & record.results.keys():
                raise ValueError(
                    f"{file}: has the store {min(kind.value for kind in twice)}, which another file has too"
                )
            results |= record.results
            state_bytes |= record.state_bytes
        return cls(first.machine, first.rounds, results, state_bytes)

    def write(self, file: Path) -> None:
        """All of it, with the limits and with who was left out, as JSON."""
        stores = {
            kind.value: {
                case.name: {
                    "state_bytes": self.state_bytes[kind][case.name],
                    "contenders": {name: asdict(found) for name, found in figures.items()},
                    "left_out": {c.name: why for c in CONTENDERS if (why := c.why_not(case, kind))},
                    "limits": [asdict(verdict) for verdict in verdicts(kind, figures)],
                }
                for case, figures in cases.items()
            }
            for kind, cases in self.results.items()
        }
        told = {"machine": dict(self.machine), "rounds": self.rounds, "stores": stores}
        file.write_text(json.dumps(told, indent=2) + os.linesep)

    def facts(self) -> str:
        """Machine, versions and data, in a few lines."""
        sizes = {
            f"{self.state_bytes[kind][case.name] / 1e6:.0f} MB of {case.model} state ({kind.value})": None
            for kind, cases in self.results.items()
            for case in cases
        }
        return "\n".join(
            [
                ", ".join(f"{what} {value}" for what, value in self.machine.items()),
                f"{', '.join(sizes)}; medians of {self.rounds} interleaved rounds; every load compared bit for bit",
            ]
        )


def _read(file: Path) -> Record:
    try:
        told: dict[str, Any] = json.loads(file.read_text())
        stores = {StoreKind(name): cases for name, cases in told["stores"].items()}
        results = {
            kind: {
                _CASES[name]: {contender: Figures(**found) for contender, found in case["contenders"].items()}
                for name, case in cases.items()
            }
            for kind, cases in stores.items()
        }
        sizes = {kind: {name: case["state_bytes"] for name, case in cases.items()} for kind, cases in stores.items()}
        return Record(told["machine"], told["rounds"], results, sizes)
    except OSError as error:
        raise ValueError(f"{file}: can't be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not what --json writes ({type(error).__name__}: {error})") from error
