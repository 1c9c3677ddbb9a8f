"""Rollouts without a trainer: the prompts of a recipe's steps, answered by a server and recorded for a later replay.

    python -m opsd_megatron.launch.generate --model.path M --data.path train.jsonl --rollout.url http://... \
        --rollout.record-to rollouts --steps 100

The same prompts, in the same order and with the same seeds, as a run of those fields would ask. Steps that are recorded
already are left alone, so that the command can be repeated after an interruption.
"""

import sys

from opsd_megatron.config import Distill, RunConfig
from opsd_megatron.data.contexts import ordered_stream
from opsd_megatron.data.pairs import build_pairs
from opsd_megatron.data.records import read_records
from opsd_megatron.data.tokenizer import load_tokenizer
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.command import exit_with, parse_fields
from opsd_megatron.rollout.recording import recorded_steps
from opsd_megatron.rollout.sampler import sample_rollouts


def generate(config: RunConfig) -> None:
    """Records steps 1 to `config.steps`; the weights are whatever the server serves, and recorded by their version."""
    from opsd_megatron.parallel.axis import Axis
    from opsd_megatron.train.record import record_rollouts
    from opsd_megatron.train.servers import connect

    directory = config.rollout.record_to
    if directory is None or not isinstance(config.objective, Distill):
        raise ConfigError("generating needs --rollout.record-to DIRECTORY and the objective Distill")
    tokenizer, records = load_tokenizer(config.model.path), read_records(config.data.path)
    alone = Axis.single("dp")
    stream = ordered_stream(records, config.data, config.seed, alone.rank, alone.size)
    done = set(recorded_steps(directory))
    backend = connect(config, tokenizer)
    try:
        for step in range(config.steps):
            numbers = stream.next_batch(config.batch.prompts_per_step)
            if step + 1 in done:
                continue
            pairs = build_pairs(records, numbers, config.data, tokenizer)
            rollouts = sample_rollouts(pairs, backend, config.rollout, tokenizer.eos_ids, config.seed, step, None)
            record_rollouts(config, tokenizer.fingerprint, step + 1, alone, rollouts, {})
            tokens = sum(len(rollout.token_ids) for rollout in rollouts)
            print(f"step {step + 1}/{config.steps}: {len(rollouts)} rollouts, {tokens} tokens", file=sys.stderr)
    finally:
        backend.close()


def main() -> None:
    config = parse_fields(RunConfig(), ["Records rollouts in rollout.record_to without training."])
    exit_with(lambda: generate(config))


if __name__ == "__main__":
    main()
