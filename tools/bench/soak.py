"""Minutes of full load on the embedded server with a weight update every few seconds.

    python -W ignore tools/bench/soak.py --minutes 10

Every update publishes other weights through the HTTP body; some pause with keep, so that requests are carried over. At
the end: errors, growth of the server's resident memory after a warm-up of a fifth of the time, and, for sampled
responses, the largest difference between a token's log-prob and that of a full forward pass of the exact weights whose
version the token is tagged with. Exit code 1 where a bar is missed.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from model import add_model_arguments
from server import model_of, start_server
from transformers import PreTrainedModel

from opsd_megatron.errors import ServerError
from opsd_megatron.rollout.backend import GenerateRequest, Sample
from opsd_megatron.rollout.process import ServerProcess

Settings = argparse.Namespace


@dataclass
class Seen:
    """What the clients met."""

    errors: list[str] = field(default_factory=list)
    checked: list[tuple[list[int], Sample]] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, resident)"""
    update_s: list[float] = field(default_factory=list)
    responses: int = 0
    tokens: int = 0


def weights_of(settings: Settings, version: int) -> PreTrainedModel:
    """The same weights for the same version, in every process."""
    model = copy.deepcopy(model_of(settings))
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def load(settings: Settings, process: ServerProcess, seen: Seen, until: float, worker: int) -> None:
    """One client: prompts with shared beginnings, one to four samples, until the time is up."""
    draw = random.Random(worker)
    stems = [random.Random(-1 - stem).choices(range(settings.vocab), k=256) for stem in range(4)]
    with process.backend(timeout_s=120, max_concurrent=1) as backend:
        while time.monotonic() < until:
            stem = stems[draw.randrange(4)][: draw.randrange(1, 256)]
            prompt = stem + draw.choices(range(settings.vocab), k=draw.randrange(1, 32))
            length = draw.randrange(1, settings.response)
            request = GenerateRequest(f"w{worker}", prompt, draw.randrange(1, 5), length, ignore_eos=True)
            try:
                samples = backend.generate([request])[0].samples
            except ServerError as error:
                seen.errors.append(f"{type(error).__name__}: {error}")
                continue
            seen.responses += len(samples)
            seen.tokens += sum(len(sample.token_ids) for sample in samples)
            if draw.random() < settings.checked_share:
                seen.checked.append((prompt, samples[-1]))


def update(settings: Settings, process: ServerProcess, seen: Seen, until: float) -> None:
    version, started = 0, time.monotonic()
    with process.backend(timeout_s=120) as backend:
        while time.monotonic() < until:
            time.sleep(min(settings.update_every, max(0.0, until - time.monotonic())))
            version += 1
            tensors = weights_of(settings, version).state_dict()
            began = time.monotonic()
            try:
                backend.begin_update(str(version))
                backend.push(tensors)
                if version % 2:
                    backend.pause("keep")
                backend.finish_update(str(version))
                backend.resume()
            except ServerError as error:
                seen.errors.append(f"update {version}: {type(error).__name__}: {error}")
            seen.update_s.append(time.monotonic() - began)
            seen.memory_mib.append((time.monotonic() - started, resident_mib(process.pid)))


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


@torch.no_grad()
def largest_gap(settings: Settings, seen: Seen) -> float:
    """Over all sampled tokens, against float64 passes of the weights that each is tagged with."""
    worst = 0.0
    versions = sorted({span.version for _, sample in seen.checked for span in sample.version_spans}, key=int)
    for version in versions:
        model = weights_of(settings, int(version)) if int(version) else model_of(settings)
        model = model.double()
        for prompt, sample in seen.checked:
            for span in (span for span in sample.version_spans if span.version == version):
                ids = torch.tensor([[*prompt, *sample.token_ids[:-1]]])
                logprobs = model(ids).logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
                wanted = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                have = torch.tensor(sample.logprobs, dtype=torch.float64)
                worst = max(worst, float((wanted - have)[span.start : span.end].abs().max()))
    return worst


def growth(memory_mib: list[tuple[float, float]], warm_s: float) -> float:
    """Last third over first third of what was measured after the warm-up, minus 1."""
    warm = [resident for at, resident in memory_mib if at >= warm_s] or [memory_mib[-1][1]]
    third = max(1, len(warm) // 3)
    return statistics.mean(warm[-third:]) / statistics.mean(warm[:third]) - 1


def soak(settings: Settings, process: ServerProcess) -> Seen:
    seen, until = Seen(), time.monotonic() + 60 * settings.minutes
    threads = [
        threading.Thread(target=load, args=(settings, process, seen, until, worker))
        for worker in range(settings.concurrent)
    ]
    threads.append(threading.Thread(target=update, args=(settings, process, seen, until)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--update-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--response", type=int, default=64, help="longest response in tokens")
    parser.add_argument("--checked-share", type=float, default=0.02, help="of all requests")
    add_model_arguments(parser)
    settings = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        process = start_server(settings, Path(directory), "--weight-version", "0")
        try:
            seen = soak(settings, process)
        finally:
            process.stop()
    gap, grown = largest_gap(settings, seen), growth(seen.memory_mib, 12 * settings.minutes)
    carried = sum(len(sample.version_spans) > 1 for _, sample in seen.checked)
    print(f"{seen.responses} responses, {seen.tokens / 60 / settings.minutes:.0f} tokens/s")
    print(f"{len(seen.update_s)} updates, median {statistics.median(seen.update_s):.2f} s")
    print(f"errors: {len(seen.errors)} {seen.errors[:3]}")
    print(f"memory: {seen.memory_mib[-1][1]:.0f} MiB, growth {grown:.1%}")
    print(f"log-probs: {len(seen.checked)} responses checked, {carried} over a swap, largest difference {gap:.1e}")
    return int(bool(seen.errors) or grown > 0.02 or gap > 1e-4 or not seen.checked)


if __name__ == "__main__":
    raise SystemExit(main())
