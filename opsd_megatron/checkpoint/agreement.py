"""One rank's failure made every rank's failure, so that nobody waits in a collective for a rank that gave up."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from opsd_megatron.errors import UserError

Result = TypeVar("Result")


def raise_on_all(error: Exception | None) -> None:
    """Collective over the world. Nothing where no rank failed; else every rank raises.

    A UserError is raised as it is everywhere; any other exception keeps its own traceback on its rank and is a
    RuntimeError elsewhere.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    told = None if error is None else (str(error), type(error) if isinstance(error, UserError) else None)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    if error is not None:
        raise error
    for rank, told in enumerate(everyone):
        if told is not None:
            message, user_error = told
            raise user_error(message) if user_error else RuntimeError(f"rank {rank} failed: {message}")


def together(action: Callable[[], Result]) -> Result:
    """What `action` returns on this rank, once it has succeeded on all ranks. It must not communicate itself."""
    error, result = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    raise_on_all(error)
    return result  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], object]) -> None:
    """Runs `action` on global rank 0 only; raises everywhere if it fails there."""
    together(action if not dist.is_initialized() or dist.get_rank() == 0 else lambda: None)
