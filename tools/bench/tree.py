"""n responses to one context as one token tree beside n separate sequences, forward and backward of a whole model.

    python -W ignore tools/bench/tree.py --responses 1 2 4 8 16

The context is 64 times as long as a response. Both go through the same model and LM head with the same number of
threads. FLOPs are counted from the trees (attention by pairs); those of matrix products are checked against torch's
own counter, which does not know the CPU's attention kernel.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from model import add_model_arguments, architecture_of, batch_of, build, forward_backward, forward_flops
from side_by_side import Run, measure, report
from torch.utils.flop_counter import FlopCounterMode

from opsd_megatron.parallel.context import deal
from opsd_megatron.types import TokenBatch

Settings = argparse.Namespace


def sequences_of(settings: Settings) -> list[list[int]]:
    """A common context and then another response each, all random."""
    torch.manual_seed(1)
    context = torch.randint(settings.vocab, (settings.context,)).tolist()
    count = settings.response
    return [context + torch.randint(settings.vocab, (count,)).tolist() for _ in range(settings.n)]


def batches_of(settings: Settings, as_tree: bool) -> list[TokenBatch]:
    sequences = sequences_of(settings)
    groups = [sequences] if as_tree else [[sequence] for sequence in sequences]
    return [batch_of(group, [settings.response] * len(group)) for group in groups]


def passes(settings: Settings, as_tree: bool) -> Run:
    model, mesh, _ = build(settings)
    shards = [deal(batch, mesh.cp).to(mesh.device) for batch in batches_of(settings, as_tree)]
    answers = torch.tensor([sequence[-settings.response :] for sequence in sequences_of(settings)], device=mesh.device)
    targets = [answers.flatten()] if as_tree else list(answers)
    products: list[float] = []

    def run() -> dict[str, float]:
        with nullcontext() if products else FlopCounterMode(display=False) as counter:  # only the first run, a warm-up
            values = forward_backward(model, mesh, shards, targets)
        if counter is not None:
            counts = counter.get_flop_counts()["Global"]
            products.append(sum(count for operation, count in counts.items() if "attention" not in str(operation)))
        return {**values, "GFLOP of products": products[0] / 1e9}

    return run


def tree(settings: Settings) -> Run:
    return passes(settings, as_tree=True)


def separate(settings: Settings) -> Run:
    return passes(settings, as_tree=False)


def counted(settings: Settings, as_tree: bool) -> tuple[float, float]:
    """FLOPs of forward and backward: of matrix products, of attention."""
    architecture = architecture_of(settings)
    products = attention = 0.0
    for batch in batches_of(settings, as_tree):
        pairs = batch.tree.attention_pairs()
        one = forward_flops(architecture, batch.num_tokens, pairs, len(batch.rows))
        products, attention = products + 3 * one[0], attention + 3.5 * one[1]
    return products, attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--response", type=int, default=32, help="tokens of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON; the number of responses is added to its name")
    add_model_arguments(parser)
    settings = parser.parse_args()
    settings.context = 64 * settings.response
    for n in settings.responses:
        settings.n = n
        figures = measure({"tree": tree, "separate": separate}, settings, settings.repeats, settings.threads)
        title = f"{n} responses of {settings.response} tokens to a context of {settings.context}"
        output = settings.output and settings.output.with_stem(f"{settings.output.stem}-{n}")
        report(f"{title}, {settings.threads} threads", settings, figures, output)
        ours, theirs = counted(settings, True), counted(settings, False)
        for one, (products, attention) in zip(figures, (ours, theirs), strict=True):
            print(f"{one.name}: {products / 1e9:.3f} GFLOP of products, {attention / 1e9:.3f} of attention")
        wall = figures[0].median_s / figures[1].median_s
        print(f"tree / separate: FLOPs {sum(ours) / sum(theirs):.3f}, wall time {wall:.3f}\n")


if __name__ == "__main__":
    main()
