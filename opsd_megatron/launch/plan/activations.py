"""The tensors of one layer on one rank: what autograd keeps until backward, and what each moment of backward adds.

Names are those of the computation (core/transformer/transformer_layer.py, attention.py and mlp.py of megatron-core
0.16.1, parallel/ring_attention.py here). A norm is one kernel on CUDA and keeps its input; on a CPU it is a formula of
several operations, in float32, which keep what each of them needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture, padded_vocab

Tensors = dict[str, int]
"""Bytes by name."""
SINGLE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Widths:
    """One rank's share of the network, in values, and how many tokens pass through it at once."""

    tokens: int
    own_tokens: int
    """Of the residual stream: under sequence parallelism tokens / tp."""
    hidden: int
    queries: int
    keys: int
    """As many values as keys."""
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    qk_norm: bool
    value: int
    """Bytes of one number of the model's dtype."""
    cp: int
    gathers: bool
    """Sequence parallelism: matrices gather their inputs over tp."""
    is_cuda: bool

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.own_tokens * self.hidden * self.value

    @property
    def whole(self) -> int:
        """Bytes of hidden states of all local tokens."""
        return self.tokens * self.hidden * self.value

    def wide(self, width: int) -> int:
        """Bytes of [tokens, width]."""
        return self.tokens * width * self.value


def widths_of(
    architecture: Architecture, parallel: ParallelConfig, dtype: str, tokens: int, cp: int, is_cuda: bool
) -> Widths:
    """`tokens` is what one cp rank holds; `cp` is 1 for a pass that does not cut its microbatches."""
    a, tp = architecture, parallel.tp
    return Widths(
        tokens=tokens,
        own_tokens=tokens // tp if parallel.sequence_parallel else tokens,
        hidden=a.hidden_size,
        queries=a.heads * a.head_dim // tp,
        keys=a.kv_heads * a.head_dim // tp,
        heads=a.heads // tp,
        head_dim=a.head_dim,
        ffn=a.ffn_size // tp,
        vocab=padded_vocab(a, tp) // tp,
        qk_norm=a.qk_norm,
        value=2 if dtype == "bfloat16" else SINGLE,
        cp=cp,
        gathers=parallel.sequence_parallel,
        is_cuda=is_cuda,
    )


def kept_by_layer(w: Widths, recompute: str) -> Tensors:
    """Between a layer's forward and its backward."""
    if recompute == "full":
        return {"layer input": w.stream}
    kept = _attention(w, "norms" not in recompute)
    mlp = _mlp(w, "norms" not in recompute)
    return kept | (_only(mlp, "MLP norm") if "mlp" in recompute else mlp)


def _attention(w: Widths, keeps_norm_output: bool) -> Tensors:
    kept = _norm(w, "attention norm", w.own_tokens * w.hidden, keeps_norm_output)
    if w.qk_norm:
        projected = w.tokens * (w.queries + w.keys)
        if w.is_cuda or w.value == SINGLE:  # the norms keep their inputs: keys as a part of the whole projection
            kept["projected queries, keys, values"] = w.wide(w.queries + 2 * w.keys)
            if w.queries > w.keys > w.head_dim:
                kept["queries in head order"] = w.wide(w.queries)
        if not w.is_cuda:
            kept["query and key norms"] = projected * SINGLE * (1 if w.value == SINGLE else 2)
    return kept | {
        "rotated queries": w.wide(w.queries),
        "keys and values": w.wide(2 * w.keys),
        "attention output": w.wide(w.queries),
        "log-sum-exp": w.tokens * w.heads * SINGLE,
    }


def _mlp(w: Widths, keeps_norm_output: bool) -> Tensors:
    return _norm(w, "MLP norm", w.own_tokens * w.hidden, keeps_norm_output) | {
        "gate and up": w.wide(2 * w.ffn),
        "activated gate": w.wide(w.ffn),
        "shifted up": w.wide(w.ffn),  # core adds glu_linear_offset, which is 0
        "gated": w.wide(w.ffn),
    }


