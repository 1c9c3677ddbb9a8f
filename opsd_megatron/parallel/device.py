"""Where the model lives, and the one place that lets megatron-core 0.16.1 run without CUDA.

Core writes `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()` and `"torch.cuda.FloatTensor"` into the
functions of a few modules. On a machine without CUDA `install` respells exactly those names inside the compiled
functions of exactly those modules: `torch.cpu.current_device()`, `device="cpu"`, `tensor.cpu()`,
`"torch.FloatTensor"`. torch itself is not touched: outside these modules everything stays as it was.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType

import torch

_CORE = "megatron.core."
_RESPELLED = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_MODULES = (
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.utils",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "models.common.language_module.language_module",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "rerun_state_machine",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
)
_IN_UTILS = ("GlobalMemoryBuffer", "local_multi_tensor_l2_norm")
"""The rest of core/utils.py asks questions about CUDA that must keep their answers."""
_installed = False


def install() -> None:
    """Makes core run on CPU and gloo; does nothing where CUDA is available or on a second call.

    Call it before the first import of megatron (RuntimeError otherwise): what a module made of the old names while it
    was imported could no longer be mended.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    if imported := sorted(name for name in sys.modules if name.startswith("megatron.")):
        raise RuntimeError(
            f"{imported[0]} was imported before opsd_megatron.parallel.device.install(); call install() first"
        )
    with _no_compiling():
        modules = [importlib.import_module(_CORE + name) for name in _MODULES]
    for module in modules:
        for function in _functions(module):
            _respell(function, _RESPELLED)
    for function in _functions(importlib.import_module(_CORE + "utils"), _IN_UTILS):
        _respell(function, _RESPELLED)
    _install_random_states()
    _installed = True


def device() -> torch.device:
    """cpu, or this rank's GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    """torch.distributed's backend for `device()`: gloo or nccl."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def _no_compiling() -> Iterator[None]:
    """Core's jit_fuser is torch.compile (core/jit.py); without CUDA that wants a C++ compiler and half the start-up."""
    kept, torch.compile = torch.compile, lambda function: function
    try:
        yield
    finally:
        torch.compile = kept


def _functions(owner: ModuleType | type, only: tuple[str, ...] | None = None) -> Iterator[FunctionType]:
    """Every function written in a module or class, methods too, without their decorators; or those named in `only`."""
    home = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for name, member in list(vars(owner).items()):
        if only is not None and name not in only:
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, type):
            if isinstance(owner, ModuleType) and member.__module__ == home:
                yield from _functions(member)
        elif callable(member) and getattr(member, "__module__", None) == home:
            inner = inspect.unwrap(member)
            if isinstance(inner, FunctionType):
                yield inner


def _respell(function: FunctionType, words: dict[str, str]) -> None:
    function.__code__ = _respelled(function.__code__, words)


def _respelled(code: CodeType, words: dict[str, str]) -> CodeType:
    def constant(value):
        if isinstance(value, str):
            return words.get(value, value)
        if isinstance(value, CodeType):
            return _respelled(value, words)
        if isinstance(value, tuple | frozenset):
            return type(value)(constant(entry) for entry in value)
        return value

    names = tuple(words.get(name, name) for name in code.co_names)
    return code.replace(co_consts=tuple(constant(value) for value in code.co_consts), co_names=names)


def _install_random_states() -> None:
    """Core's tracker of random states then swaps the CPU generator, which is what draws on a CPU."""
    from megatron.core.tensor_parallel import random

    def get_state(device=None, clone=False, graph_safe=False):
        return torch.random.get_rng_state()

    def set_state(new_state, device=-1, graph_safe=False):
        torch.random.set_rng_state(new_state)

    for function in _functions(random):
        _respell(function, {"cuda": "random"})  # torch.cuda.manual_seed, torch.cuda.get_rng_state
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
