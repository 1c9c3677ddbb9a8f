"""The model of this rank: Megatron's GPTModel over token trees, one per model chunk, ending in hidden states."""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture, check_layout, padded_vocab
from opsd_megatron.models.attention import EngineAttention, ShardCarrier, TreeAttention
from opsd_megatron.models.norm import NormRecomputingLayer, RecomputedRmsNorm, RmsNorm
from opsd_megatron.models.rotary import TreeRotary, attention_factor
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.mesh import Mesh

Recompute = Literal["none", "norms", "mlp", "mlp+norms", "full"]
Attention = Literal["ring", "te"]


class TreeModel(GPTModel):
    """One chunk of the network. `model(shard)` gives activations for the next chunk, or final hidden states.

    Shapes: [local_tokens, 1, hidden]; under sequence parallelism each tp rank holds its share of the tokens. The last
    chunk's output is after the final norm; the LM head's weight is there (`head_weight`) but is not applied.
    """

    def __init__(
        self,
        architecture: Architecture,
        mesh: Mesh,
        config: TransformerConfig,
        chunk: int | None,
        recompute: Recompute,
        attention: Attention,
    ):
        number = mesh.pp.rank + (chunk or 0) * mesh.pp.size
        super().__init__(
            config,
            block_spec(config, mesh, chunk, recompute, attention),  # type: ignore[arg-type]  # core takes it, its annotation does not
            vocab_size=padded_vocab(architecture, mesh.tp.size),
            max_sequence_length=architecture.max_positions,
            pre_process=number == 0,
            post_process=number == mesh.pp.size * (mesh.vpp or 1) - 1,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="none",  # TreeAttention rotates
            pg_collection=mesh.collection,
            vp_stage=chunk,
        )
        self.architecture = architecture
        self.rotary = TreeRotary(architecture.rope, architecture.head_dim)

    def forward(self, shard: ContextShard, embedded: Tensor | None = None) -> Float[Tensor, "tokens 1 hidden"]:
        """`embedded` [tokens, 1, hidden] takes the place of the token ids' embedding."""
        carrier = ShardCarrier(shard=shard, rotation=self.rotary(shard.position_ids, self.config.params_dtype))
        ids = shard.token_ids[None]
        return super().forward(ids, None, None, decoder_input=embedded, packed_seq_params=carrier)  # type: ignore[arg-type]

    def _postprocess(self, hidden_states: Tensor, **unused) -> Tensor:
        return hidden_states


def build_model(
    architecture: Architecture,
    mesh: Mesh,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    attention: Attention = "ring",
) -> list[TreeModel]:
    """This rank's model chunks, first to last, on the mesh's device, with random weights until a checkpoint is loaded.

    Raises:
        ConfigError: the layout does not divide the network, or `attention` is not installed.
    """
    layout = ParallelConfig(mesh.tp.size, mesh.pp.size, mesh.vpp, mesh.cp.size, mesh.sequence_parallel)
    check_layout(architecture, layout)
    config = transformer_config(architecture, mesh, dtype, recompute)
    stages = [None] if mesh.vpp is None else list(range(mesh.vpp))
    return [TreeModel(architecture, mesh, config, chunk, recompute, attention) for chunk in stages]


def transformer_config(
    architecture: Architecture, mesh: Mesh, dtype: torch.dtype, recompute: Recompute = "none"
) -> TransformerConfig:
    """Megatron's config of this network on this mesh."""
    mlp = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = {"none": {}, "norms": {}, "mlp": mlp, "mlp+norms": mlp, "full": full}  # norms: see block_spec
    # the interleaved schedule is wrong without an error with core's default of batched transfers: with two stages the
    # previous and the next rank are the same and receives swap (core/pipeline_parallel/p2p_communication.py, 0.16.1)
    interleaved = {} if mesh.vpp is None else {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        softmax_scale=attention_factor(architecture.rope) ** 2 * architecture.head_dim**-0.5,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp.size,
        pipeline_model_parallel_size=mesh.pp.size,
        virtual_pipeline_model_parallel_size=mesh.vpp,
        context_parallel_size=mesh.cp.size,
        sequence_parallel=mesh.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=mesh.device.type == "cpu",
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # core wants it for variable lengths, without experts too
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        **interleaved,
        **recomputed[recompute],
    )


def block_spec(
    config: TransformerConfig, mesh: Mesh, chunk: int | None, recompute: Recompute, attention: Attention
) -> TransformerBlockSubmodules:
    """The modules of this chunk's layers: core's local ones, with our norm and attention.

    The one place that chooses between kinds of layers.
    """
    layer: Any = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    norm = RmsNorm
    if recompute in ("norms", "mlp+norms"):
        layer.module, norm = NormRecomputingLayer, RecomputedRmsNorm
    own = layer.submodules.self_attention
    core = {"ring": TreeAttention, "te": EngineAttention}[attention]
    norms = {"q_layernorm": RmsNorm, "k_layernorm": RmsNorm} if config.qk_layernorm else {}
    own.submodules = replace(own.submodules, core_attention=core, **norms)
    layer.submodules = replace(layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm)
    layers = [layer] * get_num_layers_to_build(config, chunk, mesh.pp.rank)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RmsNorm)  # type: ignore[arg-type]


def unwrap(model: torch.nn.Module) -> TreeModel:
    """The chunk inside Megatron's wrappers (DDP)."""
    while not isinstance(model, TreeModel):
        model = model.module  # type: ignore[assignment]
    return model


def full_hidden(output: Float[Tensor, "tokens 1 hidden"], mesh: Mesh) -> Float[Tensor, "local_tokens hidden"]:
    """The last chunk's output with every token of the shard on every tp rank.

    The gradient that comes back must be whole and equal on all tp ranks; each then keeps that of its own tokens.
    """
    if mesh.sequence_parallel:
        output = tensor_parallel.gather_from_sequence_parallel_region(
            output, tensor_parallel_output_grad=False, group=mesh.collection.tp
        )
    return output.squeeze(1)


def head_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    """[vocab_shard, hidden]: the LM head of the last chunk; with tied weights the embedding or the stage's copy of it.

    The copy on a last stage that is not also the first has the gradient of the head alone until core has summed both.
    """
    chunk = unwrap(model)
    if not chunk.post_process:
        raise ValueError("only the last chunk of the last pipeline stage has the LM head")
    tied = chunk.share_embeddings_and_output_weights
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight
