"""Counters and gauges of the server as Prometheus text."""

from collections.abc import Callable

HELP = {
    "requests_total": ("counter", "Finished requests by outcome."),
    "samples_total": ("counter", "Finished samples by finish reason."),
    "prompt_tokens_total": ("counter", "Prompt tokens of finished requests."),
    "generation_tokens_total": ("counter", "Generated tokens."),
    "request_seconds_total": ("counter", "Seconds from arrival to reply, summed over finished requests."),
    "weight_updates_total": ("counter", "Weight updates by outcome."),
    "weight_update_seconds_total": ("counter", "Seconds in which nothing was generated because weights were swapped."),
    "requests_running": ("gauge", "Requests inside the engine."),
    "is_paused": ("gauge", "1 while paused."),
}


class Metrics:
    """Sums by name and labels, and gauges that are read when asked for."""

    def __init__(self):
        self._sums: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        if HELP[name][0] != "counter":
            raise KeyError(f"{name} is no counter")
        key = name, ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
        self._sums[key] = self._sums.get(key, 0.0) + amount

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        self._gauges[name] = read

    def text(self) -> str:
        lines: list[str] = []
        for name, (kind, meaning) in HELP.items():
            lines += [f"# HELP opsd_{name} {meaning}", f"# TYPE opsd_{name} {kind}"]
            if name in self._gauges:
                lines.append(f"opsd_{name} {float(self._gauges[name]())}")
            rows = [(labels, value) for (known, labels), value in sorted(self._sums.items()) if known == name]
            lines += [
                f"opsd_{name}{{{labels}}} {value}" if labels else f"opsd_{name} {value}" for labels, value in rows
            ]
        return "\n".join(lines) + "\n"
