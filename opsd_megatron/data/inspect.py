"""Prints what a record becomes: both prompts, their tokens, and where the response starts.

python -m opsd_megatron.data.inspect train.jsonl --tokenizer examples/tiny --record 3
python -m opsd_megatron.data.inspect train.jsonl --tokenizer examples/tiny --sharing
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.text import Text

from opsd_megatron.config import BatchConfig, ChatTemplate, DataConfig, PlainTemplate
from opsd_megatron.data.balance import Limits
from opsd_megatron.data.contexts import context_numbers, runs_of_context
from opsd_megatron.data.packing import measure_sharing, pack
from opsd_megatron.data.pairs import Template, View, build_pair, build_prompt, count_equal_pairs
from opsd_megatron.data.records import Records, read_records
from opsd_megatron.data.schema import Record
from opsd_megatron.data.stream import RecordStream
from opsd_megatron.data.tokenizer import Tokenizer, load_tokenizer
from opsd_megatron.errors import UserError
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan

_PLAIN, _CHAT, _DATA, _BATCH = PlainTemplate(), ChatTemplate(), DataConfig(), BatchConfig()


@dataclass(frozen=True)
class Inspect:
    """Print both rendered prompts of records, or what sharing contexts saves over a whole file."""

    records: tyro.conf.Positional[Path]
    """JSONL (also .gz) or Parquet records."""
    tokenizer: Path
    """Tokenizer directory (Hugging Face, or with a SentencePiece tokenizer.model), or a .model file."""
    record: int = 1
    """First record to print, counted from 1."""
    count: int = 1
    """How many to print."""
    view: Literal["both", "student", "teacher"] = "both"
    """Which prompts to print."""
    chat: bool = False
    """Render with the tokenizer's chat template instead of the plain one."""
    document_template: str | None = None
    """Text of each document with {title} and {text}; by default that of the template."""
    question_template: str | None = None
    """Text of the question with {question}; by default that of the template."""
    student_tokens: int = _DATA.student_tokens
    """Budget of the student prompt; a longer context is trimmed."""
    teacher_tokens: int = _DATA.teacher_tokens
    """Budget of the teacher prompt."""
    max_chars: int = 4000
    """Longer prompts are shown without their middle; 0 shows everything."""
    sharing: bool = False
    """Build every pair of the file and report sizes, trimming and what shared contexts save, instead of prompts."""
    samples: int = 1
    """For --sharing: responses per prompt."""
    response_tokens: int = 16
    """For --sharing: length of a response."""
    prompts_per_step: int = _BATCH.prompts_per_step
    """For --sharing: prompts that are packed together."""
    shuffle: bool = _DATA.shuffle
    """For --sharing: in the order of a shuffled epoch instead of file order."""
    contexts_together: int = _DATA.contexts_together
    """For --sharing: records of one context that stay neighbours when shuffled."""
    min_shared_tokens: int = _BATCH.min_shared_tokens
    """For --sharing: shortest common prefix that is shared."""

    @property
    def template(self) -> Template:
        base = _CHAT if self.chat else _PLAIN
        document = base.document if self.document_template is None else self.document_template
        question = base.question if self.question_template is None else self.question_template
        return type(base)(document=document, question=question)


def run(arguments: Inspect, console: Console) -> None:
    """Prints to `console`; UserError for bad records, tokenizers and numbers."""
    records, tokenizer = read_records(arguments.records), load_tokenizer(arguments.tokenizer)
    if arguments.sharing:
        return print_sharing(records, tokenizer, arguments, console)
    last = arguments.record + arguments.count - 1
    if not 1 <= arguments.record <= last <= len(records):
        asked = f"--record {arguments.record} --count {arguments.count}"
        raise UserError(f"{asked}: {arguments.records} has records 1 to {len(records)}")
    views: tuple[View, ...] = ("student", "teacher") if arguments.view == "both" else (arguments.view,)
    for number in range(arguments.record, last + 1):
        record = records[number - 1]
        console.rule(Text(f"record {number}: {record.id}"))
        for view in views:
            print_prompt(record, view, tokenizer, arguments, console)


