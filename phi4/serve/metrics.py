"""Metrics of a server in Prometheus format.

A scrape reads `Traffic`'s own counters, so that a page, a test and Prometheus see the same numbers,
and a server has no global state.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from phi4.serve.traffic import Traffic


def registry_of(traffic: Traffic) -> CollectorRegistry:
    """Return the metrics of one server."""
    registry = CollectorRegistry()
    registry.register(_TrafficMetrics(traffic))
    registry.register(traffic.timing.first_token)
    registry.register(traffic.timing.between_tokens)
    return registry


class _TrafficMetrics(Collector):
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics except the histograms."""
        yield from self._counters()
        yield from self._gauges()
        yield InfoMetricFamily(
            "phi4_weights", "The weights in use.", {"name": self._traffic.weights}
        )

    def _counters(self) -> Iterator[Metric]:
        counts = self._traffic.counts
        ended = CounterMetricFamily(
            "phi4_requests",
            "Prompts by outcome; a request for several prompts counts as several.",
            labels=["outcome"],
        )
        for outcome in ("completed", "cancelled", "failed", "refused"):
            ended.add_metric([outcome], getattr(counts, outcome))
        yield ended
        for name, value, what in (
            ("prompt_tokens", counts.prompt_tokens, "Tokens of prompts that were started."),
            ("new_tokens", counts.new_tokens, "Generated tokens."),
            ("reloads", counts.reloads, "Number of weight reloads."),
        ):
            yield CounterMetricFamily(f"phi4_{name}", what, value)

    def _gauges(self) -> Iterator[Metric]:
        load = self._traffic.load
        said = load.sampler
        rate = self._traffic.timing.rate.per_second()
        running = load.under_way if said is None else said.running
        queued = load.waiting + (0 if said is None else said.queued)
        for name, value, what in (
            ("requests_open", self._traffic.num_open, "Prompts that are accepted and unfinished."),
            ("requests_running", running, "Prompts being computed."),
            ("requests_queued", queued, "Prompts waiting for cache space or for weights."),
            ("new_tokens_per_second", rate, "Generated tokens per second, last ten seconds."),
        ):
            yield GaugeMetricFamily(f"phi4_{name}", what, value)
        if said is not None:
            yield GaugeMetricFamily("phi4_cache_blocks", "Blocks in the cache.", said.num_blocks)
            yield GaugeMetricFamily(
                "phi4_cache_blocks_in_use", "Blocks held by requests.", said.blocks_in_use
            )
