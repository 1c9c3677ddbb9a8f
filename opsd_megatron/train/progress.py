"""What a person sees while a run goes on: a Rich progress line on a terminal, one plain line per step elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {  # metric -> (short name, format); what is absent is left out
    "loss": ("loss", ".4f"),
    "loss/reverse_kl_nats": ("KL", ".4f"),
    "optimizer/grad_norm": ("|g|", ".2e"),
    "rollout/tokens_per_s": ("tok/s", ".0f"),
    "rollout/response_tokens_mean": ("len", ".1f"),
    "mismatch/logprob_abs_mean_nats": ("|train-rollout|", ".1e"),
    "time/step_s": ("s/step", ".2f"),
}


def summary(values: Mapping[str, float]) -> str:
    """The metrics worth a glance, and every accuracy probe."""
    parts = [f"{short} {values[name]:{form}}" for name, (short, form) in SHOWN.items() if name in values]
    probes = [f"EM@{name.rsplit('/', 1)[1]} {value:.2f}" for name, value in values.items() if name.startswith("probe/")]
    return "  ".join(parts + probes)


PLAIN_EVERY_S = 30.0
"""Between two lines about the rollouts of a step, where there is no terminal."""


class ProgressLine:
    """Steps done, what they measured, time left."""

    def __init__(self, total_steps: int, done_steps: int, wanted: bool):
        self._total, self._started, self._first = total_steps, time.monotonic(), done_steps
        self._shown = self._started
        self._bar: Progress | None = None
        if wanted and sys.stderr.isatty():
            columns = [
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            ]
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_steps, completed=done_steps)
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=summary(values))
            return
        self._shown = time.monotonic()
        per_step = (time.monotonic() - self._started) / max(step - self._first, 1)
        left_s = per_step * (self._total - step)
        print(f"step {step}/{self._total}  {summary(values)}  ETA {left_s / 60:.1f} min", file=sys.stderr, flush=True)

    def show_rollouts(self, line: str) -> None:
        """While a step's rollouts run: in place on a terminal, elsewhere a line now and then. From any thread."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=line)
        elif now - self._shown >= PLAIN_EVERY_S:
            self._shown = now
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
