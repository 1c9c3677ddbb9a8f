"""Train the demo's starting model: a tiny Qwen3 that answers from short contexts and fails, gradually, on longer ones.

    python examples/tiny_pretrain.py --output examples/tiny

Three stages. *Copy*: repeated random segments beside small retrieval contexts full of facts, until the copy loss has
fallen; without it recall of several tokens does not emerge in this budget. *Retrieve*: facts in prose. *Sharpen*: the
same, from a high learning rate down to almost none. No prompt is longer than 128 tokens in any stage; accuracy falls
with length, gradually, all by itself.

Every context carries several questions. They are branches: each sees the context and itself, and its positions continue
the context's, exactly as if it stood there alone.
"""

import dataclasses
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tiny_task import FACT_SHARE, Encode, FactTask, Record, encode_question, make_eval_set, render_prompt
from tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, make_tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

DEV_SEED = 0  # of the items that the log's accuracies are measured on


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    max_steps: int
    lr: float
    """At the start of the stage; falls linearly to `final_lr`."""
    final_lr: float
    tokens: tuple[int, int]
    """Shortest and longest prompt, without the question's answer."""
    fact_share: tuple[float, float] = FACT_SHARE
    """Share of the context's tokens that facts take; many facts make a strong signal for telling their keys apart."""
    copy_share: float = 0.0
    """Share of batches that copy random segments."""
    stop_copy_loss: float | None = None
    """End the stage when the smoothed copy loss (nats per token) has fallen below this."""


@dataclasses.dataclass(frozen=True)
class Settings:
    output: Path = Path("examples/tiny")
    """Where model, tokenizer, log and hashes go."""
    seed: int = 1
    threads: int = 1
    contexts: int = 32
    """Contexts per retrieval batch; a batch of the copy task has twice as many segments."""
    questions: int = 6
    """Questions per context, at most."""
    hidden: int = 96
    layers: int = 2
    ffn: int = 192
    rope_theta: float = 10_000.0
    eval_items: int = 256
    eval_every: int = 100
    first_stage: str = "copy"
    """A later stage starts from the weights that `output` holds and appends to its log."""
    scale_steps: float = 1.0
    """Multiplies the length of every stage; small values serve to try the script."""


STAGES = (
    Stage("copy", 2500, 3e-3, 3e-3, (48, 96), fact_share=(0.8, 1.0), copy_share=0.5, stop_copy_loss=0.6),
    Stage("retrieve", 240, 2e-3, 2e-4, (40, 128), fact_share=(0.3, 0.8)),
    Stage("sharpen", 300, 2e-3, 5e-5, (40, 128), fact_share=(0.3, 0.8)),
)


# ---------------------------------------------------------------- model


def build_model(settings: Settings) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        initializer_range=settings.hidden**-0.5,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # a small residual branch keeps the token's identity readable at the start
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.2)
    return model


# ---------------------------------------------------------------- batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens; `branch` is 0 in the context, b in the b-th question and -1 in padding."""

    ids: Tensor  # [batch, seq]
    positions: Tensor  # [batch, seq]
    branch: Tensor  # [batch, seq]
    is_target: Tensor  # [batch, seq], true where the token at this place is to be predicted

    def attention_mask(self) -> Tensor:
        """[batch, 1, seq, seq], true where row sees column."""
        seq = self.ids.shape[1]
        causal = torch.ones(seq, seq, dtype=torch.bool).tril()
        row, column = self.branch[:, :, None], self.branch[:, None, :]
        return (causal & ((column == 0) | (column == row)))[:, None]


def make_batch(rows: Sequence[tuple[Sequence[int], Sequence[tuple[Sequence[int], Sequence[int]]]]]) -> Batch:
    """A batch from (context ids, [(question ids, answer ids), ...]) per row."""
    built = []
    for context, branches in rows:
        ids, positions, branch = list(context), list(range(len(context))), [0] * len(context)
        is_target = [False] * len(context)
        for number, (question, answer) in enumerate(branches, 1):
            length = len(question) + len(answer)
            ids += [*question, *answer]
            positions += range(len(context), len(context) + length)
            branch += [number] * length
            is_target += [False] * len(question) + [True] * len(answer)
        built.append((ids, positions, branch, is_target))
    seq = max(len(ids) for ids, *_ in built)
    columns = [
        torch.tensor([values + [filler] * (seq - len(values)) for values in column])
        for column, filler in zip(zip(*built, strict=True), (PAD_ID, 0, -1, False), strict=True)
    ]
    return Batch(*columns)


def copy_batch(rng: random.Random, rows: int) -> Batch:
    """Random segments of 8 to 32 tokens, written twice; the second time is to be predicted."""
    segments = [[rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(8, 32))] for _ in range(rows)]
    return make_batch([([BOS_ID, *segment], [(segment[:1], segment[1:])]) for segment in segments])


def retrieval_batch(task: FactTask, rng: random.Random, stage: Stage, rows: int, questions: int) -> Batch:
    """Contexts of the stage's lengths with up to `questions` questions each, as branches."""
    built = []
    for _ in range(rows):
        budget = rng.randint(*stage.tokens) - 1 - task.question_tokens
        passages = task.draw_passages(rng, budget, stage.fact_share)
        facts = [passage.fact for passage in passages if passage.fact]
        context = [BOS_ID, *(token for passage in passages for token in passage.ids)]
        asked = rng.sample(facts, min(questions, len(facts)))
        branches = [(encode_question(task.encode, fact.question), [*task.encode(fact.value), EOS_ID]) for fact in asked]
        built.append((context, branches))
    return make_batch(built)


