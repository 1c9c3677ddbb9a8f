"""Parameters of a model and of one rank's share, by counting."""

from dataclasses import dataclass

from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture, padded_vocab


def count_parameters(architecture: Architecture) -> int:
    """Of the whole model, as its Hugging Face files hold it."""
    a = architecture
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tied else 2)
    return a.num_layers * layer_parameters(a, tp=1) + embeddings + a.hidden_size


def layer_parameters(architecture: Architecture, tp: int) -> int:
    """Of one layer on one tp rank: matrices and biases are cut, norms are not."""
    a = architecture
    biases = (a.heads + 2 * a.kv_heads) * a.head_dim if a.qkv_bias else 0
    norms = 2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0)
    return (a.layer_weights + biases) // tp + norms


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters on one rank of a pipeline stage."""

    layers: int
    embedding: int
    """Token embedding, on the first stage."""
    head: int
    """LM head and final norm, on the last stage; with tied weights a copy of the embedding unless that is there."""

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.head


def stage_parameters(architecture: Architecture, parallel: ParallelConfig, stage: int) -> StageParameters:
    a = architecture
    matrix = padded_vocab(a, parallel.tp) // parallel.tp * a.hidden_size
    is_first, is_last = stage == 0, stage == parallel.pp - 1
    own_head = 0 if a.tied and is_first else matrix
    return StageParameters(
        layers=a.num_layers // parallel.pp * layer_parameters(a, parallel.tp),
        embedding=matrix if is_first else 0,
        head=own_head + a.hidden_size if is_last else 0,
    )
