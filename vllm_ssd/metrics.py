"""SSD's metrics on the server's ``/metrics``, and a line in its log, beside vLLM's own.

A stat logger of vLLM (entry point ``vllm.stat_logger_plugins``), made in the process of each API
server. One of them takes what the worker has written (:mod:`vllm_ssd.stats_file`) and adds the
difference to ``prometheus_client``'s metrics, so vLLM's own way of gathering them serves one API
server and several alike. Names and labels are as vLLM's.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY
from vllm_ssd.stats_file import Reader, Snapshot

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vllm_ssd")

SECONDS = 0.5
"""From one reading to the next at least."""

COUNTERS = {
    "ssd_look_ups": ("look_ups", "Look-ups that could use a draft, one a request."),
    "ssd_hits": ("hits", "Look-ups that found drafted tokens, or the text's end."),
    "ssd_rounds": ("proposals", "Proposals, each for a whole batch."),
    "ssd_rounds_off": ("rounds_off", "Rounds without speculation, since plain decoding is faster."),
    "ssd_waits": ("waits", "Proposals that waited for the draft."),
    "ssd_waits_in_vain": ("waits_in_vain", "Waits that ended without another token."),
    "ssd_resyncs": ("resyncs", "Epochs given up: all requests were announced again."),
    "ssd_draft_restarts": ("restarts", "Draft processes started again."),
    "ssd_errors": ("errors", "Errors in the plugin."),
    "ssd_filled_tokens": (
        "tokens_filled",
        "Tokens that only filled proposals up to K (V2 runner), counted as no draft's.",
    ),
    "ssd_texts_lost": (
        "texts_lost",
        "Requests not drafted for any more (V2 runner): an error cost a piece of their text.",
    ),
    "ssd_draft_steps": ("draft_steps", "Decode steps of the draft."),
    "ssd_draft_rows": ("draft_rows", "Rows that these decoded."),
    "ssd_draft_forks": ("draft_forks", "Forks that the draft has made."),
    "ssd_draft_evictions": ("draft_evictions", "Requests that the draft had no room for."),
}
"""By name: the counter in ``get_stats``, and what it counts."""
GAUGES = {
    "ssd_draft_up": ("draft_up", "1 while the draft is up."),
    "ssd_draft_rows_used": ("draft_rows_used", "Rows of the draft's batch that are taken."),
    "ssd_draft_kv_cache_usage_perc": (
        "draft_kv_cache_usage_perc",
        "Of the draft's KV cache; 1: all of it.",
    ),
}
"""The same for what goes up and down."""
MISSES = ("no_branch", "not_ready", "resync", "draft_down", "cannot_draft")
"""Why a look-up found nothing; counted as ``misses_...``. The last one is of requests that are not
looked up at all: the draft cannot follow them (V2 runner)."""
SOURCES = ("branch", "just_in_time", "ngram")
"""Where drafted tokens come from: found at once, waited for, from the text."""
_TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
TIMES = {
    "verify_seconds": ("ssd_verification_time_seconds", "From one proposal to the next outcome."),
    "wait_seconds": ("ssd_wait_time_seconds", "How long a proposal waited for the draft."),
    "draft_step_seconds": ("ssd_draft_step_time_seconds", "A decode step of the draft."),
}
"""By what is measured: the histogram's name, and what it shows."""
DEPTH = "ssd_depth_at_hit"


class SSDStatLogger(StatLoggerBase):
    """vLLM's interface; does nothing for engines without SSD.

    A thread of its own reads: vLLM calls :meth:`record` only for answers of this API server, on its
    event loop, and an error there would end the server.

    Args:
        vllm_config: the engine's.
        engine_index: which of several engines.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._reader: Reader | None = None
        self._labels = {
            "model_name": vllm_config.model_config.served_model_name,
            "engine": str(engine_index),
        }
        self._newest: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._depth = 0
        speculative, options = vllm_config.speculative_config, vllm_config.additional_config
        if speculative is None or not isinstance(options, Mapping):
            return
        if ADDITIONAL_CONFIG_KEY not in options:
            return
        self._depth = speculative.num_speculative_tokens
        try:
            self._reader = Reader()
        except FileExistsError:
            logger.debug("ssd: another API server tells the metrics")
        except OSError as error:
            logger.warning("ssd: no metrics: %s", error)

    def log_engine_initialized(self) -> None:
        """vLLM's own metrics are registered now, those of engines before it dropped: add ours."""
        if self._reader is not None:
            metrics = _Metrics(self._labels, self._depth)
            threading.Thread(
                target=_follow,
                args=(weakref.ref(self), self._reader, metrics),
                name="vllm-ssd-metrics",
                daemon=True,
            ).start()

    def take(self, counters: dict[str, float]) -> None:
        """Keep the newest counters for the log."""
        self._newest = counters

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing: see above."""

    def log(self) -> None:
        """One line, at vLLM's interval."""
        now, before = self._newest, self._logged
        self._logged = now

        def new(name: str) -> float:
            return now.get(name, 0.0) - before.get(name, 0.0)

        if not new("proposals"):
            return
        logger.info(
            "SSD metrics: Hit rate: %.1f%%, Mean acceptance length: %.2f, Look-ups: %d, "
            "Mean verification time: %.1f ms, Waits: %d, Mean wait: %.1f ms, "
            "Rounds without speculation: %.1f%%, Draft: %s",
            100 * new("hits") / max(1.0, new("look_ups")),
            1 + new("tokens_accepted") / max(1.0, new("verifications")),
            new("look_ups"),
            1e3 * new("verify_seconds") / max(1.0, new("verify_intervals")),
            new("waits"),
            1e3 * new("wait_seconds") / max(1.0, new("waits")),
            100 * new("rounds_off") / new("proposals"),
            "up" if now.get("draft_up") else "down",
        )