def print_prompt(record: Record, view: View, tokenizer: Tokenizer, arguments: Inspect, console: Console) -> None:
    """The prompt as text, decoded from its ids, with evidence and question marked on a terminal."""
    budget = arguments.student_tokens if view == "student" else arguments.teacher_tokens
    prompt = build_prompt(record, view, arguments.template, tokenizer, budget)
    tokens = len(prompt.token_ids)
    console.print(
        Text(
            f"{view} prompt: {tokens} of {budget} tokens, {prompt.dropped_tokens} dropped from the context", "bold cyan"
        )
    )
    text = Text(tokenizer.decode(prompt.token_ids))
    for document in record.short_documents():
        _mark(text, document.text.strip(), "green")
    _mark(text, record.question, "bold yellow")
    if arguments.max_chars and len(text) > arguments.max_chars:
        half = arguments.max_chars // 2
        hidden = Text(f"\n[... {len(text) - 2 * half} characters; --max-chars 0 shows them ...]\n", "dim")
        text = text[:half] + hidden + text[-half:]
    console.print(text, soft_wrap=True)
    console.print(Text(f"^ the response starts here, at token {tokens}", "bold magenta"))


def print_sharing(records: Records, tokenizer: Tokenizer, arguments: Inspect, console: Console) -> None:
    """Prompt sizes of the whole file and, for each view, the tokens and attention pairs that token trees save."""
    contexts = context_numbers(records)
    runs = runs_of_context(contexts, arguments.contexts_together)
    order = RecordStream(records, 0, arguments.shuffle, 0, 1, runs).next_batch(len(records))
    budgets = arguments.student_tokens, arguments.teacher_tokens
    pairs = [build_pair(records[number], arguments.template, tokenizer, *budgets) for number in order]
    trimmed = [pair.dropped_tokens for pair in pairs if pair.dropped_tokens]
    different = len(set(contexts.tolist()))
    console.print(f"{len(pairs)} records of {different} contexts; {len(trimmed)} trimmed, {sum(trimmed)} tokens "
                  f"dropped; {count_equal_pairs(pairs)} with equal prompts", highlight=False)  # fmt: skip
    for view in ("student", "teacher"):
        lengths = sorted(len(getattr(pair, f"{view}_prompt")) for pair in pairs)
        console.print(
            f"{view} prompts: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}",
            highlight=False,
        )
        console.print(f"  {_sharing_of_file(pairs, view, arguments)}", highlight=False)


def _sharing_of_file(pairs: list[PromptPair], view: View, arguments: Inspect) -> str:
    rollouts, batches = [], []
    for start in range(0, len(pairs), arguments.prompts_per_step):
        chunk = pairs[start : start + arguments.prompts_per_step]
        step = [_pretend_rollout(pair, sample, arguments) for pair in chunk for sample in range(arguments.samples)]
        budget = _BATCH.student_microbatch_tokens if view == "student" else _BATCH.teacher_microbatch_tokens
        batches += pack(step, view, Limits(budget, arguments.min_shared_tokens))
        rollouts += step
    return str(measure_sharing(rollouts, view, batches))


def _pretend_rollout(pair: PromptPair, sample: int, arguments: Inspect) -> Rollout:
    """A response of the asked length that agrees with no other sample's: sharing in responses is not counted on."""
    count = arguments.response_tokens
    return Rollout(
        pair=pair, sample=sample, token_ids=(-1 - sample,) * count, logprobs=(0.0,) * count, logprob_kind="raw",
        loss_mask=(True,) * count, finish_reason="length", version_spans=(VersionSpan("", 0, count),),
        turns=(Turn("model", 0, count),), server_id="",
    )  # fmt: skip


def _mark(text: Text, part: str, style: str) -> None:
    place = text.plain.rfind(part)
    if part and place >= 0:
        text.stylize(style, place, place + len(part))


def main() -> None:
    arguments = tyro.cli(Inspect, prog="python -m opsd_megatron.data.inspect")
    try:
        run(arguments, Console(soft_wrap=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
