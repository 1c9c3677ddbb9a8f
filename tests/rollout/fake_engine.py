"""A tiny language model with the life of an inference engine: pausing, aborting, weights that change under requests.

For servers of the tests in their own process; imports nothing but the standard library.
"""

import itertools
import math
import random
import threading
import time
from dataclasses import dataclass, field
from functools import lru_cache

VOCAB, END = 512, 2
TOKEN_S = 0.001


@lru_cache(maxsize=4096)
def logits(weights: str, last: int) -> tuple[float, ...]:
    draw = random.Random(f"{weights}/{last}")
    return tuple(draw.gauss(0, 1.5) for _ in range(VOCAB))


def log_softmax(values: tuple[float, ...], temperature: float) -> list[float]:
    scaled = [value / temperature for value in values]
    top = max(scaled)
    total = top + math.log(sum(math.exp(value - top) for value in scaled))
    return [value - total for value in scaled]


def prompt_logprobs(weights: str, ids: list[int]) -> list[float]:
    return [log_softmax(logits(weights, a), 1.0)[b] for a, b in itertools.pairwise(ids)]


@dataclass
class Output:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict] = field(default_factory=list)
    finish: str = "length"
    stop_token: int | None = None

    def add(self, token: int, logprob: float, version: str) -> None:
        if not self.spans or self.spans[-1]["version"] != version:
            self.spans.append({"version": version, "start": len(self.token_ids), "end": 0})
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.spans[-1]["end"] = len(self.token_ids)


class Engine:
    def __init__(self, weights: str, kind: str):
        self.weights = self.version = weights
        self.kind = kind
        self.changed = threading.Condition()
        self.is_frozen = False
        self.running: set[str] = set()
        self.aborted: set[str] = set()

    def run(self, name: str, prompt: list[int], sampling: dict) -> Output:
        """`sampling`: max_tokens, temperature, seed, stop_token_ids, ignore_eos."""
        output, draw = Output(), random.Random(sampling["seed"])
        stops = set(sampling["stop_token_ids"]) | (set() if sampling["ignore_eos"] else {END})
        with self.changed:
            if name in self.running:
                raise ValueError(f"Duplicate request ID detected: {name}")
            self.running.add(name)
        try:
            while len(output.token_ids) < sampling["max_tokens"]:
                with self.changed:
                    self.changed.wait_for(lambda: not self.is_frozen or name in self.aborted)
                    if name in self.aborted:
                        output.finish = "abort"
                        return output
                    weights, version = self.weights, self.version
                self._step(output, (prompt + output.token_ids)[-1], weights, version, sampling["temperature"], draw)
                if output.token_ids[-1] in stops:
                    output.finish, output.stop_token = "stop", output.token_ids[-1]
                    return output
                time.sleep(TOKEN_S)
            return output
        finally:
            with self.changed:
                self.running.discard(name)
                self.aborted.discard(name)
                self.changed.notify_all()

    def _step(self, output: Output, last: int, weights: str, version: str, temperature: float, draw) -> None:
        values = logits(weights, last)
        raw = log_softmax(values, 1.0)
        if temperature == 0:
            token = max(range(VOCAB), key=raw.__getitem__)
            output.add(token, raw[token], version)
            return
        processed = log_softmax(values, temperature)
        (token,) = draw.choices(range(VOCAB), [math.exp(value) for value in processed])
        output.add(token, (processed if self.kind == "processed" else raw)[token], version)

    def freeze(self, is_frozen: bool) -> None:
        with self.changed:
            self.is_frozen = is_frozen
            self.changed.notify_all()

    def abort(self, prefix: str) -> int:
        """Ends all whose name begins with `prefix` and waits until they have ended."""
        with self.changed:
            chosen = {name for name in self.running if name.startswith(prefix)}
            self.aborted |= chosen
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.running & chosen, timeout=10)
            return len(chosen)

    def drain(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.running)
