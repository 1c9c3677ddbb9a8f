"""Counters and gauges of the server as Prometheus text."""

from collections.abc import Callable, Mapping

HELP = {
    "requests_total": ("counter", "Finished requests by outcome."),
    "samples_total": ("counter", "Finished samples by finish reason."),
    "admission_rejections_total": ("counter", "Requests refused with 503 because too much waited already."),
    "prompt_tokens_total": ("counter", "Prompt tokens of finished requests."),
    "prefill_tokens_total": (
        "counter",
        "Prompt tokens that went through the model, those of restarted requests again.",
    ),
    "generation_tokens_total": ("counter", "Generated tokens."),
    "request_seconds_total": ("counter", "Seconds from arrival to reply, summed over finished requests."),
    "weight_updates_total": ("counter", "Weight updates by outcome."),
    "weight_update_seconds_total": ("counter", "Seconds in which nothing was generated because weights were swapped."),
    "last_weight_update_seconds": ("gauge", "The same for the last update alone."),
    "prefix_cache_queries_total": ("counter", "Prompt tokens that were looked for in the prefix cache."),
    "prefix_cache_hits_total": ("counter", "Prompt tokens that were found in the prefix cache."),
    "cache_usage_ratio": ("gauge", "Share of the key-value cache that requests hold; 1 is full."),
    "cache_evictions_total": ("counter", "Cache blocks that were kept for later requests and dropped."),
    "preemptions_total": ("counter", "Times that a request lost its cache to others and had to compute it again."),
    "requests_running": ("gauge", "Requests that the engine works on."),
    "requests_waiting": ("gauge", "Requests that wait for the engine."),
    "is_paused": ("gauge", "1 while paused."),
    "is_sleeping": ("gauge", "1 while asleep."),
}


class Metrics:
    """Sums by name and labels, and values that are read when asked for."""

    def __init__(self, read: Callable[[], Mapping[str, float]]):
        """`read` gives the values that are not added up here."""
        self._sums: dict[tuple[str, str], float] = {}
        self._read = read

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        if HELP[name][0] != "counter":
            raise KeyError(f"{name} is no counter")
        key = name, ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        self._sums[key] = self._sums.get(key, 0.0) + amount

    def text(self) -> str:
        now = self._read()
        lines: list[str] = []
        for name, (kind, meaning) in HELP.items():
            lines += [f"# HELP opsd_{name} {meaning}", f"# TYPE opsd_{name} {kind}"]
            if name in now:
                lines.append(f"opsd_{name} {float(now[name])}")
            rows = [(labels, value) for (known, labels), value in sorted(self._sums.items()) if known == name]
            lines += [
                f"opsd_{name}{{{labels}}} {value}" if labels else f"opsd_{name} {value}" for labels, value in rows
            ]
        return "\n".join(lines) + "\n"
