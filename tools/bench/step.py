"""One whole training step beside TRL's on-policy distillation trainer: the same weights, prompts and responses.

    python tools/bench/step.py                      # context 4096, 8 responses of 128 tokens, 2 threads on both sides

Both sides start from responses that are there already and end with the optimizer's step: teacher's pass, student's
forward, exact reverse KL over the vocabulary, backward, Adam. The teacher is another model of the same sizes under the
student's own prompt, which is what TRL's trainer can do. TRL (`pip install trl datasets`) takes each response with its
own copy of the context; one at a time and all in one microbatch are both measured.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from model import add_model_arguments, qwen3_config
from side_by_side import measure, report
from transformers import Qwen3ForCausalLM

from opsd_megatron.config import BatchConfig, Distill, OptimizerConfig, OtherTeacher, ParallelConfig
from opsd_megatron.launch.tiny_world import write_tokenizer
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan

LEARNING_RATE = 1e-6


def draw_tokens(settings: argparse.Namespace) -> tuple[list[int], list[list[int]]]:
    """The context, and the responses to it; ids that the tokenizer knows as plain text."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(3, 384, (settings.context,), generator=generator).tolist()
    responses = torch.randint(3, 384, (settings.responses, settings.response_tokens), generator=generator).tolist()
    return context, responses


def prepare_ours(settings: argparse.Namespace):
    from opsd_megatron.checkpoint.model_weights import load_weights
    from opsd_megatron.data.tokenizer import load_tokenizer
    from opsd_megatron.models.architecture import read_architecture
    from opsd_megatron.models.build import build_model
    from opsd_megatron.objectives.build import build_objective
    from opsd_megatron.parallel.mesh import build_mesh
    from opsd_megatron.train.layout import lay_out
    from opsd_megatron.train.optimizer import apply_gradients, make_trainable
    from opsd_megatron.train.step import score_responses, student_pass
    from opsd_megatron.train.teacher import make_teacher

    path, mesh = settings.directory / "student", build_mesh(ParallelConfig())
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    architecture = read_architecture(path)
    modules = build_model(architecture, mesh, dtype)
    load_weights(modules, architecture, path, mesh)
    other = OtherTeacher(settings.directory / "teacher")
    teacher, vocab_size = make_teacher(other, modules, architecture, load_tokenizer(path), mesh, dtype)
    chunks, optimizer = make_trainable(modules, mesh, OptimizerConfig(lr=LEARNING_RATE), dtype)
    objective = build_objective(Distill(), 1.0, mesh.tp, mesh.cp, vocab_size)
    context, responses = draw_tokens(settings)
    rollouts = [make_rollout(context, response, number) for number, response in enumerate(responses)]
    budget = settings.context + settings.responses * settings.response_tokens
    batch = BatchConfig(student_microbatch_tokens=budget, teacher_microbatch_tokens=budget)

    def run() -> dict[str, float]:
        layout = lay_out(rollouts, mesh, batch, architecture.pair_cost)
        started = time.perf_counter()
        hidden = score_responses(teacher, layout, mesh)
        teacher_s = time.perf_counter() - started
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = student_pass(chunks, layout, objective, hidden, teacher.head_weight(), mesh)
        apply_gradients(optimizer, LEARNING_RATE)
        loss = sums["sum/loss/per_token"] / sums["count/loss/per_token"]
        return {"loss": loss.item(), "teacher s": teacher_s}

    return run


def make_rollout(context: list[int], response: list[int], number: int) -> Rollout:
    count, prompt = len(response), tuple(context)
    return Rollout(
        pair=PromptPair("bench", prompt, prompt), sample=number, token_ids=tuple(response), logprobs=(0.0,) * count,
        logprob_kind="processed", loss_mask=(True,) * count, finish_reason="length",
        version_spans=(VersionSpan("", 0, count),), turns=(Turn("model", 0, count),), server_id="",
    )  # fmt: skip


def prepare_trl(settings: argparse.Namespace, batch: int):
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import DistillationConfig, DistillationTrainer

    context, responses = draw_tokens(settings)

    class FixedResponses(DistillationTrainer):
        """Takes the given responses instead of sampling, and keeps the loss of a step and the teacher's time."""

        loss, teacher_s = 0.0, 0.0

        def _generate(self, prompts):
            return [context for _ in prompts], [responses[int(prompt)] for prompt in prompts], None, None, []

        def training_step(self, *arguments, **named):
            loss = super().training_step(*arguments, **named)
            self.loss += loss.item()
            return loss

        def _get_last_hidden_state(self, *arguments, **named):
            started = time.perf_counter()
            hidden = super()._get_last_hidden_state(*arguments, **named)
            if not torch.is_grad_enabled():
                self.teacher_s += time.perf_counter() - started
            return hidden

    on_cpu = not torch.cuda.is_available()
    dtype = torch.float32 if on_cpu else torch.bfloat16
    student, teacher = (
        Qwen3ForCausalLM.from_pretrained(settings.directory / name, dtype=dtype, attn_implementation="sdpa")
        for name in ("student", "teacher")
    )
    arguments = DistillationConfig(
        output_dir=str(settings.directory / "trl"), max_steps=1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings.responses // batch, learning_rate=LEARNING_RATE, beta=1.0,
        max_completion_length=settings.response_tokens, gradient_checkpointing=False, use_cpu=on_cpu,
        bf16=not on_cpu, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        pad_to_multiple_of=None,
    )  # fmt: skip
    trainer = FixedResponses(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(settings.responses)]}),
        processing_class=AutoTokenizer.from_pretrained(settings.directory / "student"),
    )

    trainer.remove_callback(PrinterCallback)

    def run() -> dict[str, float]:
        trainer.loss, trainer.teacher_s = 0.0, 0.0
        trainer.train()
        return {"loss": trainer.loss, "teacher s": trainer.teacher_s}

    return run


def prepare_trl_one(settings: argparse.Namespace):
    return prepare_trl(settings, 1)


def prepare_trl_all(settings: argparse.Namespace):
    return prepare_trl(settings, settings.responses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the context that all responses share")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON too")
    settings = parser.parse_args()
    contenders = {
        "opsd_megatron": prepare_ours,
        "TRL, one response at a time": prepare_trl_one,
        "TRL, all responses at once": prepare_trl_all,
    }
    with tempfile.TemporaryDirectory() as directory:
        settings.directory = Path(directory)
        for seed, name in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            Qwen3ForCausalLM(qwen3_config(settings)).save_pretrained(settings.directory / name)
            write_tokenizer(settings.directory / name)
        figures = measure(contenders, settings, settings.repeats, settings.threads)
    title = f"one step: context {settings.context}, {settings.responses} responses of {settings.response_tokens} tokens"
    report(title, settings, figures, settings.output)


if __name__ == "__main__":
    main()
