"""The whole program on two CPU cores: a small model teaches itself to use contexts that it could not use before.

    python examples/opsdl_demo.py                         # what `make demo` runs
    python examples/opsdl_demo.py --recipes frozen live --seeds 2 3 4

For every recipe and seed: starts the inference server as a process of its own, asks the starting model questions at
several context lengths, trains with `torchrun --nproc-per-node 2 examples/opsdl_tiny.py` against that server, asks
again, and writes table, JSONL and picture. The training data hold no answer, only (long context, short context,
question).
"""

import hashlib
import json
import math
import os
import random
import secrets
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from opsdl_tiny import RECIPES, TEMPLATE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiny_task import make_eval_set, make_training_set

from opsd_megatron.data.records import read_records
from opsd_megatron.data.tokenizer import load_tokenizer
from opsd_megatron.errors import DataError, UserError
from opsd_megatron.evaluation.exact_match import LengthScore, append_rows, evaluate_lengths
from opsd_megatron.evaluation.plot import plot_accuracy
from opsd_megatron.launch.command import exit_with
from opsd_megatron.rollout.process import start_server

HERE = Path(__file__).parent
MODEL = HERE / "tiny"
RESPONSE_TOKENS = 6
QUESTIONS = 4
"""About every training context: the tree computes the context once for all of them."""
PROBE_SEED = 1_000_000
"""Of the questions that are asked now and then during training, to be seen; the loss never sees an answer."""
BASELINE = "starting model"
console = Console(stderr=True)


@dataclass(frozen=True)
class Demo:
    """Trains the tiny model on its own short-context knowledge and shows what that did, by context length."""

    recipes: tuple[str, ...] = ("frozen",)
    """Names of recipes in examples/opsdl_tiny.py."""
    seeds: tuple[int, ...] = (2,)
    """One run per recipe and seed; each has its own training data and questions. The starting model was chosen on the
    questions of seed 0 and the task on those of seed 1: published figures begin at 2."""
    lengths: tuple[int, ...] = (96, 128, 208, 256, 416, 512, 832, 1024)
    """Context lengths in tokens at which questions are asked."""
    items: int = 200
    """Questions per length."""
    output: Path = Path("runs/demo")
    """Data, runs, results.jsonl and accuracy.png go here; an interrupted run goes on from its checkpoint."""

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"


def main(demo: Demo) -> None:
    check_model()
    for seed in demo.seeds:
        for recipe in demo.recipes:
            if (recipe, seed) in measured(demo):
                console.print(f"{recipe}, seed {seed}: already in {demo.results}; remove {demo.output} to start afresh")
            else:
                run_one(demo, recipe, seed)
            report(demo)


def check_model() -> None:
    """DataError unless the starting model is the one that tiny_pretrain.py made and this repository recorded."""
    for line in (MODEL / "SHA256").read_text().splitlines():
        expected, name = line.split()
        found = hashlib.sha256((MODEL / name).read_bytes()).hexdigest()
        if found != expected:
            raise DataError(
                f"{MODEL / name} has SHA-256 {found}, expected {expected}; restore it with git checkout, or train the "
                "model again with examples/tiny_pretrain.py, which writes SHA256 too"
            )


def run_one(demo: Demo, recipe: str, seed: int) -> None:
    """Appends the scores after training, and those before it unless another recipe has asked the same questions."""
    directory = demo.output / f"{recipe}-{seed}"
    write_data(demo, directory, recipe, seed)
    token = secrets.token_urlsafe(32)
    console.rule(f"{recipe}, seed {seed}")
    server = start_server(MODEL, token, directory / "server.log", threads=2, arguments=("--batch-tokens", "8192"))
    with server:
        asked = (BASELINE, seed) in measured(demo)
        scores = {} if asked else {BASELINE: evaluate(demo, directory, server, "before")}
        train(recipe, seed, directory, server.url, token)
        scores[recipe] = evaluate(demo, directory, server, "after")
    rows = [{"model": model, "seed": seed, **score.row()} for model, own in scores.items() for score in own]
    append_rows(demo.results, rows)


