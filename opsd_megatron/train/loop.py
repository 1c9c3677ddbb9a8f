"""The program in one function. Read this file first."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from opsd_megatron.config import RunConfig
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.train.layout import lay_out
from opsd_megatron.train.optimizer import apply_gradients, learning_rate
from opsd_megatron.train.run import Run
from opsd_megatron.train.step import score_responses, student_pass
from opsd_megatron.train.token_values import TokenValues


def fit(config: RunConfig, watch: Callable[[Mesh], AbstractContextManager] = nullcontext) -> int:
    """Trains to `config.steps` and returns the step reached; goes on from the newest complete checkpoint.

    Every rank calls it. Ends early, with a checkpoint, on SIGTERM or ctrl-C. `watch(mesh)` is entered around the steps.
    """
    with Run(config) as run, watch(run.mesh):
        mesh, objective, teacher = run.mesh, run.objective, run.teacher
        while run.step < config.steps and not run.stop_requested():
            clock = Clock()
            run.feed.settle()  # overlapped, the server may still be busy with this step's prompts
            clock.lap("time/settle_s")

            run.publish()  # the weights that answer
            clock.lap("time/publish_s")

            rollouts = run.sample()  # the student answers under its own (long) prompt; overlapped, one step ahead
            clock.lap("time/rollout_s")

            layout = lay_out(rollouts, mesh, config.batch, run.architecture.pair_cost)
            teacher_hidden = score_responses(teacher, layout, mesh) if objective.needs_teacher else None
            clock.lap("time/teacher_s")

            run.zero_gradients()
            kept = TokenValues() if config.rollout.record_to else None
            sums = student_pass(run.chunks, layout, objective, teacher_hidden, teacher.head_weight(), mesh, kept)
            values = run.reduce_metrics(rollouts, sums)
            run.keep(rollouts, kept)
            clock.lap("time/student_s")

            rate = learning_rate(config.optimizer, run.step, config.steps)
            norm, moved = apply_gradients(run.optimizer, rate)
            teacher.update()
            clock.lap("time/optimizer_s")

            run.step += 1
            values |= {"optimizer/grad_norm": norm, "optimizer/lr": rate, "optimizer/skipped": float(not moved)}
            run.finish_step(values | clock.laps)
        run.publish_student()
        return run.step


class Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
        self.laps["time/step_s"] = now - self._started
