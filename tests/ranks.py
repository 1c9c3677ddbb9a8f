"""A persistent pool of gloo ranks per world size: spawning costs seconds, a task costs milliseconds.

`run_on_ranks(world_size, function, *arguments)` runs a module-level function on every rank and returns their results
in rank order. A function that raises on any rank fails the test with that rank's traceback, and the pool is rebuilt.
"""

import atexit
import os
import traceback
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT_S = float(os.environ.get("OPSD_TEST_RANK_TIMEOUT_S", "300"))
_pools: dict[int, "RankPool"] = {}


def run_on_ranks(world_size: int, function, *arguments) -> list[Any]:
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size].run(function, *arguments)


class RankPool:
    """`world_size` processes joined by one gloo process group, waiting for functions to run."""

    def __init__(self, world_size: int):
        context = multiprocessing.get_context("spawn")
        # the parent holds the store: a port that was only looked up could be taken by somebody else meanwhile
        self.store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self.world_size = world_size
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *arguments) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if failures:
                break  # the other ranks may wait for the one that failed
            ok, value = self._receive(rank, pipe)
            (results if ok else failures).append(value)
        if failures:
            self.close()
            _pools.pop(self.world_size, None)
            raise AssertionError(f"rank {len(results)} of {self.world_size} failed:\n{failures[0]}")
        return results

    def _receive(self, rank: int, pipe):
        try:
            if not pipe.poll(TIMEOUT_S):
                return False, f"rank {rank} did not answer within {TIMEOUT_S:.0f} s{self._first_failure()}"
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            return False, f"rank {rank} died{self._first_failure()}"

    def _first_failure(self) -> str:
        for rank, pipe in enumerate(self.pipes):
            try:
                if pipe.poll(0) and not (message := pipe.recv())[0]:
                    return f"; rank {rank} raised:\n{message[1]}"
            except (EOFError, ConnectionResetError):
                continue
        return ""

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(rank: int, world_size: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
