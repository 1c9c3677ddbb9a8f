"""Do a Hugging Face directory and a distributed checkpoint hold the same model? Bits first, then what they compute.

Equal bits are not enough: a rotary setting that one side reads otherwise changes no weight. The logits are those of
transformers on one side and of Megatron's modules on the other, both in float32, one layer of each in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opsd_megatron.checkpoint.model_weights import named_parameters
from opsd_megatron.checkpoint.stored_model import DistModel, HfModel, Part, StoredModel, parts_of, row_blocks
from opsd_megatron.checkpoint.weight_map import EMBEDDING, FINAL_NORM, HEAD, weights_of
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.mesh import build_mesh
from opsd_megatron.token_tree import NO_PARENT, Node, TokenTree
from opsd_megatron.types import TokenBatch

LOGIT_TOLERANCE = 5e-6
"""Of float32 logits, times the largest of them where that is above 1."""
TOKENS = 48
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_problems(
    one: StoredModel, other: StoredModel, on_bytes: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Tensors in which two models at rest differ, by name: dtype, or the first row with other bits."""
    problems = []
    for part in parts_of(one.architecture):
        dtypes = one.dtype(part), other.dtype(part)
        if dtypes[0] != dtypes[1]:
            problems.append(f"{part.name} is {dtypes[0]} on one side, {dtypes[1]} on the other")
            continue
        bits = BITS[dtypes[0].itemsize]
        for start, stop in row_blocks(part.shape, dtypes[0].itemsize):
            ours, theirs = (model.read_rows(part, start, stop).view(bits) for model in (one, other))
            on_bytes(ours.numel() * ours.element_size())
            if not torch.equal(ours, theirs):
                rows = (ours != theirs).reshape(stop - start, -1).any(1).nonzero()
                problems.append(f"{part.name} differs from row {start + int(rows[0])} on")
                break
    return problems


@dataclass(frozen=True)
class LogitCheck:
    """One sequence of fixed token ids at given positions."""

    what: str
    positions: tuple[int, int]
    worst: float
    largest: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance


@torch.no_grad()
def check_logits(hf: HfModel, megatron: DistModel, on_step: Callable[[str], None] = lambda _: None) -> list[LogitCheck]:
    """Logits of transformers with the weights of `hf` against Megatron's modules with those of `megatron`.

    Short positions, and positions at both ends of the stretched context where rotary positions are scaled; every one
    of `TOKENS` tokens attends to all before it. Memory: one layer of each side in float32 and a block of the head.
    """
    sequences = [(what, _positions(span)) for what, span in position_spans(hf.architecture)]
    ids = [_token_ids(hf.architecture, number) for number in range(len(sequences))]
    sides = _Transformers(hf), _Megatron(megatron)
    hidden = [[embed(side.model, one) for one in ids] for side in sides]
    for layer in range(hf.architecture.num_layers):
        on_step(f"layer {layer + 1} of {hf.architecture.num_layers}")
        for number, side in enumerate(sides):
            side.load_layer(layer)
            hidden[number] = [
                side.forward(one, positions) for one, (_, positions) in zip(hidden[number], sequences, strict=True)
            ]
    on_step("LM head")
    return _compare(sides, hidden, sequences)


