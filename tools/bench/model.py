"""The models of the benches, and the FLOPs that their passes take."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from transformers import Qwen3Config

from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture, read_architecture
from opsd_megatron.models.build import TreeModel, build_model, full_hidden, head_weight
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.mesh import Mesh, build_mesh
from opsd_megatron.token_tree import grow_tree
from opsd_megatron.types import TokenBatch


def add_model_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    sizes = {"layers": 4, "hidden": 256, "ffn": 768, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 4096}
    for name, default in {**sizes, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def qwen3_config(settings: argparse.Namespace) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=settings.layers,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        vocab_size=settings.vocab,
        max_position_embeddings=2**20,
        tie_word_embeddings=False,
    )


def architecture_of(settings: argparse.Namespace) -> Architecture:
    with tempfile.TemporaryDirectory() as directory:
        qwen3_config(settings).save_pretrained(directory)
        return read_architecture(Path(directory))


def build(settings: argparse.Namespace, cp: int = 1) -> tuple[TreeModel, Mesh, Architecture]:
    """The same random weights on every rank; bfloat16 on a GPU, float32 on a CPU."""
    mesh = build_mesh(ParallelConfig(cp=cp))
    architecture = architecture_of(settings)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    (model,) = build_model(architecture, mesh, dtype)
    return model, mesh, architecture


def batch_of(sequences: Sequence[Sequence[int]], responses: Sequence[int]) -> TokenBatch:
    """One forest of the sequences, each of which ends in so many response tokens (the last one a target only)."""
    grown = grow_tree([sequence[:-1] for sequence in sequences])
    rows = [torch.from_numpy(where[-count:]) for where, count in zip(grown.rows, responses, strict=True)]
    index = torch.arange(sum(responses))
    return TokenBatch(grown.tree, torch.from_numpy(grown.token_ids), torch.cat(rows), index)


def forward_backward(
    model: TreeModel, mesh: Mesh, shards: Sequence[ContextShard], targets: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Cross-entropy on the response tokens, its gradients, and both as figures that add up over cp ranks.

    `targets` are, for each shard, the response tokens in order of `response_index`.
    """
    total = 0.0
    for shard, answers in zip(shards, targets, strict=True):
        hidden = full_hidden(model(shard), mesh)[shard.rows]
        logits = (hidden @ head_weight(model).T).float()
        loss = functional.cross_entropy(logits, answers[shard.response_index], reduction="sum")
        loss.backward()
        total += loss.item()
    for parameter in model.parameters():
        parameter.grad = None
    return {"loss": total}


def forward_flops(architecture: Architecture, tokens: int, pairs: int, rows: int = 0) -> tuple[float, float]:
    """Of matrix products with weights and of attention over (query, key) pairs; backward takes 2 and 2.5 times that."""
    products = 2 * architecture.layer_weights * tokens * architecture.num_layers
    head = 2 * architecture.hidden_size * architecture.vocab_size * rows
    attention = 4 * architecture.heads * architecture.head_dim * pairs * architecture.num_layers
    return float(products + head), float(attention)
