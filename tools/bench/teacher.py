"""The teacher pass in its own layout beside the student's layout, and both beside the student's passes.

    python -W ignore tools/bench/teacher.py

Two gloo ranks (cp 2) with one thread each. In its own layout each cp rank scores other samples and nothing is sent;
in the student's every short context is cut over both ranks and attention is a ring. Below the table: GFLOP/s of every
pass, the teacher's share of a step, its wall time against what its FLOPs would take at the speed of the student's
forward, and how evenly samples of unequal lengths are shared at cp 4. On a GPU, --ranks 1.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model import add_model_arguments, architecture_of, build, forward_backward, forward_flops
from ranks import on_ranks
from side_by_side import Run, measure, report

from opsd_megatron.config import BatchConfig
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.models.teacher import score
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.train.layout import StepLayout, lay_out, split_samples
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan

Settings = argparse.Namespace


def rollouts_of(lengths: list[tuple[int, int, int]], vocab: int) -> list[Rollout]:
    """One of random tokens for each (student prompt, teacher prompt, response)."""
    draw = random.Random(0)
    rollouts = []
    for number, counts in enumerate(lengths):
        student, teacher, response = (tuple(draw.choices(range(vocab), k=count)) for count in counts)
        count = len(response)
        spans = (VersionSpan("0", 0, count),), (Turn("model", 0, count),)
        pair = PromptPair(str(number), student, teacher)
        rollouts.append(Rollout(pair, 0, response, (0.0,) * count, "raw", (True,) * count, "stop", *spans, "none"))
    return rollouts


def layout_of(settings: Settings, teacher_as_student: bool = False):
    """(model, mesh, layout) of this rank; `teacher_as_student` lays the short contexts out as student microbatches."""
    model, mesh, architecture = build(settings, cp=settings.ranks)
    rollouts = rollouts_of([(settings.student, settings.teacher, settings.response)] * settings.prompts, settings.vocab)
    if teacher_as_student:
        rollouts = [
            replace(rollout, pair=replace(rollout.pair, student_prompt=rollout.pair.teacher_prompt))
            for rollout in rollouts
        ]
    longest = (settings.teacher if teacher_as_student else settings.student) + settings.response
    budget = BatchConfig(
        student_microbatch_tokens=longest,
        teacher_microbatch_tokens=settings.together * (settings.teacher + settings.response),
    )
    return model, mesh, lay_out(rollouts, mesh, budget, architecture.pair_cost)


def gigaflops(settings: Settings, shards: list[ContextShard]) -> float:
    """Of this rank in one forward."""
    architecture = architecture_of(settings)
    return (
        sum(sum(forward_flops(architecture, s.tokens_by_rank[s.cp.rank], s.pairs_by_rank[s.cp.rank])) for s in shards)
        / 1e9
    )


def forward_only(settings: Settings, choose: Callable[[StepLayout], list[ContextShard]], as_student: bool) -> Run:
    model, mesh, layout = layout_of(settings, as_student)
    shards = choose(layout)

    def run() -> dict[str, float]:
        score([model], shards, mesh)
        return {"GFLOP": gigaflops(settings, shards)}

    return run


def own_rank(settings: Settings) -> Run:
    return forward_only(settings, lambda layout: list(layout.teacher), as_student=False)


def as_student_rank(settings: Settings) -> Run:
    return forward_only(settings, lambda layout: [one.shard for one in layout.student], as_student=True)


def student_rank(settings: Settings) -> Run:
    return forward_only(settings, lambda layout: [one.shard for one in layout.student], as_student=False)


def step_rank(settings: Settings) -> Run:
    model, mesh, layout = layout_of(settings)
    shards = [microbatch.shard for microbatch in layout.student]

    def run() -> dict[str, float]:
        forward_backward(model, mesh, shards, [layout.table.token_ids] * len(shards))
        return {"GFLOP": gigaflops(settings, shards)}

    return run


def own(settings: Settings) -> Run:
    return on_ranks(settings.ranks, own_rank, settings)


def as_student(settings: Settings) -> Run:
    return on_ranks(settings.ranks, as_student_rank, settings)


def student(settings: Settings) -> Run:
    return on_ranks(settings.ranks, student_rank, settings)


def step(settings: Settings) -> Run:
    return on_ranks(settings.ranks, step_rank, settings)


def balance_at_cp4(settings: Settings, architecture: Architecture) -> float:
    """Max over mean of the teacher's FLOPs on four cp ranks, 16 samples of half to one and a half times the length."""
    draw = random.Random(0)
    lengths = [(8, int(settings.teacher * draw.uniform(0.5, 1.5)), settings.response) for _ in range(16)]
    chosen = split_samples(rollouts_of(lengths, settings.vocab), 4, architecture.pair_cost)

    def flops(number: int) -> float:
        tokens = lengths[number][1] + lengths[number][2] - 1
        return sum(forward_flops(architecture, tokens, tokens * (tokens + 1) // 2))

    loads = [sum(map(flops, numbers)) for numbers in chosen]
    return max(loads) * 4 / sum(loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--student", type=int, default=4096, help="tokens of a student prompt")
    parser.add_argument("--teacher", type=int, default=2048, help="tokens of a teacher prompt")
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        help="samples in one microbatch of the teacher; with 1 its matrices have as many rows as the student's",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    add_model_arguments(parser, hidden=512, ffn=1536, heads=8, kv_heads=2)
    settings = parser.parse_args()
    contenders = {
        "teacher, own layout": own,
        "teacher, student's layout": as_student,
        "student forward": student,
        "student forward + backward": step,
    }
    figures = measure(contenders, settings, settings.repeats)
    title = f"{settings.prompts} prompts of {settings.student} and {settings.teacher} tokens, cp {settings.ranks}"
    report(title, settings, figures, settings.output)
    teacher, _, forward, whole = figures
    for one in figures[:3]:
        print(f"{one.name}: {one.values['GFLOP'] / one.median_s:.0f} GFLOP/s on {settings.ranks} ranks")
    expected = teacher.values["GFLOP"] / forward.values["GFLOP"] * forward.median_s
    print(f"teacher pass over its FLOPs at the student forward's speed: {teacher.median_s / expected:.3f}")
    print(f"its share of a step: {teacher.median_s / (teacher.median_s + whole.median_s):.1%}")
    print(f"its FLOPs at cp 4, max / mean: {balance_at_cp4(settings, architecture_of(settings)):.3f}")


if __name__ == "__main__":
    main()
