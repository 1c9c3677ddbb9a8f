"""How much one step is: tokens, attention pairs and response rows of each pass, as packing and dealing make them."""

from dataclasses import dataclass

from opsd_megatron.config import ParallelConfig, RunConfig


@dataclass(frozen=True)
class Pass:
    """The student's or the teacher's pass over one replica's share of a step."""

    microbatches: int
    """On one rank."""
    tokens: int
    """Of the largest microbatch on one rank: the student's are cut over cp, the teacher's are not."""
    rows: int
    """Response rows of the largest microbatch on one rank: spread over cp for the student's head."""
    total_tokens: int
    """Of all microbatches of a replica, over cp; a shared context counts once."""
    total_pairs: int
    """(query, key) pairs of the same."""
    total_rows: int


@dataclass(frozen=True)
class Workload:
    """One step of one replica with prompts and responses as long as the recipe allows."""

    student: Pass
    teacher: Pass


def workload_of(config: RunConfig, dp: int) -> Workload:
    """The step when every prompt and every response fills its budget, and prompts share nothing."""
    prompts = -(-config.batch.prompts_per_step // dp)
    samples, response = config.rollout.samples_per_prompt, config.rollout.max_response_tokens
    parallel, batch = config.parallel, config.batch
    student = _pass(prompts, samples, config.data.student_tokens, response, batch.student_microbatch_tokens, parallel)
    scored = -(-prompts // parallel.cp)  # by the busiest cp rank: a prompt's samples stay together
    teacher = _pass(
        scored, samples, config.data.teacher_tokens, response, batch.teacher_microbatch_tokens, parallel, cut=1
    )
    everyone = prompts / scored
    teacher = Pass(
        teacher.microbatches,
        teacher.tokens,
        teacher.rows,
        round(teacher.total_tokens * everyone),
        round(teacher.total_pairs * everyone),
        prompts * samples * response,
    )
    return Workload(student, teacher)


def _pass(
    prompts: int,
    samples: int,
    prompt: int,
    response: int,
    budget: int,
    parallel: ParallelConfig,
    cut: int | None = None,
) -> Pass:
    """`cut`: ranks that share a microbatch's tokens; cp unless given."""
    cut = parallel.cp if cut is None else cut
    branch = response - 1  # the last response token is only a target
    together = samples if prompt + samples * branch <= budget else max(1, (budget - prompt) // max(branch, 1))
    trees = prompts * -(-samples // together)
    per_microbatch = max(1, budget // (prompt + together * branch))
    multiple = parallel.pp if parallel.vpp else 1
    needed = -(-trees // per_microbatch)
    microbatches = -(-needed // multiple) * multiple
    largest = -(-trees // microbatches)
    align = parallel.tp if parallel.sequence_parallel else 1
    tokens = -(-largest * (prompt + together * branch) // cut)
    pairs = prompt * (prompt + 1) // 2 * -(-samples // together) + samples * (branch * prompt + branch * response // 2)
    return Pass(
        microbatches=microbatches,
        tokens=-(-tokens // align) * align,
        rows=-(-largest * together * response // cut),
        total_tokens=trees * prompt + prompts * samples * branch,
        total_pairs=prompts * pairs,
        total_rows=prompts * samples * response,
    )
