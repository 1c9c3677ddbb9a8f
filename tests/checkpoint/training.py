"""A model with Megatron's real DDP and optimizer, trained on gradients that are a function of the weights.

Such gradients are the same under every layout without a forward pass, and zero in rows beyond the vocabulary.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.checkpoint.model_weights import export_weights, load_weights, named_parameters
from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture, read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import Mesh, build_mesh
from tests.tiny_models import write_tiny_model

# after the project's own modules, which make core run without CUDA
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # isort: skip

PLAIN = {"distributed": False}
DISTRIBUTED = {"distributed": True}
BF16 = {"distributed": True, "dtype": torch.bfloat16}
BF16_PLAIN = {"distributed": False, "dtype": torch.bfloat16}


@dataclass
class Training:
    mesh: Mesh
    architecture: Architecture
    chunks: list[DistributedDataParallel]
    optimizer: Any

    def step(self) -> None:
        for parameter in named_parameters(self.chunks).values():
            parameter.main_grad.copy_(torch.sin(3 * parameter.detach().float()))
        moved, _, _ = self.optimizer.step()
        assert moved

    def weights(self) -> dict[str, Tensor | None]:
        return self.export(lambda parameter: parameter.data)

    def states(self) -> dict[str, dict[str, Tensor | None]]:
        """Whole optimizer tensors by kind, then by Hugging Face name, on global rank 0."""
        inner = self.optimizer.chained_optimizers[0]
        gathered = {name: self._state(inner, p) for name, p in named_parameters(self.chunks).items()}
        of = {id(p): gathered[name] for name, p in named_parameters(self.chunks).items()}
        kinds = next(iter(gathered.values()))
        return {kind: self.export(lambda parameter, kind=kind: of[id(parameter)][kind]) for kind in kinds}

    def _state(self, inner: Any, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        if not hasattr(inner, "gbuf_ranges"):
            main = getattr(parameter, "main_param", parameter)
            return {"param": main.detach(), **self._without_step(inner.optimizer.state[main])}
        whole = {
            kind: torch.zeros(parameter.numel(), dtype=torch.float32) for kind in ("param", "exp_avg", "exp_avg_sq")
        }
        if parameter in inner.model_param_gbuf_map:
            bounds = inner._get_model_param_range_map(parameter)["param"]
            for kind, shard in self._without_step(inner._get_main_param_and_optimizer_states(parameter)).items():
                whole[kind][bounds.start : bounds.end] = shard.detach()
        if self.mesh.dp_cp.size > 1:
            for tensor in whole.values():
                dist.all_reduce(tensor, group=self.mesh.dp_cp.group)
        return {kind: tensor.view(parameter.shape) for kind, tensor in whole.items()}

    @staticmethod
    def _without_step(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {kind: tensor for kind, tensor in state.items() if kind != "step"}

    def export(self, value_of: Callable) -> dict[str, Tensor | None]:
        return {
            name: None if tensor is None else tensor.clone()
            for name, tensor in export_weights(self.chunks, self.architecture, self.mesh, value_of=value_of)
        }


def start(directory: Path, layout: ParallelConfig, *, distributed: bool, dtype=torch.float32, bucket_size=None):
    """A Training at step 0 with the weights of `directory`."""
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    models = build_model(architecture, mesh, dtype)
    load_weights(models, architecture, directory, mesh)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=bucket_size is not None,
        bucket_size=bucket_size,
    )
    chunks = [
        DistributedDataParallel(
            model.config, ddp, model, disable_bucketing=index > 0 and bucket_size is None, pg_collection=mesh.collection
        )
        for index, model in enumerate(models)
    ]
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=mesh.collection)
    return Training(mesh, architecture, chunks, optimizer)


def write_start(directory: Path) -> Path:
    """249 rows: another number of padding rows for tp 1 and tp 2. Tied, so that a last stage holds a copy."""
    return write_tiny_model(directory, "qwen3", vocab_size=249, tie_word_embeddings=True)


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def train_and_save(directory, out, layout, options, steps=2):
    """(weights, optimizer states) at the save, then weights and random draws two steps later."""
    training = start(directory, layout, **options)
    for _ in range(steps):
        training.step()
    save_state(
        out, steps, training.chunks, training.architecture, training.mesh,
        optimizer=training.optimizer, extra={"position": [3, 4]},
    )  # fmt: skip
    saved = training.weights(), training.states()
    numbers = draws()
    training.step()
    training.step()
    return *saved, training.weights(), training.states(), numbers


def resume(directory, out, layout, options):
    training = start(directory, layout, **options)
    restored = load_state(
        out, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer, seed=7
    )
    loaded = training.weights(), training.states()
    numbers = draws()
    training.step()
    training.step()
    return *loaded, training.weights(), training.states(), numbers, restored
