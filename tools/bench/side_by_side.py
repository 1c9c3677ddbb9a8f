"""Contenders measured fairly: each in a process of its own, their runs interleaved, medians, the ratio last.

A contender is a module-level function that prepares everything and returns what is to be timed. The first run is a
warm-up and is not counted. Memory is the peak above what was held when everything was prepared: resident memory on a
CPU, allocated memory on a GPU.
"""

import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Run = Callable[[], Mapping[str, float]]
"""One timed run; returns figures that show that all contenders compute the same (a loss, a norm)."""
Prepare = Callable[[Any], Run]
"""(settings) -> Run; called in the contender's own process. ImportError says that a peer is not installed."""


@dataclass(frozen=True)
class Figures:
    """What one contender showed."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Of every counted run, in order."""
    peak_mib: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    """Of the last run."""
    missing: str = ""
    """Why it was not measured."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(contenders: Mapping[str, Prepare], settings: Any, repeats: int = 5, threads: int = 1) -> list[Figures]:
    """Figures of every contender; run i of each comes before run i + 1 of any, so that all meet the same machine."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, prepare in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(prepare, settings, threads, theirs))
        process.start()
        theirs.close()
        workers[name] = process, ours
    try:
        missing = {name: _receive(name, pipe) for name, (_, pipe) in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        values: dict[str, dict[str, float]] = {}
        for number in range(repeats + 1):
            for name, (_, pipe) in workers.items():
                if missing[name]:
                    continue
                pipe.send(number)
                taken, values[name] = _receive(name, pipe)
                if number:
                    seconds[name].append(taken)
        figures = []
        for name, (_, pipe) in workers.items():
            pipe.send(None)
            if missing[name]:
                figures.append(Figures(name, missing=missing[name]))
            else:
                figures.append(Figures(name, seconds[name], _receive(name, pipe), values[name]))
        return figures
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()


def _receive(name: str, pipe) -> Any:
    try:
        ok, value = pipe.recv()
    except EOFError:
        raise SystemExit(f"{name}: its process ended without a word; what it said is above") from None
    if not ok:
        raise SystemExit(f"{name}: {value}")
    return value


def _serve(prepare: Prepare, settings: Any, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        run = prepare(settings)
    except ImportError as error:
        pipe.send((True, f"not installed: {error}"))
        pipe.recv()
        return
    pipe.send((True, ""))
    held = _reset_peak()
    while pipe.recv() is not None:
        _synchronize()
        started = time.perf_counter()
        values = dict(run())
        _synchronize()
        pipe.send((True, (time.perf_counter() - started, values)))
    pipe.send((True, (_peak_bytes() - held) / 2**20))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> int:
    """Forgets the peak so far and returns the bytes that are held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def report(title: str, settings: Any, figures: list[Figures], output: Path | None = None) -> None:
    """The table, this project first and the ratio of the others to it last; the same as JSON in `output`."""
    ours = figures[0]
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in versions().items()))
    names = list(ours.values)
    for column in ("", *names, "min s", "median s", "peak MiB", "time / ours", "memory / ours"):
        table.add_column(column, justify="right" if column else "left")
    for one in figures:
        if one.missing:
            table.add_row(one.name, one.missing)
            continue
        shown = [f"{one.values[name]:.8g}" if name in one.values else "" for name in names]
        memory = f"{one.peak_mib / ours.peak_mib:.2f}" if ours.peak_mib >= 1 else ""
        ratios = [f"{one.median_s / ours.median_s:.2f}", memory]
        table.add_row(
            one.name, *shown, f"{min(one.seconds):.3f}", f"{one.median_s:.3f}", f"{one.peak_mib:.0f}", *ratios
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(one) for one in figures]
        record = {"title": title, "settings": vars(settings), "versions": versions(), "figures": rows}
        output.write_text(json.dumps(record, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in ("megatron-core", "transformers", "liger-kernel", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
