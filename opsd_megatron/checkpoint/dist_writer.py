"""Megatron's distributed checkpoint writer, run inside the process that saves.

Core 0.16.1 forks one process per file, counts their results through a spawned manager process and waits for ever when
a writer dies (strategies/filesystem_async.py). It also needs the main module to be importable twice. Here the same
writing function runs in this process: an error is an exception on every rank, and there is nobody else to wait for.
"""

import queue
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_finalize
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class InProcessWriter(TorchDistSaveShardedStrategy):
    """Save strategy `torch_dist` with one file per rank and no helper processes."""

    def __init__(self):
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        # Core takes this queue as it finds it, and starts its manager process only where there is none.
        filesystem_async._results_queue = queue.SimpleQueue()
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: tuple) -> AsyncRequest:
        return AsyncRequest(
            partial(_write_here, writer), (), [partial(save_state_dict_async_finalize, *save_state_dict_ret)]
        )


def _write_here(writer: Any) -> None:
    """Leaves in the writer's queue what core's processes would: results per bucket, or the first exception."""
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    results: dict[int, list] = {}
    for number, bucket in enumerate(writer.preload_tensors(writer.write_buckets, non_blocking=False)):
        outcomes, pending = queue.SimpleQueue(), queue.Queue()
        pending.put(number)
        writer.write_preloaded_data(transforms, number, bucket, outcomes, pending, use_fsync=True)
        _, outcome = outcomes.get_nowait()
        if isinstance(outcome, Exception):
            writer.results_queue.put(outcome)
            return
        results[number] = outcome
    if writer.results_queue is not None:
        writer.results_queue.put(results)
