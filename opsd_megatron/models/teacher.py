"""Whose distribution the student learns from: its own modules with other weights in them, or another model's modules.

No teacher has gradients or an optimizer. One that borrows the student's modules keeps its weights in host memory,
pinned on a GPU, while they wait.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from opsd_megatron import config as configs
from opsd_megatron.models.build import head_weight, unwrap
from opsd_megatron.models.forward import run_schedule
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.mesh import Mesh


@runtime_checkable
class Teacher(Protocol):
    """A view of weights."""

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        """The model chunks that compute with the teacher's weights inside; outside, always and bitwise, the student's
        chunks hold the student's."""
        ...

    def update(self) -> None:
        """Called once after each optimizer step, with the student's weights in place."""
        ...

    def head_weight(self) -> Float[Tensor, "vocab_shard hidden"] | None:
        """The teacher's LM head on the model's device, without gradient; None off the last pipeline stage."""
        ...

    def tensors(self) -> list[dict[str, Tensor]] | None:
        """What a checkpoint must keep and fill in place: per model chunk its weights by parameter name; or None."""
        ...


class LiveTeacher:
    """The student's current weights (OPSDL section 3.3)."""

    def __init__(self, chunks: Sequence[torch.nn.Module], mesh: Mesh):
        self._chunks, self._mesh = chunks, mesh

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        return nullcontext(self._chunks)

    def update(self) -> None:
        pass

    def head_weight(self) -> Tensor | None:
        return head_weight(self._chunks[-1]).detach() if self._mesh.is_last_stage else None

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return None


class FrozenTeacher:
    """The weights that the chunks have when the teacher is made: those that the run started from.

    Not part of a checkpoint: a resumed run makes it again, before it loads the student's state.
    """

    _at_least: torch.dtype | None = None
    """The teacher's weights are kept in the wider of this and the model's dtype."""

    def __init__(self, chunks: Sequence[torch.nn.Module], mesh: Mesh):
        self._chunks, self._mesh = chunks, mesh
        self._parameters = [dict(unwrap(chunk).named_parameters()) for chunk in chunks]
        self.weights = [_host_copies(named, self._at_least) for named in self._parameters]
        self._student = [_host_copies(named) for named in self._parameters]
        self.is_active = False

    @contextmanager
    def active(self) -> Iterator[Sequence[torch.nn.Module]]:
        if self.is_active:
            raise RuntimeError("the teacher is active already")
        self.is_active, replaced = True, []
        try:
            with torch.no_grad():
                for parameter, weight, student in self._triples():
                    student.copy_(parameter)
                    replaced.append((parameter, student))
                    parameter.copy_(weight)
            yield self._chunks
        finally:
            with torch.no_grad():
                for parameter, student in replaced:
                    parameter.copy_(student)
            self.is_active = False

    def update(self) -> None:
        pass

    def head_weight(self) -> Tensor | None:
        if not self._mesh.is_last_stage:
            return None
        head = head_weight(self._chunks[-1])
        return next(weight for parameter, weight, _ in self._triples() if parameter is head).to(head.device, head.dtype)

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return None

    def _triples(self) -> Iterator[tuple[Parameter, Tensor, Tensor]]:
        """Each parameter with the teacher's value and the place where the student's waits."""
        for named, weights, student in zip(self._parameters, self.weights, self._student, strict=True):
            for name, parameter in named.items():
                yield parameter, weights[name], student[name]


class EmaTeacher(FrozenTeacher):
    """An exponential moving average, kept in float32 (or float64) so that bfloat16 does not swallow small steps.

    teacher = (1 - rate) * teacher + rate * student after each step: a small rate is a slow teacher.
    """

    _at_least = torch.float32

    def __init__(self, chunks: Sequence[torch.nn.Module], mesh: Mesh, rate: float):
        super().__init__(chunks, mesh)
        self.rate = rate

    def update(self) -> None:
        if self.is_active:
            raise RuntimeError("the teacher is active: its average would be taken with itself")
        with torch.no_grad():
            for parameter, weight, _ in self._triples():
                average = weight.to(parameter.device)
                average.lerp_(parameter.to(average.dtype), self.rate)
                weight.copy_(average)

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return self.weights


class OtherTeacher:
    """Modules of their own, cut over the student's vocabulary ranges, so that row i of both heads is the same token."""

    def __init__(self, chunks: Sequence[torch.nn.Module], mesh: Mesh):
        self._chunks, self._mesh = [chunk.requires_grad_(False).eval() for chunk in chunks], mesh

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        return nullcontext(self._chunks)

    def update(self) -> None:
        pass

    def head_weight(self) -> Tensor | None:
        return head_weight(self._chunks[-1]) if self._mesh.is_last_stage else None

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return None


def build_teacher(
    config: configs.LiveTeacher | configs.FrozenTeacher | configs.EmaTeacher,
    chunks: Sequence[torch.nn.Module],
    mesh: Mesh,
) -> Teacher:
    """The teacher over loaded chunks, wrapped in DDP or not; frozen and ema start as copies of their weights."""
    match config:
        case configs.LiveTeacher():
            return LiveTeacher(chunks, mesh)
        case configs.FrozenTeacher():
            return FrozenTeacher(chunks, mesh)
        case configs.EmaTeacher(rate):
            return EmaTeacher(chunks, mesh, rate)


def score(
    chunks: Sequence[torch.nn.Module], shards: Sequence[ContextShard], mesh: Mesh
) -> Float[Tensor, "rows hidden"] | None:
    """Hidden states, without gradient, of the shards' response rows in shard order; None off the last stage.

    Weights are those that are active. The shards are dealt over `Axis.single("cp")`: each cp rank scores its own
    samples, and cp ranks may have different numbers of them.
    """
    rows = run_schedule(chunks, shards, mesh, lambda index, hidden: hidden[shards[index].rows], forward_only=True)
    return torch.cat(rows) if mesh.is_last_stage else None


def _host_copies(named: Mapping[str, Parameter], at_least: torch.dtype | None = None) -> dict[str, Tensor]:
    copies = {}
    for name, value in named.items():
        dtype = value.dtype if at_least is None else torch.promote_types(value.dtype, at_least)
        copies[name] = torch.empty(value.shape, dtype=dtype, device="cpu", pin_memory=value.is_cuda)
        copies[name].copy_(value.detach())
    return copies
