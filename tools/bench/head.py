"""Time and peak memory of the distillation head beside its peers; prints a table with ratios to this project's head.

    python tools/bench/head.py --rows 512 --hidden 512 --vocab 151936 --chunk 128

Reverse KL over the whole vocabulary from hidden states, forward and backward, gradients of hidden states and LM head.
Every contender runs in a process of its own, one warm-up and then the best of --repeats. Memory is the peak above
what was held when the inputs were ready (resident memory on a CPU, allocated memory on a GPU). Liger is measured where
it is installed (`pip install --no-deps liger-kernel` does on a CPU); --liger-compiled lets it use torch.compile. On a
machine that does other things, compare CPU seconds.
"""

import argparse
import multiprocessing
import resource
import time

import psutil
import torch

from opsd_megatron.config import Distill
from opsd_megatron.losses.head import distill_head
from opsd_megatron.parallel.axis import Axis


def chunked(inputs: dict[str, torch.Tensor], arguments: argparse.Namespace) -> torch.Tensor:
    rows = len(inputs["targets"])
    result = distill_head(
        inputs["student_hidden"],
        inputs["student_weight"],
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
        inputs["targets"],
        inputs["student_hidden"].new_ones(rows, dtype=torch.float32),
        inputs["student_hidden"].new_zeros(rows, dtype=torch.float32),
        objective=Distill(chunk_tokens=arguments.chunk),
        temperature=1.0,
        tp=Axis.single("tp"),
        vocab_size=arguments.vocab,
    )
    return result.loss_sum / rows


def materialised(inputs: dict[str, torch.Tensor], arguments: argparse.Namespace) -> torch.Tensor:
    log_p = (inputs["student_hidden"] @ inputs["student_weight"].T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def liger(inputs: dict[str, torch.Tensor], arguments: argparse.Namespace) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=1.0,
        compiled=arguments.liger_compiled,
        chunk_size=arguments.chunk,
    )
    return loss(
        inputs["student_hidden"],
        inputs["student_weight"],
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
        inputs["targets"],
    )


CONTENDERS = {"this head": chunked, "materialised": materialised, "liger chunked": liger}


def measure(name: str, arguments: argparse.Namespace, results) -> None:
    """Puts name, loss, gradient norms, seconds and MiB, or the reason why there are none."""
    torch.set_num_threads(arguments.threads)
    inputs = make_inputs(arguments)
    leaves = (inputs["student_hidden"].requires_grad_(), inputs["student_weight"].requires_grad_())
    held_bytes = psutil.Process().memory_info().rss
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held_bytes = torch.cuda.memory_allocated()
    try:
        seconds, cpu_seconds = [], []
        for _ in range(1 + arguments.repeats):
            started, cpu_started = time.perf_counter(), time.process_time()
            loss = CONTENDERS[name](inputs, arguments)
            gradients = torch.autograd.grad(loss, leaves)
            norms = [gradient.float().norm().item() for gradient in gradients]
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            del gradients
    except ImportError as missing:
        results.put((name, str(missing)))
        return
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    peak_mib = (peak_bytes - held_bytes) / 2**20
    results.put((name, loss.item(), *norms, min(seconds[1:]), min(cpu_seconds[1:]), peak_mib))


def make_inputs(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Logits of about 1; gradients of an output of about 1e-3."""
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, arguments.hidden, device=arguments.device, dtype=dtype) * scale

    return {
        "student_hidden": normal(arguments.rows, 1.0),
        "student_weight": normal(arguments.vocab, arguments.hidden**-0.5),
        "teacher_hidden": normal(arguments.rows, 1.0),
        "teacher_weight": normal(arguments.vocab, arguments.hidden**-0.5),
        "targets": torch.randint(arguments.vocab, (arguments.rows,), device=arguments.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--liger-compiled", action="store_true")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    results, baseline = context.Queue(), None
    print(
        f"{arguments.rows} rows, hidden {arguments.hidden}, vocab {arguments.vocab}, chunk {arguments.chunk}, "
        f"{arguments.dtype} on {arguments.device}, {arguments.threads} threads, torch {torch.__version__}"
    )
    print(
        f"{'':14} {'loss':>12} {'|dh|':>12} {'|dW|':>12} {'s':>9} {'ratio':>7} {'CPU s':>9} {'ratio':>7} "
        f"{'MiB':>9} {'ratio':>7}"
    )
    for name in arguments.only or CONTENDERS:
        process = context.Process(target=measure, args=(name, arguments, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} ended with exit code {process.exitcode}")
        name, *figures = results.get()
        if len(figures) == 1:
            print(f"{name:14} not measured: {figures[0]}")
            continue
        loss, hidden_norm, weight_norm, *costs = figures
        baseline = baseline or costs
        columns = " ".join(f"{cost:9.3f} {cost / ours:7.2f}" for cost, ours in zip(costs, baseline, strict=True))
        print(f"{name:14} {loss:12.8f} {hidden_norm:12.6e} {weight_norm:12.6e} {columns}")


if __name__ == "__main__":
    main()
