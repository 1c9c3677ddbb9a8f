"""Cost of a forward and backward against context length, at cp 1 and cp 2, beside transformers with torch's SDPA.

    python -W ignore tools/bench/scaling.py --lengths 1024 2048 4096 8192 16384 32768

The same tiny Qwen3 on one sequence, two threads in all: ours in one process, ours on two gloo ranks of one thread,
transformers in one process. The LM head is left out on all sides. On a GPU (--ranks 1) only cp 1 is measured.
"""

import argparse
from pathlib import Path

import torch
from model import add_model_arguments, architecture_of, batch_of, build, forward_flops, qwen3_config
from ranks import on_ranks
from side_by_side import Run, measure, report
from transformers import Qwen3Model

from opsd_megatron.parallel.context import deal

Settings = argparse.Namespace


def tokens_of(settings: Settings) -> list[int]:
    torch.manual_seed(1)
    return torch.randint(settings.vocab, (settings.length + 1,)).tolist()


def forward_and_backward(settings: Settings, cp: int) -> Run:
    model, mesh, _ = build(settings, cp)
    shard = deal(batch_of([tokens_of(settings)], [1]), mesh.cp).to(mesh.device)

    def run() -> dict[str, float]:
        model(shard).float().square().sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        return {}

    return run


def one_rank(settings: Settings) -> Run:
    torch.set_num_threads(settings.threads)
    return forward_and_backward(settings, cp=1)


def ring_rank(settings: Settings) -> Run:
    return forward_and_backward(settings, cp=settings.ranks)


def ring(settings: Settings) -> Run:
    return on_ranks(settings.ranks, ring_rank, settings)


def transformers(settings: Settings) -> Run:
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = qwen3_config(settings)
    config._attn_implementation = "sdpa"
    model = Qwen3Model(config)
    torch.nn.Module.to(model, device, dtype)
    ids = torch.tensor([tokens_of(settings)[:-1]], device=device)

    def run() -> dict[str, float]:
        model(ids, use_cache=False).last_hidden_state.float().square().sum().backward()
        model.zero_grad(set_to_none=True)
        return {}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the contenders in one process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON; the length is added to its name")
    add_model_arguments(parser, layers=2, heads=2, kv_heads=1)
    settings = parser.parse_args()
    architecture = architecture_of(settings)
    contenders = {f"ours, {settings.threads} threads": one_rank}
    if settings.ranks > 1:
        contenders[f"ours, cp {settings.ranks} x 1 thread"] = ring
    contenders[f"transformers, {settings.threads} threads"] = transformers
    lines = []
    for length in settings.lengths:
        settings.length = length
        figures = measure(contenders, settings, settings.repeats)
        output = settings.output and settings.output.with_stem(f"{settings.output.stem}-{length}")
        report(f"forward and backward of {length} tokens", settings, figures, output)
        products, attention = forward_flops(architecture, length, length * (length + 1) // 2)
        flops = 3 * products + 3.5 * attention
        speeds = ", ".join(f"{one.name}: {flops / one.median_s / 1e9:.0f} GFLOP/s" for one in figures)
        lines.append(f"{length:7} tokens, {flops / length / 1e6:8.1f} MFLOP per token; {speeds}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
