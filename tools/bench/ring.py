"""Ring attention beside torch's scaled_dot_product_attention, forward and backward on one causal sequence.

    python tools/bench/ring.py --lengths 4096 8192 16384

On a CPU two gloo ranks with one thread each share the sequence, and a peer has it whole with two threads. Repeating
the key-value heads before the call is the peer's other form. On a GPU (--device cuda) one process makes the calls of
all --ranks one after the other, without transfers: what cutting and merging costs. Also printed: the bytes that one
rank sends, counted and by formula, and how evenly trees are dealt to cp ranks. "time / ours" is our speed relative to
the peer's.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from ranks import on_ranks
from side_by_side import Run, measure, report
from torch import Tensor

from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import ContextShard, deal
from opsd_megatron.parallel.response import even_shares
from opsd_megatron.parallel.ring_attention import ring_attention
from opsd_megatron.parallel.traffic import count_traffic
from opsd_megatron.token_tree import Node, TokenTree
from opsd_megatron.types import TokenBatch

Settings = argparse.Namespace

TREES = {  # (context, responses) of every tree of a microbatch
    "32k, 8 x 1k": [(32768, [1024] * 8)],
    "32k, 1 x 1k": [(32768, [1024])],
    "128k, 8 x 1k": [(131072, [1024] * 8)],
    "128k, 3 x 2k": [(131072, [2048] * 3)],
    "4k, 8 x 64": [(4096, [64] * 8)],
    "12 small": [(300 + 170 * number, [40 + 7 * number] * (1 + number % 5)) for number in range(12)],
    "40 small": [(150 + 37 * (number % 13), [20 + 3 * (number % 7)] * (number % 6)) for number in range(40)],
}


def forest(trees: list[tuple[int, list[int]]]) -> TokenBatch:
    """A context with one response is one sequence. Token t of the forest has id t."""
    nodes: list[Node] = []
    rows: list[int] = []
    end = 0
    for context, responses in trees:
        root, last = len(nodes), end + context - 1
        whole = context + sum(responses) if len(responses) == 1 else context
        nodes.append(Node(-1, whole, 0))
        nodes.extend(Node(root, length, context) for length in responses if len(responses) > 1)
        end += context
        for length in responses:
            rows.extend((last, *range(end, end + length - 1)))
            end += length
    tree = TokenTree(tuple(nodes))
    return TokenBatch(tree, torch.arange(tree.num_tokens), torch.tensor(rows).long(), torch.arange(len(rows)))


def inputs(settings: Settings) -> list[Tensor]:
    """Query, key, value and the output's gradient of the whole sequence, [tokens, heads, head_dim]."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    heads = (settings.heads, settings.kv_heads, settings.kv_heads, settings.heads)
    return [torch.randn(settings.length, n, settings.head_dim, device=settings.device, dtype=dtype) for n in heads]


def squares(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> dict[str, float]:
    """Sums of squares: those of the ranks add up to the whole sequence's."""
    gradients = [tensor.grad for tensor in (query, key, value) if tensor.grad is not None]
    return {"out^2": _square(out.detach()), "gradients^2": sum(map(_square, gradients))}


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def ring(settings: Settings) -> Run:
    return on_ranks(settings.ranks, ring_rank, settings)


def ring_rank(settings: Settings) -> Run:
    world = dist.group.WORLD
    assert world is not None, "on_ranks has joined the ranks"
    shard = deal(forest([(settings.length, [])]), Axis.of_group("cp", world))
    query, key, value, grad = (tensor[shard.token_ids] for tensor in inputs(settings))

    def run() -> dict[str, float]:
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        with count_traffic({"cp": world}) as traffic:
            out = ring_attention(q, k, v, shard, settings.head_dim**-0.5)
            out.backward(grad)
        return {**squares(q, k, v, out), "MB sent": traffic["cp"] / 1e6, "MB by formula": formula(settings) / 1e6}

    return run


def formula(settings: Settings) -> int:
    """Bytes per rank of one forward and backward in float32: KV twice, its gradients once, W-1 hops each."""
    one = settings.length // settings.ranks * settings.kv_heads * settings.head_dim * 4
    return 3 * 2 * (settings.ranks - 1) * one


def ring_in_one_process(settings: Settings) -> Run:
    """The calls of all ranks on all keys."""
    batch = forest([(settings.length, [])])
    dealt = deal(batch, Axis("cp", 0, settings.ranks, None, tuple(range(settings.ranks))))
    blocks = tuple(block for own in dealt.blocks for block in own)
    tokens = torch.cat([torch.arange(block.start, block.start + block.length) for block in blocks])
    shard: ContextShard = replace(dealt, blocks=(blocks,), cp=Axis.single("cp"), token_ids=tokens)
    query, key, value, grad = (tensor[tokens] for tensor in inputs(settings))

    def run() -> dict[str, float]:
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        out = ring_attention(q, k, v, shard, settings.head_dim**-0.5)
        out.backward(grad)
        return squares(q, k, v, out)

    return run


def sdpa(settings: Settings, repeat: bool = False) -> Run:
    torch.set_num_threads(settings.ranks)
    query, key, value, grad = inputs(settings)

    def run() -> dict[str, float]:
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        rows, keys, values = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        if repeat:
            keys, values = (t.repeat_interleave(settings.heads // settings.kv_heads, 1) for t in (keys, values))
        out = functional.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=not repeat)
        out.backward(grad.transpose(0, 1)[None])
        return squares(q, k, v, out)

    return run


def sdpa_repeated(settings: Settings) -> Run:
    return sdpa(settings, repeat=True)


def print_balance() -> None:
    """Max over mean of the cp ranks: tokens, attention pairs, and rows of the LM head before and after the exchange."""
    print(f"\n{'max / mean over cp ranks':26}{'tokens':>8}{'pairs':>8}{'rows held':>11}{'rows of head':>14}")
    for name, trees in TREES.items():
        for size in (2, 4, 8):
            shard = deal(forest(trees), Axis("cp", 0, size, None, tuple(range(size))))
            held = [len(rows) for rows in shard.rows_by_rank]
            spread = [len(share) for share in even_shares(torch.arange(sum(held)), size)]
            figures = [max(some) * size / max(sum(some), 1) for some in (shard.tokens_by_rank, held, spread)]
            tokens, before, after = figures
            print(f"{name:20} cp={size} {tokens:8.3f}{shard.work_balance:8.3f}{before:11.3f}{after:14.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON; the length is added to its name")
    settings = parser.parse_args()
    if settings.device == "cuda":
        contenders = {f"calls of {settings.ranks} ranks": ring_in_one_process, "SDPA": sdpa}
    else:
        peers = {f"SDPA, {settings.ranks} threads": sdpa, "the same, KV heads repeated": sdpa_repeated}
        contenders = {f"ring, {settings.ranks} ranks x 1 thread": ring, **peers}
    for length in settings.lengths:
        settings.length = length
        figures = measure(contenders, settings, settings.repeats)
        title = f"attention, {length} tokens, {settings.heads} / {settings.kv_heads} heads of {settings.head_dim}"
        output = settings.output and settings.output.with_stem(f"{settings.output.stem}-{length}")
        report(f"{title}, {settings.device}", settings, figures, output)
    print_balance()


if __name__ == "__main__":
    main()
