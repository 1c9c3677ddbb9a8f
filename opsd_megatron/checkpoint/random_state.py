"""The random generators of one rank, saved and put back."""

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def capture() -> dict[str, Any]:
    """Python's, numpy's, torch's, the GPU's and Megatron's tracked generators."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(_tracker().get_states()),
    }


def restore(state: dict[str, Any]) -> None:
    """Puts back what `capture` returned, exactly."""
    random.setstate(_tuples(state["python"]))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(dict(state["megatron"]))


def derive(seed: int, step: int, rank: int) -> None:
    """New, reproducible generators for a rank of a layout that the checkpoint does not know."""
    mixed = (seed * 1_000_003 + step) % 2**31
    random.seed(mixed + rank)
    numpy.random.seed((mixed + rank) % 2**32)
    torch.manual_seed(mixed + rank)
    model_parallel_cuda_manual_seed(mixed, force_reset_rng=True)


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value