def _follow(owner: weakref.ref[SSDStatLogger], reader: Reader, metrics: _Metrics) -> None:
    """Bring the metrics up to date while the stat logger lives."""
    try:
        while (stat_logger := owner()) is not None:
            snapshot = reader.read()
            if snapshot is not None:
                metrics.update(snapshot)
                stat_logger.take(snapshot.counters)
            del stat_logger
            time.sleep(SECONDS)
    except Exception:
        logger.exception("ssd: no metrics any more")


class _Metrics:
    """The metrics of one engine."""

    def __init__(self, labels: dict[str, str], depth: int) -> None:
        self._seen: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._depths = [0] * (depth + 1)
        names = list(labels)
        self._counters: dict[str, Counter] = {
            counter: Counter(f"vllm:{name}", text, names).labels(**labels)
            for name, (counter, text) in COUNTERS.items()
        }
        misses = Counter("vllm:ssd_misses", "Look-ups that found nothing.", [*names, "reason"])
        for reason in MISSES:
            self._counters[f"misses_{reason}"] = misses.labels(**labels, reason=reason)
        text = "Verified tokens by where they came from."
        drafted = Counter("vllm:ssd_draft_tokens", text, [*names, "source"])
        accepted = Counter("vllm:ssd_accepted_tokens", f"Accepted. {text}", [*names, "source"])
        for source in SOURCES:
            self._counters[f"drafted_{source}"] = drafted.labels(**labels, source=source)
            self._counters[f"accepted_{source}"] = accepted.labels(**labels, source=source)
        self._gauges = {
            gauge: Gauge(f"vllm:{name}", text, names, multiprocess_mode="mostrecent").labels(
                **labels
            )
            for name, (gauge, text) in GAUGES.items()
        }
        self._times = {
            kind: Histogram(f"vllm:{name}", text, names, buckets=_TIMES).labels(**labels)
            for kind, (name, text) in TIMES.items()
        }
        buckets = tuple(map(float, range(depth + 1)))
        text = "Drafted tokens found at a hit."
        self._depth = Histogram(f"vllm:{DEPTH}", text, names, buckets=buckets).labels(**labels)

    def update(self, snapshot: Snapshot) -> None:
        """Add what is new."""
        counters = {**snapshot.counters, **by_source(snapshot.counters)}
        for name, metric in self._counters.items():
            value, seen = counters.get(name, 0.0), self._seen.get(name, 0.0)
            if value > seen:
                metric.inc(value - seen)
                self._seen[name] = value
        for name, gauge in self._gauges.items():
            gauge.set(counters.get(name, 0.0))
        for kind, histogram in self._times.items():
            count, values = snapshot.counts.get(kind, 0), snapshot.recent.get(kind, [])
            new = min(count - self._counts.get(kind, 0), len(values))
            for value in values[len(values) - new :]:
                histogram.observe(value)
            self._counts[kind] = count
        for depth, (hits, seen) in enumerate(zip(snapshot.depths, self._depths, strict=False)):
            for _ in range(hits - seen):
                self._depth.observe(depth)
            self._depths[depth] = hits


def by_source(counters: dict[str, float]) -> dict[str, float]:
    """Drafted and accepted tokens by where they came from."""
    result: dict[str, float] = {}
    for ours, all_of, waited, text in (
        ("drafted", "tokens_drafted", "waited_tokens", "ngram_tokens"),
        ("accepted", "tokens_accepted", "waited_accepted", "ngram_accepted"),
    ):
        just_in_time, ngram = counters.get(waited, 0.0), counters.get(text, 0.0)
        result[f"{ours}_just_in_time"], result[f"{ours}_ngram"] = just_in_time, ngram
        result[f"{ours}_branch"] = counters.get(all_of, 0.0) - just_in_time - ngram
    return result