def measured(demo: Demo) -> dict[tuple[str, int], list[LengthScore]]:
    """Scores by (model, seed), of this and earlier calls, where the same questions were asked."""
    lines = demo.results.read_text().splitlines() if demo.results.exists() else []
    found: dict[tuple[str, int], dict[int, LengthScore]] = {}
    for row in map(json.loads, lines):
        if row["items"] == demo.items:
            score = LengthScore(row["length"], row["items"], row["correct"])
            found.setdefault((row["model"], row["seed"]), {})[row["length"]] = score
    return {
        key: [scores[length] for length in demo.lengths]
        for key, scores in found.items()
        if scores.keys() >= set(demo.lengths)
    }


def write_data(demo: Demo, directory: Path, recipe: str, seed: int) -> None:
    """train.jsonl without answers, in the order in which it is read; eval and probe from other prose and facts."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(MODEL)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text))

    draw = random.Random(seed)
    contexts = RECIPES[recipe].batch.prompts_per_step // QUESTIONS
    steps = RECIPES[recipe].steps
    lengths = [context_tokens(draw, step / steps) for step in range(steps) for _ in range(contexts)]
    training = make_training_set(encode, seed, lengths, QUESTIONS)
    asked = [record for length in demo.lengths for record in make_eval_set(encode, seed, length, demo.items)]
    probed = [record for length in (128, 416, 832) for record in make_eval_set(encode, PROBE_SEED, length, 16)]
    for name, records in (("train", training), ("eval", asked), ("probe", probed)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def context_tokens(draw: random.Random, progress: float) -> int:
    """Log-uniform from 64 tokens up to a limit that grows from 320 to 960 over the first half of the run."""
    longest = 320 + min(1.0, progress / 0.5) * (960 - 320)
    return int(math.exp(draw.uniform(math.log(64), math.log(longest))))


def train(recipe: str, seed: int, directory: Path, url: str, token: str) -> None:
    """The training run, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(HERE / "opsdl_tiny.py"), "--recipe", recipe, "--seed", str(seed), "--rollout.url", url]
    command += ["--data.path", str(directory / "train.jsonl"), "--checkpoint.directory", str(directory / "run")]
    command += ["--log.probe-path", str(directory / "probe.jsonl")]
    environment = os.environ | {"OPSD_SERVER_TOKEN": token, "OMP_NUM_THREADS": "1"}
    if code := subprocess.run(command, env=environment).returncode:
        raise UserError(f"training ended with exit code {code}; what it said is above. It goes on from its checkpoint")


def evaluate(demo: Demo, directory: Path, server, when: str) -> list[LengthScore]:
    from opsd_megatron.train.sampling import greedy  # imports Megatron, whose warnings are quiet by now

    tokenizer = load_tokenizer(MODEL)
    records = list(read_records(directory / "eval.jsonl"))
    with server.backend() as backend:
        return evaluate_lengths(
            lambda prompts: greedy(backend, prompts, tokenizer, RESPONSE_TOKENS),
            track(records, f"asking {when} training", console=console),
            TEMPLATE,
            tokenizer,
            budget_tokens=max(demo.lengths),
            items_path=directory / f"items-{when}.jsonl",
        )


def report(demo: Demo) -> None:
    """The table on the terminal and the picture, over everything measured so far."""
    table = Table(title="exact match by context length (mean over seeds, lowest to highest)")
    for column in ("", *map(str, demo.lengths)):
        table.add_column(column, justify="right" if column else "left")
    curves: dict[str, list[list[LengthScore]]] = {}
    for (model, _), scores in measured(demo).items():
        curves.setdefault(model, []).append(scores)
    for model, seeds in curves.items():
        table.add_row(model, *(cell([score.accuracy for score in column]) for column in zip(*seeds, strict=True)))
    Console().print(table)
    picture = demo.output / "accuracy.png"
    plot_accuracy(curves, picture, "A small model teaches itself longer contexts", baseline=BASELINE)
    Console().print(f"picture: {picture}   numbers: {demo.results}")


def cell(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    options = tyro.cli(Demo, description=__doc__)
    exit_with(lambda: main(options))
