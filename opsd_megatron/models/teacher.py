"""Whose distribution the student learns from: its own modules with other weights in them, or another model's modules.

No teacher has gradients or an optimizer. One that borrows the student's modules keeps its weights in host memory,
pinned on a GPU, while they wait.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opsd_megatron import config as configs
from opsd_megatron.models.build import head_weight, unwrap
from opsd_megatron.models.forward import run_schedule
from opsd_megatron.models.swap import Exchange, buckets_of
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
        named = [dict(unwrap(chunk).named_parameters()) for chunk in chunks]
        self.buckets = buckets_of([parameter for one in named for parameter in one.values()], self._at_least)
        self._exchange = Exchange(self.buckets)
        values = (value for bucket in self.buckets for _, value in bucket.pairs())
        self.weights = [{name: next(values) for name in one} for one in named]
        self.is_active = False

    @contextmanager
    def active(self) -> Iterator[Sequence[torch.nn.Module]]:
        if self.is_active:
            raise RuntimeError("the teacher is active already")
        self.is_active = True
        try:
            with self._exchange.shown():
                yield self._chunks
        finally:
            self.is_active = False

    def update(self) -> None:
        pass

    def head_weight(self) -> Tensor | None:
        if not self._mesh.is_last_stage:
            return None
        head = head_weight(self._chunks[-1])
        pairs = (pair for bucket in self.buckets for pair in bucket.pairs())
        return next(value for parameter, value in pairs if parameter is head).to(head.device, head.dtype)

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return None


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
            for bucket in self.buckets:
                bucket.average(self.rate)

    def tensors(self) -> list[dict[str, Tensor]] | None:
        return self.weights


class OtherTeacher:
    """Modules of their own, cut over the student's vocabulary ranges, so that row i of both heads is the same token."""

    def __init__(self, chunks: Sequence[torch.nn.Module], mesh: Mesh):
        self.chunks, self._mesh = [chunk.requires_grad_(False).eval() for chunk in chunks], mesh

    def active(self) -> AbstractContextManager[Sequence[torch.nn.Module]]:
        return nullcontext(self.chunks)

    def update(self) -> None:
        pass

    def head_weight(self) -> Tensor | None:
        return head_weight(self.chunks[-1]) if self._mesh.is_last_stage else None

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
