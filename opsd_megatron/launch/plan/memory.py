"""Memory of one rank at the moments of a training step that can be its peak, tensor by tensor.

A step is: the teacher's pass, the student's forward and backward through a pipeline schedule with the loss at the end
of the last stage, the reduction of gradients, the optimizer. At every moment a rank holds what it always holds
(`resident`) and what the moment adds. `tools/bench/memory.py` measures the peak of live bytes in torch's allocator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opsd_megatron.config import Distill, EmaTeacher, FrozenTeacher, RunConfig
from opsd_megatron.launch.plan.activations import (
    SINGLE,
    Tensors,
    Widths,
    attention_backward,
    forward_peak,
    kept_by_layer,
    mlp_backward,
    widths_of,
)
from opsd_megatron.launch.plan.head import head_bytes
from opsd_megatron.launch.plan.parameters import stage_parameters
from opsd_megatron.launch.plan.workload import Workload
from opsd_megatron.models.architecture import Architecture

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "ring",
    "head",
    "response rows",
    "teacher",
    "pipeline",
    "communication",
)


@dataclass(frozen=True)
class Moment:
    """What is alive at one point of a step: by part, and inside a part by tensor."""

    name: str
    tensors: Mapping[str, Tensors] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.part(part) for part in self.tensors)

    def part(self, name: str) -> int:
        return sum(self.tensors.get(name, {}).values())

    def plus(self, other: Mapping[str, Tensors]) -> "Moment":
        """With tensors that are alive beside it; what the moment itself says of a tensor stands."""
        parts = [part for part in PARTS if part in self.tensors or part in other]
        return Moment(self.name, {part: dict(other.get(part, {})) | self.tensors.get(part, {}) for part in parts})


@dataclass(frozen=True)
class RankMemory:
    """One rank of a pipeline stage."""

    stage: int
    moments: tuple[Moment, ...]
    host: Tensors
    """Host memory on CUDA: teachers and offloaded optimizer states."""

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Rank:
    """What all moments of one rank are computed from."""

    config: RunConfig
    architecture: Architecture
    work: Workload
    dp: int
    stage: int
    is_cuda: bool
    other: Architecture | None = None
    """The teacher's, where it is another model."""

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.config.parallel.pp - 1

    @property
    def value(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else SINGLE

    @property
    def reducers(self) -> int:
        """Ranks that gradients are summed over."""
        return self.dp * self.config.parallel.cp

    @property
    def cuts(self) -> int:
        """Ranks that optimizer states are cut over."""
        return self.reducers if self.config.optimizer.distributed else 1

    @property
    def parameters(self) -> int:
        return stage_parameters(self.architecture, self.config.parallel, self.stage).total

    @property
    def student(self) -> Widths:
        return self._widths(self.architecture, self.work.student.tokens, self.config.parallel.cp)

    @property
    def teacher(self) -> Widths:
        return self._widths(self.other or self.architecture, self.work.teacher.tokens, 1)

    def _widths(self, architecture: Architecture, tokens: int, cp: int) -> Widths:
        return widths_of(architecture, self.config.parallel, self.config.model.dtype, tokens, cp, self.is_cuda)


def rank_memory(
    config: RunConfig,
    architecture: Architecture,
    work: Workload,
    dp: int,
    stage: int,
    is_cuda: bool,
    other: Architecture | None = None,
) -> RankMemory:
    """Every rank of a stage has the same, but for rounding. The layout must divide the model (`check_layout`).

    `other` is the architecture of an `OtherTeacher`.
    """
    rank = _Rank(config, architecture, work, dp, stage, is_cuda, other)
    resident, host = _resident(rank)
    after = [moment.plus(_teacher_rows(rank)) for moment in (_reduction(rank), _optimizer_step(rank))]
    moments = [_setup(rank), *_teacher_pass(rank), *_student_pass(rank), *after]
    return RankMemory(stage, tuple(moment.plus(resident) for moment in moments), host)


def _resident(rank: _Rank) -> tuple[dict[str, Tensors], Tensors]:
    """(on the device, in host memory)."""
    count, optimizer, host = rank.parameters, {}, {}
    shard = count // rank.cuts * SINGLE
    if rank.value != SINGLE:
        optimizer["main parameters"] = shard  # on the device with offload too: core builds them there first
    if rank.config.optimizer.cpu_offload and rank.is_cuda:
        host = {f"optimizer: {name}": shard for name in ("main parameters", "gradients", "exp_avg", "exp_avg_sq")}
    else:
        optimizer |= {"exp_avg": shard, "exp_avg_sq": shard}
    device = {
        "parameters": {"parameters": count * rank.value},
        "gradients": {"main_grad": count * SINGLE},
        "optimizer": optimizer,
    }
    teacher = rank.config.teacher
    if rank.other is not None:
        second = stage_parameters(rank.other, rank.config.parallel, rank.stage).total
        device["teacher"] = {"parameters of the other model": second * rank.value}
    elif isinstance(teacher, FrozenTeacher | EmaTeacher):
        kept = {
            "teacher: weights": count * (SINGLE if isinstance(teacher, EmaTeacher) else rank.value),
            "teacher: place of the student's": count * rank.value,
        }
        if rank.is_cuda:
            host |= kept
        else:
            device["teacher"] = kept
    if rank.config.parallel.sequence_parallel:
        tokens = max(rank.work.student.tokens, rank.work.teacher.tokens)
        gathered = tokens * rank.architecture.hidden_size * rank.value
        device["communication"] = {"gathered input of a matrix": gathered}  # core's global buffer, never freed
    return device, host


def _setup(rank: _Rank) -> Moment:
    """DDP moves the parameters into its own buffer while the first ones are alive; no optimizer states yet."""
    twice = {"parameters before DDP": rank.parameters * rank.value} if rank.config.optimizer.distributed else {}
    later = {"optimizer": {"main parameters": 0, "exp_avg": 0, "exp_avg_sq": 0}}
    return Moment("setup", {"parameters": twice, "communication": {"gathered input of a matrix": 0}} | later)


def _teacher_pass(rank: _Rank) -> list[Moment]:
    if not isinstance(rank.config.objective, Distill):
        return []
    return [Moment("teacher pass", {"teacher": forward_peak(rank.teacher)} | _teacher_rows(rank))]


def _teacher_rows(rank: _Rank) -> dict[str, Tensors]:
    """Hidden states at all response tokens of the step that this rank's head takes."""
    if not rank.is_last or not isinstance(rank.config.objective, Distill):
        return {}
    rows = -(-rank.work.student.total_rows // rank.config.parallel.cp)
    return {"response rows": {"teacher rows of the step": rows * rank.teacher.hidden * rank.value}}


def _teacher_head(rank: _Rank) -> dict[str, Tensors]:
    """Weights that wait in host memory or in another dtype send a copy of their LM head."""
    teacher = rank.config.teacher
    if not rank.is_last or not isinstance(teacher, FrozenTeacher | EmaTeacher):
        return {}
    is_stored_alike = isinstance(teacher, FrozenTeacher) or rank.value == SINGLE
    copied = 0 if is_stored_alike and not rank.is_cuda else rank.student.vocab * rank.student.hidden * rank.value
    return {"teacher": {"teacher: LM head": copied}}


def microbatches_in_flight(rank: _Rank) -> tuple[int, int]:
    """(model chunks whose activations are alive at most, layers of a chunk): 1F1B, or interleaved, of core."""
    parallel, microbatches = rank.config.parallel, rank.work.student.microbatches
    layers = rank.architecture.num_layers // parallel.pp
    after = parallel.pp - rank.stage - 1
    if parallel.vpp is None:
        return min(microbatches, after + 1), layers
    warmup = 2 * after + (parallel.vpp - 1) * parallel.pp
    return min(microbatches * parallel.vpp, warmup + 1), layers // parallel.vpp


def _student_pass(rank: _Rank) -> list[Moment]:
    w, recompute = rank.student, rank.config.model.recompute
    chunks, layers = microbatches_in_flight(rank)
    kept = _times(kept_by_layer(w, recompute), chunks * layers)
    below = _times(kept_by_layer(w, recompute), chunks * layers - 1)
    others = _times(kept_by_layer(w, recompute), (chunks - 1) * layers)
    rotation = {"rotary positions": {"cosines and sines": chunks * w.wide(w.head_dim)}}
    always = _teacher_rows(rank) | _teacher_head(rank) | _pipeline_buffers(rank) | rotation
    moments = []
    if rank.is_last:
        end = {"last hidden states": w.stream, "final norm": 3 * w.stream}
        if w.gathers:
            end["gathered hidden states"] = w.whole
        moments.append(
            Moment(
                "head",
                {"activations": kept | end, "head": head_bytes(rank.config.objective, rank.work.student.rows, w)},
            )
        )
    moments += [Moment("MLP backward", {"activations": below | one}) for one in mlp_backward(w, recompute)]
    lives, ring = attention_backward(w, recompute)
    moments.append(Moment("attention backward", {"activations": below | lives, "ring": ring}))
    if rank.is_first:
        moments.append(Moment("embedding backward", {"activations": others | _embedding_gradient(rank, w)}))
    return [moment.plus(always) for moment in moments]


def _embedding_gradient(rank: _Rank, w: Widths) -> Tensors:
    return {"gradient of embedded tokens": w.whole, "gradient of the embedding": w.vocab * w.hidden * w.value}


def _pipeline_buffers(rank: _Rank) -> dict[str, Tensors]:
    """The interleaved schedule receives a group of pp microbatches ahead, in both directions; 1F1B one microbatch."""
    parallel, stream = rank.config.parallel, rank.student.stream
    if parallel.pp == 1:
        return {}
    ahead = 1 if parallel.vpp is None else parallel.pp
    gradients = {} if parallel.vpp is None else {"received gradients": ahead * stream}
    return {"pipeline": {"received activations": ahead * stream} | gradients}


def _reduction(rank: _Rank) -> Moment:
    """gloo scatters a copy of a model chunk's gradients; NCCL works in place, and so does gloo's all-reduce."""
    copied = 0 if rank.is_cuda or not rank.config.optimizer.distributed else _largest_chunk(rank) * SINGLE
    return Moment("gradient reduction", {"communication": {"gloo's copy of gradients": copied}})


def _optimizer_step(rank: _Rank) -> Moment:
    """AdamW's denominators: of all tensors at once on CUDA, of one on a CPU; then parameters are gathered."""
    if rank.is_cuda:
        offloaded = rank.config.optimizer.cpu_offload
        roots = 0 if offloaded else rank.parameters // rank.cuts * SINGLE
        return Moment("optimizer step", {"optimizer": {"AdamW's square roots": roots}})
    tensor = max(rank.student.vocab, 2 * rank.student.ffn) * rank.student.hidden
    roots = 2 * min(tensor, rank.parameters // rank.cuts) * SINGLE
    gathered = _largest_chunk(rank) * rank.value if rank.config.optimizer.distributed else 0
    if gathered > roots:
        return Moment("parameters gathered", {"communication": {"gloo's copy of parameters": gathered}})
    return Moment("optimizer step", {"optimizer": {"AdamW's square root and denominator": roots}})


def _largest_chunk(rank: _Rank) -> int:
    """Parameters of the largest model chunk: DDP keeps a buffer for each."""
    counts = stage_parameters(rank.architecture, rank.config.parallel, rank.stage)
    if rank.config.parallel.vpp is None:
        return counts.total
    return counts.layers // rank.config.parallel.vpp + max(counts.embedding, counts.head)


def _times(tensors: Tensors, count: int) -> Tensors:
    return {f"{name} x {count}": size * count for name, size in tensors.items()}
