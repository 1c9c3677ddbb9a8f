"""The mutable state of one training run: what it is built from, how it samples, saves, resumes and ends."""

import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch

from opsd_megatron.checkpoint.live_export import save_hf
from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import Distill, FrozenTeacher, RunConfig
from opsd_megatron.data.contexts import ordered_stream
from opsd_megatron.data.pairs import build_prompt
from opsd_megatron.data.records import read_records
from opsd_megatron.data.tokenizer import load_tokenizer
from opsd_megatron.errors import ConfigError, ServerError, UserError
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.models.teacher import OtherTeacher
from opsd_megatron.objectives.build import build_objective
from opsd_megatron.objectives.metrics import MetricSums, finish_metrics, reduce_metrics, rollout_metrics
from opsd_megatron.parallel.mesh import build_mesh
from opsd_megatron.parallel.reduce import broadcast_object
from opsd_megatron.rollout.backend import RolloutBackend, WrongWeightVersion
from opsd_megatron.train.colocated import Turns, put_to_sleep
from opsd_megatron.train.feed import LiveFeed, ReplayFeed
from opsd_megatron.train.mismatch import MismatchGuard, require_comparable, staleness_metrics
from opsd_megatron.train.optimizer import make_trainable
from opsd_megatron.train.parking import park_training
from opsd_megatron.train.progress import ProgressLine
from opsd_megatron.train.record import RunRecord, describe_run, record_rollouts
from opsd_megatron.train.sampling import Sampling
from opsd_megatron.train.serving import PUBLISH_ATTEMPTS, Serving
from opsd_megatron.train.stop import StopSignal
from opsd_megatron.train.teacher import make_teacher
from opsd_megatron.train.token_values import TokenValues
from opsd_megatron.train.weight_sync import Publisher, version_name
from opsd_megatron.types import Rollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run:
    """Every rank has one; rank 0 alone writes records, and one rank of each replica talks to the inference server."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.mesh = build_mesh(config.parallel, config.seed)
        self.architecture = read_architecture(
            config.model.path, config.model.yarn_factor, config.model.yarn_original_positions
        )
        self.tokenizer = load_tokenizer(config.model.path)
        self._check_vocabulary()
        self.records = read_records(config.data.path)
        stream = ordered_stream(self.records, config.data, config.seed, self.mesh.dp.rank, self.mesh.dp.size)
        stream.share(config.batch.prompts_per_step)  # said before anything is sent or trained
        if config.rollout.replay_from is None:
            self.sampling = Sampling(config, self.tokenizer, self.mesh)
            self.feed = LiveFeed(config, self.records, stream, self.tokenizer, self.sampling, self.mesh)
        else:
            self.sampling, self.feed = None, ReplayFeed(config, stream, self.tokenizer, self.mesh)
        sender = self.sampling.backend if self.sampling and self.mesh.world.rank == 0 else None
        if config.rollout.colocated:
            put_to_sleep(sender)  # it holds the memory that the model is about to take
        dtype = DTYPES[config.model.dtype]
        modules = build_model(self.architecture, self.mesh, dtype, config.model.recompute, config.model.attention)
        load_weights(modules, self.architecture, config.model.path, self.mesh)
        self.teacher, vocab_size = make_teacher(
            config.teacher, modules, self.architecture, self.tokenizer, self.mesh, dtype
        )
        self.chunks, self.optimizer = make_trainable(modules, self.mesh, config.optimizer, dtype)
        self.objective = build_objective(
            config.objective, config.rollout.temperature, self.mesh.tp, self.mesh.cp, vocab_size
        )
        self.on_policy = isinstance(config.objective, Distill)
        self.step = self._resume()
        self.serving = self._serve(sender)

    def _serve(self, sender: RolloutBackend | None) -> Serving | None:
        """None where rollouts are replayed."""
        config = self.config
        if self.sampling is None:
            return None
        turns = None
        if config.rollout.colocated:
            others = self.teacher.chunks if isinstance(self.teacher, OtherTeacher) else []
            turns = Turns(sender, park_training(self.chunks, self.optimizer, others, self.mesh.device))
        publisher = Publisher(config.rollout, self.architecture, self.mesh, sender)
        guard = MismatchGuard(config.mismatch, self._probe_tokens(), self.architecture.vocab_size, self.mesh)
        return Serving(self.chunks, self.sampling, self.feed, publisher, turns, guard)

    def __enter__(self) -> "Run":
        self._stop = StopSignal()
        is_first = self.mesh.world.rank == 0
        self._progress = ProgressLine(self.config.steps, self.step, self.config.log.progress) if is_first else None
        if self._progress is not None and self.sampling is not None:
            self.sampling.report_to(self._progress.show_rollouts)
        description = describe_run(self.config, self.mesh.describe())
        directory = self.config.checkpoint.directory
        self._record = RunRecord(directory, description, self.config.log, self.step) if is_first else None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Whatever ended the run: a checkpoint where the state is whole, and nothing left running."""
        if kind is None or issubclass(kind, ServerError):
            if self.serving is not None:
                self.serving.rescue()
            self._save_if_new()
        if kind is None and self.config.checkpoint.export_hf and self.step >= self.config.steps:
            self._export()
        if self._record is not None:
            self._record.close()
        if self._progress is not None:
            self._progress.close()
        if self.serving is not None:
            self.serving.close()
        self._stop.restore()

    def sample(self) -> list[Rollout]:
        """This replica's rollouts of this step; a server that lost the weights gets them again.

        Overlapped, they were asked for one step ago, and the server begins with the next step's.
        """
        attempts_left = PUBLISH_ATTEMPTS
        while (rollouts := self.feed.take(self.step, self.rollout_version)) is None:
            if self.serving is None or not attempts_left:
                raise WrongWeightVersion(
                    f"the servers were given weights {self.rollout_version} {PUBLISH_ATTEMPTS} times and still answer "
                    "from others; does another run publish to them?"
                )
            attempts_left -= 1
            self.serving.forget()
            self.publish()
        if self.on_policy:
            require_comparable(rollouts, self.config.rollout.temperature)
        if self.config.rollout.overlap == "one_step_off" and self.step + 1 < self.config.steps:
            self.feed.ask_ahead(self.step + 1, self.rollout_version)
        elif self.serving is not None:
            self.serving.to_trainer()
        return rollouts

    @property
    def rollout_version(self) -> str:
        """Whose responses this step learns from: the student's of this very step, or the teacher's."""
        if self.on_policy:
            return version_name(self.step)
        return "teacher" if isinstance(self.config.teacher, FrozenTeacher) else f"teacher-{self.step}"

    def publish(self) -> None:
        """The weights that this step's rollouts come from, to the inference servers, unless all have them already."""
        if self.serving is not None:
            with nullcontext() if self.on_policy else self.teacher.active():
                self.serving.publish(self.rollout_version, is_student=self.on_policy)

    def publish_student(self) -> None:
        """The weights that the run ends with, so that the servers can be asked about them."""
        if self.serving is not None:
            self.serving.publish(version_name(self.step), is_student=True)

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_metrics(self, rollouts: list[Rollout], sums: MetricSums) -> dict[str, float]:
        """Equal on every rank; UserError on every rank where the loss is not a number, before any weight moves."""
        values: dict[str, float] = {}
        if self.mesh.is_last_stage:
            on_device = {name: value.to(self.mesh.device) for name, value in sums.items()}
            values = finish_metrics(reduce_metrics(on_device, self.mesh.dp_cp))
        values = broadcast_object(values, self.mesh.pp, self.mesh.pp.size - 1)
        about = rollout_metrics(rollouts, self.tokenizer.eos_ids) | staleness_metrics(rollouts, self.step)
        about = {name: value.to(self.mesh.device) for name, value in about.items()}
        values |= finish_metrics(reduce_metrics(about, self.mesh.dp))
        if not math.isfinite(values["loss/per_token"]):
            raise UserError(
                f"step {self.step}: the loss is {values['loss/per_token']}; no weight was changed. Lower optimizer.lr "
                f"(now {self.config.optimizer.lr}) and resume from the last checkpoint"
            )
        return values

    def keep(self, rollouts: list[Rollout], kept: TokenValues | None) -> None:
        """Writes the step's rollouts with what was computed of their tokens, where they are recorded."""
        if kept is None:
            return
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        values = kept.whole(tokens, self.mesh)
        if self.mesh.replica.rank == 0:
            record_rollouts(self.config, self.tokenizer.fingerprint, self.step + 1, self.mesh.dp, rollouts, values)

    def finish_step(self, values: Mapping[str, float]) -> None:
        """Counts, shows, records and, when due, probes and saves."""
        log, every = self.config.log, self.config.checkpoint.every_steps
        values = dict(values)
        if self.serving is not None:
            values |= self.serving.take_values()
            if log.probe_path and log.probe_every_steps and self.step % log.probe_every_steps == 0:
                self.publish_student()
                values |= self.serving.probe_lengths()
        if self._record is not None and self._progress is not None:
            self._record.write(self.step, values)
            self._progress.show(self.step, values)
        if self.serving is not None:
            self.serving.guard.watch(self.step, values)
        if every and self.step % every == 0:
            self._save_if_new()

    def stop_requested(self) -> bool:
        """Whether any rank got SIGTERM or ctrl-C; collective."""
        return self._stop.anywhere(self.mesh)

    def _check_vocabulary(self) -> None:
        if self.tokenizer.vocab_size > self.architecture.vocab_size:
            raise ConfigError(
                f"{self.config.model.path}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"{self.architecture.vocab_size}; they do not belong together"
            )

    def _probe_tokens(self) -> tuple[int, ...]:
        data = self.config.data
        prompt = build_prompt(self.records[0], "student", data.template, self.tokenizer, data.student_tokens)
        return prompt.token_ids

    def _resume(self) -> int:
        self._saved_step = -1
        restored = load_state(
            self.config.checkpoint.directory,
            self.chunks,
            self.architecture,
            self.mesh,
            optimizer=self.optimizer,
            teacher=self.teacher.tensors(),
            seed=self.config.seed,
        )
        if restored is None:
            return 0
        self.feed.load_state(restored.extra | {"step": restored.step})
        self._saved_step = restored.step
        return restored.step

    def _save_if_new(self) -> None:
        if self._saved_step == self.step:
            return
        save_state(
            self.config.checkpoint.directory,
            self.step,
            self.chunks,
            self.architecture,
            self.mesh,
            optimizer=self.optimizer,
            teacher=self.teacher.tensors(),
            extra=self.feed.state(),
            keep=self.config.checkpoint.keep,
        )
        self._saved_step = self.step

    def _export(self) -> None:
        target = self.config.checkpoint.directory / "hf"
        source, facts = self.config.model.path, {"step": self.step}
        save_hf(self.chunks, self.architecture, self.mesh, source, target, overwrite=True, facts=facts)
