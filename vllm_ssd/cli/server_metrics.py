"""The metrics of a draft server, at a port of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from vllm_ssd.draft.server import DraftServer

GAUGES = {
    "targets": "Targets that it drafts for.",
    "draft_rows_in_all": "Rows of its batch.",
    "draft_rows_used": "Rows that are taken.",
    "draft_kv_cache_usage_perc": "Of its KV cache; 1: all of it.",
}
COUNTERS = {
    "targets_joined": "Targets that have joined.",
    "targets_refused": "Targets that were refused.",
    "draft_steps": "Decode steps.",
    "draft_step_seconds": "Seconds of these.",
    "draft_step_rows": "Rows that these decoded.",
    "draft_prefill_tokens": "Prompt tokens computed.",
}


class ServerMetrics(Collector):
    """Reads a server's figures whenever it is asked.

    Args:
        server: the draft server.
    """

    def __init__(self, server: DraftServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """All metrics; called by the HTTP server's thread."""
        figures = self._server.figures()
        labels = {"model_name": self._server.model_name}
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:ssd_server_{name}", text, labels=list(labels))
            gauge.add_metric(list(labels.values()), figures.get(name, 0.0))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:ssd_server_{name}", text, labels=list(labels))
            counter.add_metric(list(labels.values()), figures.get(name, 0.0))
            yield counter


def serve_metrics(server: DraftServer, host: str, port: int) -> None:
    """Serve ``/metrics`` over HTTP from a thread.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(ServerMetrics(server))
    start_http_server(port, addr=host, registry=registry)
