"""What the halves count, as vLLM's log and `/metrics` show it."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from p2pkv.engines.vllm.tally import Count, Duration, Tally, TallyData

_HELP = {
    Count.LOOKUPS: "Lookups in the node.",
    Count.HIT_TOKENS: "Tokens found in the node and ordered to be loaded.",
    Count.MISSED_DEADLINES: "Lookups that took too long and were taken for misses.",
    Count.BYPASSES: "Requests whose identity can't be expressed.",
    Count.LOADED_TOKENS: "Tokens loaded, by all workers.",
    Count.LOAD_ERRORS: "Loads that failed, wholly or in part, and were computed.",
    Count.STORED_TOKENS: "Tokens given to the node, by all workers.",
    Count.DROPPED_STORES: "Stores that were given up: the node was slow, full or gone, or the request was preempted.",
}
_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class P2PKVStats(KVConnectorStats):  # type: ignore[misc]
    """`TallyData` of one or more workers."""

    def reset(self) -> None:
        """Forget everything."""
        self.data = TallyData(counts={}, seconds={})

    def aggregate(self, other: "P2PKVStats") -> "P2PKVStats":
        """Add another's counts to these."""
        counts, seconds = self.data.setdefault("counts", {}), self.data.setdefault("seconds", {})
        for name, number in other.data.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + number
        for name, durations in other.data.get("seconds", {}).items():
            seconds[name] = [*seconds.get(name, ()), *durations]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counts, and the mean of each duration in milliseconds, for vLLM's log."""
        reduced: dict[str, int | float] = dict(self.data.get("counts", {}))
        for name, durations in self.data.get("seconds", {}).items():
            reduced[f"{name}_ms_mean"] = round(1000 * sum(durations) / len(durations), 3)
        return reduced

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data.get("counts") and not self.data.get("seconds")


def take_stats(tally: Tally) -> P2PKVStats | None:
    """What was counted since the last time; None when nothing was."""
    data = tally.take()
    return None if data is None else P2PKVStats(data=data)


class P2PKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Prometheus metrics of each engine that the API server has."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counters = {
            count: self._counter_cls(name=f"vllm:p2pkv_{count}", documentation=_HELP[count], labelnames=labelnames)
            for count in Count
        }
        histograms = {
            duration: self._histogram_cls(
                name=f"vllm:p2pkv_{duration}_seconds",
                documentation=f"How long each {duration} took, without its wait for its turn.",
                buckets=_BUCKETS_S,
                labelnames=labelnames,
            )
            for duration in Duration
        }
        self._of_engine = {
            engine: (
                {count: metric.labels(*values) for count, metric in counters.items()},
                {duration: metric.labels(*values) for duration, metric in histograms.items()},
            )
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine has counted since the last time."""
        counters, histograms = self._of_engine[engine_idx]
        for count, number in transfer_stats_data.get("counts", {}).items():
            counters[Count(count)].inc(number)
        for duration, seconds in transfer_stats_data.get("seconds", {}).items():
            for each in seconds:
                histograms[Duration(duration)].observe(each)
