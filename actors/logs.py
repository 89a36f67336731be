"""One log line for each phase of each rank, in words or as JSON."""

from __future__ import annotations

import json
import logging
import os

logger = logging.getLogger("shardferry.loader")
FORMAT_VARIABLE = "SHARDFERRY_LOG"  # of the submitting process: json or text; without it, faults alone are logged


def asked_format() -> str | None:
    """How this process wants the lines of its loaders."""
    return os.environ.get(FORMAT_VARIABLE)


def log_phases(stage: str, rank: int, node: str, phases: dict[str, float], nbytes: int) -> None:
    """Log a finished load.

    Args:
        phases: seconds by phase.
        nbytes: that the rank has loaded.
    """
    for phase, seconds in phases.items():
        event = {"stage": stage, "rank": rank, "node": node, "phase": phase, "seconds": round(seconds, 4)}
        if phase == "read":
            event["bytes"] = nbytes
        logger.info("%s", _line(event), extra={"event": event})


def log_fault(stage: str, rank: int, node: str, error: BaseException) -> None:
    """Log what ended a load."""
    event = {"stage": stage, "rank": rank, "node": node, "fault": type(error).__name__, "message": str(error)}
    logger.error("%s", _line(event), extra={"event": event})


def show_logs(form: str | None) -> None:
    """Send the lines to this process's standard error, which Ray keeps as the actor's log and shows to the driver.

    Args:
        form: see `asked_format`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_AsJson() if form == "json" else logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if form is None else logging.INFO)
    logger.propagate = False


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record.__dict__["event"])


def _line(event: dict[str, object]) -> str:
    head = f"shardferry {event['stage']} rank {event['rank']} on {event['node']}"
    if "fault" in event:
        return f"{head}: {event['fault']}: {event['message']}"
    nbytes = f", {event['bytes']} bytes" if "bytes" in event else ""
    return f"{head}: {event['phase']} {event['seconds']} s{nbytes}"