# ---------------------------------------------------------------- training


def answer_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the target tokens."""
    output = model.model(batch.ids, attention_mask=batch.attention_mask(), position_ids=batch.positions)
    hidden = output.last_hidden_state  # [batch, seq, hidden]
    logits = model.lm_head(hidden[:, :-1][batch.is_target[:, 1:]])  # [targets, vocab]
    return F.cross_entropy(logits, batch.ids[:, 1:][batch.is_target[:, 1:]])


@torch.no_grad()
def exact_match(model: Qwen3ForCausalLM, encode: Encode, records: Sequence[Record], rows: int = 16) -> float:
    """Share of records whose greedy answer is exactly right, end token included.

    Greedy decoding yields the expected tokens exactly when each of them is the most likely one after those before it,
    so one forward pass over prompt and expected answer is enough.
    """
    right = 0
    for start in range(0, len(records), rows):
        built = []
        for record in records[start : start + rows]:
            prompt = render_prompt(encode, BOS_ID, [d["text"] for d in record["documents"]], record["question"])
            built.append((prompt, [((), [*encode(record["answers"][0]), EOS_ID])]))
        batch = make_batch(built)
        predicted = model(batch.ids).logits[:, :-1].argmax(-1)
        wrong = (predicted != batch.ids[:, 1:]) & batch.is_target[:, 1:]
        right += int((~wrong.any(1)).sum())
    return right / len(records)


def stage_batches(stage: Stage, settings: Settings, task: FactTask, rng: random.Random) -> Iterator[tuple[str, Batch]]:
    while True:
        if rng.random() < stage.copy_share:
            yield "copy", copy_batch(rng, 2 * settings.contexts)
        else:
            yield "retrieval", retrieval_batch(task, rng, stage, settings.contexts, settings.questions)


class Log:
    """Rows of numbers, to a JSONL file and to the terminal."""

    def __init__(self, path: Path, mode: str):
        self.file = path.open(mode)
        self.start = time.time()

    def write(self, **row: object):
        row["seconds"] = round(time.time() - self.start, 1)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def run_stage(
    stage: Stage,
    settings: Settings,
    model: Qwen3ForCausalLM,
    task: FactTask,
    log: Log,
    evaluate: Callable[[Sequence[int]], dict[str, float]],
) -> None:
    """Train through one stage; its random stream and optimizer are its own, so that a run can start at any stage."""
    rng = random.Random(settings.seed + STAGES.index(stage))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    steps = max(1, round(stage.max_steps * settings.scale_steps))
    counts = {"copy": 0, "retrieval": 0}
    losses = {"copy": math.nan, "retrieval": math.nan}
    for step, (kind, batch) in enumerate(stage_batches(stage, settings, task, rng), 1):
        lr = stage.lr + (stage.final_lr - stage.lr) * step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counts[kind] += 1
        losses[kind] = loss.item() if math.isnan(losses[kind]) else 0.95 * losses[kind] + 0.05 * loss.item()
        finished = step >= steps or (stage.stop_copy_loss is not None and losses["copy"] < stage.stop_copy_loss)
        if finished or step % settings.eval_every == 0:
            shown = {f"loss_{name}": round(value, 4) for name, value in losses.items() if not math.isnan(value)}
            scores = evaluate((96, 192, 384))
            log.write(stage=stage.name, step=step, lr=round(lr, 6), batches=dict(counts), **shown, **scores)
            model.save_pretrained(settings.output)
        if finished:
            return


def write_hashes(output: Path) -> None:
    """`SHA256` in the format of `sha256sum --check`, the weights first."""
    paths = [path for path in output.iterdir() if path.is_file() and path.name != "SHA256"]
    paths.sort(key=lambda path: (path.suffix != ".safetensors", path.name))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    (output / "SHA256").write_text("".join(lines))


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    settings.output.mkdir(parents=True, exist_ok=True)

    encode = make_tokenizer(settings.output, settings.seed).encode
    task = FactTask(encode, "train")

    names = [stage.name for stage in STAGES]
    first = names.index(settings.first_stage)
    model = build_model(settings) if first == 0 else Qwen3ForCausalLM.from_pretrained(settings.output)
    log = Log(settings.output / "training_log.jsonl", "w" if first == 0 else "a")
    log.write(
        settings={name: value for name, value in dataclasses.asdict(settings).items() if name != "output"},
        stages=[dataclasses.asdict(stage) for stage in STAGES[first:]],
        parameters=model.num_parameters(),
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )

    def evaluate(lengths: Sequence[int], items: int = settings.eval_items // 4) -> dict[str, float]:
        sets = {length: make_eval_set(encode, DEV_SEED, length, items) for length in lengths}
        return {f"em_{length}": round(exact_match(model, encode, records), 3) for length, records in sets.items()}

    for stage in STAGES[first:]:
        run_stage(stage, settings, model, task, log, evaluate)
    log.write(**evaluate((48, 96, 128, 192, 256, 384, 512, 768), settings.eval_items))
    write_hashes(settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
