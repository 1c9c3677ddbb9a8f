"""Time and peak memory of the distillation head beside its peers: reverse KL over the whole vocabulary, with gradients.

    python tools/bench/head.py                                         # 2048 rows, hidden 512, 2 threads
    python tools/bench/head.py --rows 2048 8192 --only ours            # memory must not grow with the rows
    python tools/bench/head.py --device cuda --dtype bfloat16 --hidden 5120 --rows 8192

Forward and backward, from hidden states to the gradients of hidden states and LM head, which count as memory for
everybody: this project's head adds to a `main_grad` that is made inside the run. "ours" is compiled, and what its
compiler holds is there before the run. "products" is no head: the four matrix products that each of them needs, at the
chunk size of ours; its time over ours is the share of that floor.
Liger (`pip install --no-deps liger-kernel` does on a CPU) is measured where it is installed.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from side_by_side import Figures, Run, measure, report
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.chunked import Distribution, pieces
from opsd_megatron.losses.head import distill_head
from opsd_megatron.parallel.axis import Axis

Inputs = dict[str, Tensor]


def ours(settings: argparse.Namespace, compiled: bool = True) -> Run:
    inputs = make_inputs(settings)
    hidden, weight = inputs["student_hidden"].requires_grad_(), torch.nn.Parameter(inputs["student_weight"])
    ones = torch.ones(settings.rows, device=settings.device)

    def loss_of(rows: slice) -> Tensor:
        return distill_head(
            hidden[rows],
            weight,
            inputs["teacher_hidden"][rows],
            inputs["teacher_weight"],
            inputs["targets"][rows],
            ones[rows],
            ones[rows],
            objective=Distill(chunk_tokens=settings.chunk, compiled=compiled),
            temperature=1.0,
            tp=Axis.single("tp"),
            vocab_size=settings.vocab,
        ).loss_sum

    loss_of(slice(4))

    def run() -> Mapping[str, float]:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        loss_sum = loss_of(slice(None))
        loss_sum.backward()
        figures = summary(loss_sum, (hidden.grad, weight.main_grad))  # type: ignore[arg-type]
        hidden.grad = weight.grad = weight.main_grad = None
        return {name: value / settings.rows for name, value in figures.items()}  # the others take the mean

    return run


def ours_eager(settings: argparse.Namespace) -> Run:
    return ours(settings, compiled=False)


def of_autograd(settings: argparse.Namespace, loss_of: Callable[[Inputs], Tensor]) -> Run:
    inputs = make_inputs(settings)
    leaves = inputs["student_hidden"].requires_grad_(), inputs["student_weight"].requires_grad_()

    def run() -> Mapping[str, float]:
        loss = loss_of(inputs)
        return summary(loss, torch.autograd.grad(loss, leaves))

    return run


def liger(settings: argparse.Namespace, compiled: bool) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=settings.liger_chunk
    )
    names = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "targets"
    return of_autograd(settings, lambda inputs: loss(*(inputs[name] for name in names)))


def liger_eager(settings: argparse.Namespace) -> Run:
    return liger(settings, compiled=False)


def liger_compiled(settings: argparse.Namespace) -> Run:
    return liger(settings, compiled=True)


def liger_triton(settings: argparse.Namespace) -> Run:
    if settings.device != "cuda":
        raise ImportError("Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    names = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight"
    return of_autograd(settings, lambda inputs: loss(*(inputs[name] for name in names)))


def log_softmax_loss(settings: argparse.Namespace) -> Run:
    """As in TRL's distillation trainers: both log_softmax of all logits, then kl_div."""

    def loss_of(inputs: Inputs) -> Tensor:
        log_p, log_q = (log_probs(inputs, who) for who in ("student", "teacher"))
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return of_autograd(settings, loss_of)


def plain_autograd(settings: argparse.Namespace) -> Run:
    def loss_of(inputs: Inputs) -> Tensor:
        log_p, log_q = (log_probs(inputs, who) for who in ("student", "teacher"))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return of_autograd(settings, loss_of)


def log_probs(inputs: Inputs, who: str) -> Tensor:
    with torch.set_grad_enabled(who == "student"):
        return (inputs[f"{who}_hidden"] @ inputs[f"{who}_weight"].T).float().log_softmax(-1)


def matrix_products(settings: argparse.Namespace) -> Run:
    inputs = make_inputs(settings)
    hidden, weight = inputs["student_hidden"], inputs["student_weight"]
    distribution = Distribution(hidden, weight, 1.0)

    def run() -> Mapping[str, float]:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        logits = hidden.new_empty(min(settings.chunk, settings.rows), settings.vocab)
        for rows in pieces(slice(0, settings.rows), settings.chunk):
            made = logits[: rows.stop - rows.start]
            for _ in range(2):
                distribution.write_logits(rows, made)
            torch.mm(made, weight, out=hidden_gradient[rows])
            weight_gradient.addmm_(made.t(), hidden[rows])
        return {}

    return run


def summary(loss: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Shows that all contenders compute the same."""
    norms = {name: one.float().norm().item() for name, one in zip(("|dh|", "|dW|"), gradients, strict=True)}
    return {"loss": loss.item(), **norms}


def make_inputs(settings: argparse.Namespace) -> Inputs:
    """Logits of about 1."""
    dtype = getattr(torch, settings.dtype)
    torch.manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, settings.hidden, device=settings.device, dtype=dtype) * scale

    return {
        "student_hidden": normal(settings.rows, 1.0),
        "student_weight": normal(settings.vocab, settings.hidden**-0.5),
        "teacher_hidden": normal(settings.rows, 1.0),
        "teacher_weight": normal(settings.vocab, settings.hidden**-0.5),
        "targets": torch.randint(settings.vocab, (settings.rows,), device=settings.device),
    }


CONTENDERS = {
    "ours": ours,
    "ours-eager": ours_eager,
    "liger": liger_eager,
    "liger-compiled": liger_compiled,
    "liger-triton": liger_triton,
    "log-softmax": log_softmax_loss,
    "autograd": plain_autograd,
    "products": matrix_products,
}


def show_floor(figures: list[Figures], settings: argparse.Namespace) -> None:
    medians = {one.name: one.median_s for one in figures if not one.missing}
    if {"ours", "products"} <= medians.keys():
        flops = 4 * 2 * settings.rows * settings.vocab * settings.hidden
        share, rate = medians["products"] / medians["ours"], flops / medians["products"] / 1e9
        print(f"{share:.0%} of the floor of four matrix products: {flops / 1e12:.3f} TFLOP at {rate:.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk", type=int, default=Distill().chunk_tokens)
    parser.add_argument("--liger-chunk", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=list(CONTENDERS), nargs="+", default=list(CONTENDERS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    contenders = {name: CONTENDERS[name] for name in arguments.only}
    for rows in arguments.rows:
        settings = argparse.Namespace(**{**vars(arguments), "rows": rows})
        figures = measure(contenders, settings, arguments.repeats, arguments.threads)
        title = (
            f"{rows} rows, hidden {settings.hidden}, vocabulary {settings.vocab}, {settings.dtype}, {settings.device}, "
            f"{settings.threads} threads; chunk {settings.chunk}, Liger's {settings.liger_chunk}"
        )
        output = arguments.output and arguments.output.with_stem(f"{arguments.output.stem}-{rows}")
        report(title, settings, figures, output)
        show_floor(figures, settings)


if __name__ == "__main__":
    main()
