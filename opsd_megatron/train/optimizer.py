"""Megatron's DDP and optimizer around the model chunks, the learning-rate schedule, and a step that refuses NaN."""

import math
from typing import Any

import torch

from opsd_megatron.config import OptimizerConfig
from opsd_megatron.models.build import TreeModel
from opsd_megatron.parallel.mesh import Mesh

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads  # isort: skip
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # isort: skip


def make_trainable(
    chunks: list[TreeModel], mesh: Mesh, config: OptimizerConfig, dtype: torch.dtype
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """The chunks wrapped in Megatron's DDP, and the optimizer over them.

    Gradients are summed over dp x cp in float32 and divided once, by the global token count
    (`finalize_model_grads` under `calculate_per_token_loss`).
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
    )
    wrapped: list[Any] = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=mesh.collection,
        )
        for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        _megatron_config(config, dtype), wrapped, use_gloo_process_groups=False, pg_collection=mesh.collection
    )
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = optimizer.scale_loss
        if config.overlap_grad_reduce:  # the schedules hold reductions back until a chunk's last microbatch
            no_sync = [one.no_sync for one in wrapped]
            chunk.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped, optimizer


def _megatron_config(config: OptimizerConfig, dtype: torch.dtype) -> MegatronOptimizerConfig:
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
        optimizer_cpu_offload=config.cpu_offload,
        optimizer_offload_fraction=1.0 if config.cpu_offload else 0.0,
    )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * left if config.schedule != "constant" else config.lr


def apply_gradients(optimizer: MegatronOptimizer, rate: float) -> tuple[float, bool]:
    """(global gradient norm before clipping, whether the weights moved): a non-finite norm leaves them alone."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    outcome = optimizer.step()
    return norm, bool(outcome and outcome[0])
