"""Ranks as processes forked from one server that has imported everything: starting Python and its imports costs
seconds a process, a fork milliseconds.

`run_on_ranks(world_size, function, *arguments)` runs a module-level function on every rank of a gloo group that is
kept for the next call, and returns their results in rank order. A function that raises on any rank fails the test with
that rank's traceback, and the group is made anew. `Job` is a script run on several ranks, as torchrun would run it.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opsd_megatron.parallel.mesh import close_groups

TIMEOUT_S = float(os.environ.get("OPSD_TEST_RANK_TIMEOUT_S", "300"))
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preload"])
_pools: dict[int, "RankPool"] = {}  # the one that ran last is last


def run_on_ranks(world_size: int, function, *arguments) -> list[Any]:
    if _pools and (before := next(reversed(_pools))) != world_size:
        _pools[before].run(close_groups)  # the idle threads of four pools' groups took a third of both cores
    pool = _pools.pop(world_size, None) or RankPool(world_size)
    _pools[world_size] = pool
    return pool.run(function, *arguments)


def forked(function, *arguments) -> Any:
    """A process that runs a module-level function, started."""
    process = _forks.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


class RankPool:
    """`world_size` processes joined by one gloo process group, waiting for functions to run."""

    def __init__(self, world_size: int):
        # the parent holds the store: a port that was only looked up could be taken by somebody else meanwhile
        self.store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self.world_size = world_size
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = _forks.Pipe()
            process = _forks.Process(target=_serve, args=(rank, world_size, self.store.port, theirs), daemon=True)
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
        _kill(self.processes)


class Job:
    """`script` with `flags` on `ranks` ranks; stdout and stderr are appended to `log`.

    Ends as torchrun ends it: with 0 when every rank has, else with the first failure's exit code and no rank left.
    """

    def __init__(self, script: Path, ranks: int, flags: Sequence[str], log: Path, environment: dict[str, str]):
        self._store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        # the ranks connect to our store, and none of them opens one of its own
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        arguments = (script, tuple(flags), log, environment)
        self._processes = [
            _forks.Process(target=_run_script, args=(rank, *arguments), daemon=True) for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        codes = [process.exitcode for process in self._processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            _kill(self._processes)
        return failed if failed is not None or None in codes else 0

    def wait(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the job did not end within {timeout_s:.0f} s")
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        """SIGTERM to every rank, as a cluster that wants its nodes back."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        _kill(self._processes)


def _kill(processes) -> None:
    for process in processes:
        process.kill()
    for process in processes:
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


def _run_script(rank: int, script: Path, flags: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(log.parent)
    torch.set_num_threads(1)
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()
