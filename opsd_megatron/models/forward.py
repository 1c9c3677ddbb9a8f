"""Microbatches through Megatron's pipeline schedules: none, 1F1B and interleaved, with sizes that differ."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from opsd_megatron.models.build import full_hidden, unwrap
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.mesh import Mesh

OnHidden = Callable[[int, Tensor], Any]


def microbatch_multiple(mesh: Mesh) -> int:
    """The number of microbatches of a pass must be a multiple of this: the interleaved schedule works in groups."""
    return mesh.pp.size if mesh.vpp else 1


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    shards: Sequence[ContextShard],
    mesh: Mesh,
    on_hidden: OnHidden,
    forward_only: bool,
) -> list[Any]:
    """What `on_hidden` gave for each microbatch, in order, on the last stage; an empty list on other stages.

    `shards` are this cp rank's parts of all microbatches; tp ranks and pipeline stages of one cp rank pass the same.
    `chunks` may be wrapped in Megatron's DDP. On the last stage `on_hidden(microbatch, hidden [local_tokens, hidden])`
    is called, with hidden states after the final norm, equal on all tp ranks. In training it returns (loss, count,
    metrics, ...): the sum of this rank's token losses, their number, and tensors to report; what is kept of these is a
    detached copy, because the schedule writes into the loss's memory. Gradients are summed over
    microbatches, and core's `finalize_model_grads_func`, if set, divides by the count of all ranks.
    """
    if not shards or len(shards) % microbatch_multiple(mesh):
        raise ValueError(
            f"{len(shards)} microbatches; expected a positive multiple of {microbatch_multiple(mesh)} "
            f"(pp={mesh.pp.size}, vpp={mesh.vpp}): add filler microbatches"
        )

    if mesh.sequence_parallel and (odd := [s.local_tokens for s in shards if s.local_tokens % mesh.tp.size]):
        raise ValueError(
            f"{odd[0]} local tokens cannot be cut over tp={mesh.tp.size} ranks for sequence parallelism; "
            f"deal the batch with multiple_of={mesh.tp.size}"
        )

    def forward_step(microbatches: Iterator[tuple[int, ContextShard]], model: torch.nn.Module):
        index, shard = next(microbatches)
        return model(shard), _loss_function(index, mesh, on_hidden)

    arguments: dict[str, Any] = {"pg_collection": mesh.collection}
    if mesh.pp.size > 1:
        arguments["p2p_communicator"] = P2PCommunicator(mesh.collection.pp, unwrap(chunks[0]).config)
    with torch.no_grad() if forward_only else nullcontext():
        return get_forward_backward_func(mesh.pp.size, mesh.vpp)(
            forward_step_func=forward_step,
            data_iterator=[iter(enumerate(shards)) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(shards),
            seq_length=shards[0].local_tokens,  # unused: lengths travel with the activations
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **arguments,
        )


def _loss_function(index: int, mesh: Mesh, on_hidden: OnHidden):
    def on_output(output: Tensor, non_loss_data: bool = False):
        result = on_hidden(index, full_hidden(output, mesh))
        if non_loss_data:
            return result
        loss, count, metrics = result[:3]
        kept = {name: value.detach().clone() for name, value in metrics.items()}
        return loss, torch.as_tensor(count, dtype=torch.int, device=loss.device), kept

    return on_output
