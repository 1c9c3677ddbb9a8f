"""A run that samples one step ahead beside the same run that samples, then trains.

    python -W ignore tools/bench/overlap.py

Two processes for each contender: a trainer of one thread and an inference server of one thread. What overlap can gain
is the shorter of sampling and training; the columns say how long a step took and what it waited for, in medians over
the steps behind the second. The share of the ideal is (s - o) / min(sampling, training), s and o the two step times.
"""

import argparse
import atexit
import json
import os
import secrets
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from side_by_side import Run, measure, report

from opsd_megatron.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from opsd_megatron.launch.tiny_world import write_tiny_world
from opsd_megatron.rollout.process import ServerProcess
from opsd_megatron.train.loop import fit

WAITS = ("time/settle_s", "time/publish_s", "time/rollout_s")


def prepare(settings: argparse.Namespace, overlap: Literal["none", "one_step_off"]) -> Run:
    directory = Path(tempfile.mkdtemp(prefix=f"opsd-{overlap}-", dir=settings.directory))
    shape = {
        "model_type": "qwen3",
        "num_hidden_layers": settings.layers,
        "hidden_size": settings.hidden,
        "intermediate_size": 3 * settings.hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": settings.hidden // 8,
        "max_position_embeddings": 2 * settings.context,
        "tie_word_embeddings": True,
    }
    write_tiny_world(directory, shape, settings.prompts * (settings.steps + 2), settings.context)
    token = secrets.token_hex(16)
    os.environ["OPSD_SERVER_TOKEN"] = token
    server = ServerProcess(directory / "model", token, directory / "server.log", engine="fast", threads=1)
    server.start()
    atexit.register(server.stop)
    longest = settings.context + settings.response
    config = RunConfig(
        model=ModelConfig(directory / "model"),
        data=DataConfig(directory / "records.jsonl", student_tokens=settings.context, teacher_tokens=settings.context),
        rollout=RolloutConfig(
            server.url,
            samples_per_prompt=settings.samples,
            max_response_tokens=settings.response,
            overlap=overlap,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        batch=BatchConfig(settings.prompts, student_microbatch_tokens=4 * longest),
        checkpoint=CheckpointConfig(directory / "run", every_steps=0, export_hf=False),
        log=LogConfig(progress=False),
        steps=settings.steps,
    )

    def run() -> Mapping[str, float]:
        shutil.rmtree(directory / "run", ignore_errors=True)
        fit(config)
        rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()][2:]

        def median(names: tuple[str, ...]) -> float:
            return statistics.median(sum(row[name] for name in names) for row in rows)

        return {
            "step s": median(("time/step_s",)),
            "of it waiting s": median(WAITS),
            "staleness": rows[-1]["rollout/staleness_steps_mean"],
            "k3 nats": rows[-1]["mismatch/k3_kl_nats"],
        }

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {
        "layers": 4, "hidden": 256, "context": 512, "response": 48, "prompts": 4, "samples": 2, "steps": 10,
        "repeats": 2,
    }  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opsd-overlap-") as settings.directory:
        prepared = {
            "one step ahead": partial(prepare, overlap="one_step_off"),
            "one after the other": partial(prepare, overlap="none"),
        }
        figures = measure(prepared, settings, repeats=settings.repeats)
    report("sampling while training", settings, figures, settings.output)
    ahead, after = (one.values for one in figures)
    waiting = after["of it waiting s"]
    ideal = min(waiting, after["step s"] - waiting)
    gained = after["step s"] - ahead["step s"]
    print(f"a step: {after['step s'] / ahead['step s']:.2f} times as fast; {gained / ideal:.0%} of the ideal gain")


if __name__ == "__main__":
    main()
