"""What a loader tells Ray's metrics while it loads. Grafana shows it with ``deploy/grafana.json``.

Names begin with ``shardferry_``; each has the tags ``stage``, ``rank`` and ``node``. Ray exports them on every node's metrics port.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

from ray.util.metrics import Counter, Gauge

from shardferry.stats import Counters

_TAGS = ("stage", "rank", "node")
_EVERY_S = 1.0


class Who(TypedDict):
    """The tags of a rank's metrics."""

    stage: str
    rank: int
    node: str


def tell_kept(nbytes: int, *, stage: str, rank: int, node: str) -> None:
    """Tell how many bytes a loader keeps in memory; they end with it."""
    gauge = Gauge("shardferry_kept_bytes", "Bytes of state that is kept in memory", _TAGS)
    gauge.set(nbytes, {"stage": stage, "rank": str(rank), "node": node})


class LoadMetrics:
    """One rank's metrics.

    Args:
        counters: of the load; they grow meanwhile.
    """

    def __init__(self, counters: Counters, *, stage: str, rank: int, node: str) -> None:
        tags = {"stage": stage, "rank": str(rank), "node": node}
        self._counters = counters
        self._told = {"bytes": 0, "requests": 0, "retries": 0}
        self._phase = ""  # that was told last
        self._bytes = Counter("shardferry_bytes_read", "Bytes asked of the storage", _TAGS)
        self._requests = Counter("shardferry_requests", "Requests to the storage", _TAGS)
        self._retries = Counter("shardferry_retries", "Requests that were tried again", _TAGS)
        self._phases = Gauge("shardferry_phase", "1 for the phase of the load that the rank is in", (*_TAGS, "phase"))
        self._wanted = Gauge("shardferry_bytes_wanted", "Bytes that the rank needs", _TAGS)
        self._done = Gauge("shardferry_bytes_done", "Wanted bytes that have arrived", _TAGS)
        self._rate = Gauge("shardferry_bytes_per_second", "Wanted bytes that arrive in a second", _TAGS)
        self._ready = Gauge("shardferry_ready_seconds", "Seconds from the start of the load until it was done", _TAGS)
        for metric in (
            self._bytes,
            self._requests,
            self._retries,
            self._phases,
            self._wanted,
            self._done,
            self._rate,
            self._ready,
        ):
            metric.set_default_tags(tags)

    def want(self, nbytes: int) -> None:
        """Tell how many bytes the rank needs."""
        self._wanted.set(nbytes)

    def ready(self, seconds: float) -> None:
        """Tell how long the load has taken."""
        self._ready.set(seconds)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell what the counters have, once a second and at the end."""
        ended = threading.Event()
        thread = threading.Thread(target=self._tell_until, args=(ended,), daemon=True, name="shardferry-metrics")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _tell_until(self, ended: threading.Event) -> None:
        before = 0
        while True:
            is_last = ended.wait(_EVERY_S)
            done = self._counters.bytes_done
            self._done.set(done)
            self._rate.set(0.0 if is_last else (done - before) / _EVERY_S)
            self._add("bytes", self._bytes, self._counters.bytes_requested)
            self._add("requests", self._requests, self._counters.num_requests)
            self._add("retries", self._retries, self._counters.num_retries)
            self._tell_phase("done" if is_last else self._counters.phase)
            before = done
            if is_last:
                return

    def _tell_phase(self, phase: str) -> None:
        if phase != self._phase:
            if self._phase:
                self._phases.set(0, {"phase": self._phase})
            self._phases.set(1, {"phase": phase})
            self._phase = phase

    def _add(self, name: str, metric: Counter, total: int) -> None:
        """Counters of Ray take what is new, and nothing below 1."""
        if total > self._told[name]:
            metric.inc(total - self._told[name])
            self._told[name] = total
