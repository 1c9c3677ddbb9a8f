"""Contenders of several gloo ranks, each a process with one thread."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from side_by_side import Prepare, Run


def on_ranks(size: int, prepare: Prepare, settings: Any) -> Run:
    """One run on `size` ranks at once, of which this process is the first; what they return is summed over them."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    pipes = []
    for rank in range(1, size):
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(rank, size, store.port, prepare, settings, theirs), daemon=True).start()
        pipes.append(ours)
    run = _join(0, size, store, prepare, settings)
    for pipe in pipes:
        pipe.recv()

    def run_all() -> Mapping[str, float]:
        for pipe in pipes:
            pipe.send(None)
        values = dict(run())
        for pipe in pipes:
            for name, value in pipe.recv().items():
                values[name] += value
        return values

    return run_all


def _serve(rank: int, size: int, port: int, prepare: Prepare, settings: Any, pipe) -> None:
    run = _join(rank, size, dist.TCPStore("127.0.0.1", port, None, is_master=False), prepare, settings)
    pipe.send({})
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(dict(run()))


def _join(rank: int, size: int, store: dist.Store, prepare: Prepare, settings: Any) -> Run:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return prepare(settings)