def position_spans(architecture: Architecture) -> list[tuple[str, Sequence[int]]]:
    """What is checked: (name, first and last position of each half of the sequence)."""
    spans: list[tuple[str, Sequence[int]]] = [("short", (0, TOKENS))]
    original = architecture.rope.original_max_positions
    if architecture.rope.kind != "default" and original:
        spans.append((f"beyond the original {original:,} positions", (0, original)))
    else:
        spans.append(("the end of the context", (0, architecture.max_positions - TOKENS // 2)))
    return spans


def _positions(span: Sequence[int]) -> Int64[Tensor, "tokens"]:
    """Half of the tokens from the first number on, the other half behind the second one."""
    start, far = span
    if far <= start + TOKENS:
        return torch.arange(start, start + TOKENS)
    half = TOKENS // 2
    return torch.cat([torch.arange(start, start + half), torch.arange(far, far + half)])


def _token_ids(architecture: Architecture, seed: int) -> Int64[Tensor, "tokens"]:
    return torch.randint(0, architecture.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed))


class _Side(Protocol):
    """One implementation of the network, a layer at a time."""

    @property
    def model(self) -> StoredModel: ...

    def load_layer(self, layer: int) -> None: ...

    def forward(self, hidden: Tensor, positions: Tensor) -> Float[Tensor, "tokens hidden"]:
        """The loaded layer, without the final norm."""
        ...

    def norm(self, hidden: Tensor) -> Float[Tensor, "tokens hidden"]: ...


class _Transformers:
    """The modules of transformers, made from the directory's own config.json."""

    def __init__(self, model: HfModel):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model.reader.directory)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        self.model = model
        whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        self._network, self._norm = whole.model, whole.model.norm
        self._network.norm = nn.Identity()
        self._norm.load_state_dict({"weight": read_part(model, _part(model, FINAL_NORM))})

    def load_layer(self, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        parts = [part for part in parts_of(self.model.architecture) if part.name.startswith(prefix)]
        state = {part.name.removeprefix(prefix): read_part(self.model, part) for part in parts}
        self._network.layers[0].load_state_dict(state)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        # a mask of its own: transformers takes a jump in the positions for the start of another sequence
        mask = torch.full((len(positions), len(positions)), torch.finfo(torch.float32).min).triu(1)[None, None]
        out = self._network(
            inputs_embeds=hidden[None], position_ids=positions[None], attention_mask=mask, use_cache=False
        )
        return out.last_hidden_state[0]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)


class _Megatron:
    """Megatron's modules as training builds them, with the checkpoint's merged tensors."""

    def __init__(self, model: DistModel):
        self.model = model
        self._mesh = build_mesh(ParallelConfig())
        one_layer = replace(model.architecture, num_layers=1, vocab_size=8)
        (self._network,) = build_model(one_layer, self._mesh, torch.float32)
        decoder: Any = self._network.decoder
        self._norm, decoder.final_layernorm = decoder.final_layernorm, nn.Identity()
        self._norm.weight.copy_(model.read_merged(_part(model, FINAL_NORM).weight))

    def load_layer(self, layer: int) -> None:
        parameters = named_parameters([self._network])
        for weight in weights_of(self.model.architecture):
            if weight.layer == layer:
                name = weight.row.megatron.replace("{layer}", "0")
                parameters[name].copy_(self.model.read_merged(weight))

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        tree = TokenTree((Node(NO_PARENT, len(positions), 0),))
        none = torch.zeros(0, dtype=torch.int64)
        shard = deal(TokenBatch(tree, torch.zeros_like(positions), none, none), Axis.single("cp"))
        return self._network(replace(shard, position_ids=positions), embedded=hidden[:, None])[:, 0]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)


def _compare(
    sides: tuple[_Side, _Side],
    hidden: list[list[Tensor]],
    sequences: list[tuple[str, Tensor]],
) -> list[LogitCheck]:
    """Logits block by block of the vocabulary."""
    states = [[side.norm(one) for one in own] for side, own in zip(sides, hidden, strict=True)]
    heads = [_part(side.model, EMBEDDING if side.model.architecture.tied else HEAD) for side in sides]
    worst, largest = [0.0] * len(sequences), [0.0] * len(sequences)
    for start, stop in row_blocks(heads[0].shape, 4):
        weights = [side.model.read_rows(head, start, stop).float() for side, head in zip(sides, heads, strict=True)]
        for number in range(len(sequences)):
            theirs, ours = (own[number] @ weight.T for own, weight in zip(states, weights, strict=True))
            worst[number] = max(worst[number], float((ours - theirs).abs().max()))
            largest[number] = max(largest[number], float(theirs.abs().max()))
    return [
        LogitCheck(what, (int(positions[0]), int(positions[-1])), bad, large, LOGIT_TOLERANCE * max(1.0, large))
        for (what, positions), bad, large in zip(sequences, worst, largest, strict=True)
    ]


def embed(model: StoredModel, ids: Int64[Tensor, "tokens"]) -> Float[Tensor, "tokens hidden"]:
    """Embeddings of a few tokens, read row by row, in float32."""
    part = _part(model, EMBEDDING)
    return torch.cat([model.read_rows(part, int(one), int(one) + 1) for one in ids]).float()


def read_part(model: StoredModel, part: Part) -> Tensor:
    """A whole Hugging Face tensor in float32."""
    return model.read_rows(part, 0, part.shape[0]).float()


def _part(model: StoredModel, megatron: str) -> Part:
    return next(part for part in parts_of(model.architecture) if part.weight.megatron == megatron)