def _norm(w: Widths, name: str, elements: int, keeps_output: bool) -> Tensors:
    """Also the norm's output, which the matrix behind it keeps; only the input where the norm is computed again."""
    own = elements * w.value
    if not keeps_output:
        return {f"{name} input": own}
    kept = {f"{name} output": own}
    if w.is_cuda:
        return kept | {f"{name} input": own}
    copied = {f"{name} input in float32": elements * SINGLE} if w.value != SINGLE else {f"{name} input": own}
    return kept | copied | {f"{name} normalised": elements * SINGLE}


def _only(tensors: Mapping[str, int], prefix: str) -> Tensors:
    return {name: size for name, size in tensors.items() if name.startswith(prefix)}


def mlp_backward(w: Widths, recompute: str) -> list[Tensors]:
    """What lives in a layer at the moments of its MLP's backward, what it kept included; the largest decides.

    fc2: its gradients of input and weight. gate: the gradients of both factors beside that of their product. split:
    those of the two halves beside the whole that they are joined to. fc1: its gradients of input and weight.
    """
    attention = _attention(w, "norms" not in recompute)
    norm, gate = _only(_mlp(w, "norms" not in recompute), "MLP norm"), w.wide(w.ffn)
    stays = attention | norm | {"gradient of the layer": w.stream}
    if recompute in ("mlp", "mlp+norms"):
        stays["recomputed MLP output"] = w.stream
    if recompute in ("norms", "mlp+norms"):
        stays["MLP norm output again"] = w.stream
    if recompute == "full":
        stays |= {"layer input": w.stream, "recomputed layer output": w.stream}
        if w.is_cuda or w.value == SINGLE:
            del stays["attention norm input"]  # the same tensor
    gated = {"gate and up": 2 * gate, "activated gate": gate, "shifted up": gate}
    weight = w.ffn * w.hidden * w.value
    fc2 = {"gated": gate, "gradient of gated": gate, "gradient of fc2": weight}
    if w.gathers:
        fc2["gathered gradient"] = w.whole
    fc1 = {"gradient of gate and up": 2 * gate, "gradient of fc1's input": w.whole, "gradient of fc1": 2 * weight}
    if w.gathers:
        fc1["scattered gradient"] = w.stream
    return [
        stays | gated | fc2,
        stays | gated | {"gradients of gated and of its factors": 3 * gate},
        stays | {"gradients of gate and up, apart and joined": 4 * gate},
        stays | fc1,
    ]


def attention_backward(w: Widths, recompute: str) -> tuple[Tensors, Tensors]:
    """(what lives in a layer, what the ring adds) when attention's gradients are taken."""
    lives = _attention(w, "norms" not in recompute) | {
        "gradient of the layer": w.stream,
        "gradient of attention output": w.wide(w.queries),
    }
    exact_queries, exact_keys = w.tokens * w.queries * SINGLE, w.tokens * 2 * w.keys * SINGLE
    ring = {
        "gradient of queries": exact_queries,
        "gradient of own keys and values": exact_keys,
        "one call's gradients": w.wide(w.queries + 2 * w.keys),
    }
    if w.is_cuda:
        ring["one call's float32 sum for queries"] = exact_queries
        if w.queries > w.keys:
            ring["one call's gradients of keys and values, per query head"] = w.wide(2 * w.queries)
    if w.cp > 1:
        ring["keys and values in flight"] = w.wide(2 * w.keys) * min(w.cp - 1, 2)  # in use, and arriving
        ring["gradients of keys and values in flight"] = exact_keys * min(w.cp, 3)  # made here, leaving, arriving
    return lives, ring


def forward_peak(w: Widths) -> Tensors:
    """What lives in a layer without gradient when its MLP has made most."""
    return {
        "embedded tokens": w.stream,
        "layer input": w.stream,
        "after attention": w.stream,
        "MLP norm output": w.stream,
        "gate and up": w.wide(2 * w.ffn),
        "activated gate": w.wide(w.ffn),
        "shifted up": w.wide(w.ffn),
        "gated": w.wide(w.ffn),
    }
