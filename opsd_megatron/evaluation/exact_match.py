"""Exact match by context length: greedy answers under a view's prompt, scored, with binomial standard errors.

The model is a callable from prompts to responses, both token ids, so this runs against any server or model.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from opsd_megatron.data.pairs import Template, View, build_prompt
from opsd_megatron.data.schema import Record
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import DataError

Generate = Callable[[Sequence[tuple[int, ...]]], Sequence[Sequence[int]]]
"""Greedy responses to prompts, in their order, as token ids with the end token where one was produced."""
LENGTH_FIELDS = ("context_tokens", "n_tokens")
"""Fields of `meta` that say how long a context is, the nominal length first; the first that is there counts."""


@dataclass(frozen=True)
class LengthScore:
    """Accuracy at one context length."""

    length: int
    items: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.items

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / items): the spread that another draw of as many items would have."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items)

    def row(self) -> dict[str, Any]:
        """Plain values for a JSONL line."""
        rounded = {"accuracy": round(self.accuracy, 6), "standard_error": round(self.standard_error, 6)}
        return asdict(self) | rounded


def answer_part(response: Sequence[int], eos_ids: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The response before its first end token, and whether there was one."""
    end = next((place for place, token in enumerate(response) if token in eos_ids), None)
    return tuple(response[:end]), end is not None


def is_exact_match(
    response: Sequence[int], answers: Sequence[str], tokenizer: Tokenizer, compare: Literal["ids", "text"] = "ids"
) -> bool:
    """Whether the response is one of the answers and then ends.

    ids: the same tokens as the answer tokenized by itself. text: the same decoded text, white space at its ends aside.
    A response without an end token is never right: it had not finished.
    """
    ids, has_ended = answer_part(response, tokenizer.eos_ids)
    if not has_ended:
        return False
    if compare == "ids":
        return any(ids == tokenizer.encode(answer) for answer in answers)
    return tokenizer.decode(ids).strip() in {answer.strip() for answer in answers}


def length_of(record: Record) -> int:
    """The context length that the record is counted under; DataError where its meta does not say."""
    for name in LENGTH_FIELDS:
        if isinstance(value := record.meta.get(name), int):
            return value
    raise DataError(f"{record.where}, record {record.id}: field 'meta.n_tokens': missing; expected the context length")


def evaluate_lengths(
    generate: Generate,
    records: Iterable[Record],
    template: Template,
    tokenizer: Tokenizer,
    *,
    budget_tokens: int,
    view: View = "student",
    compare: Literal["ids", "text"] = "ids",
    batch_prompts: int = 64,
    items_path: Path | None = None,
    labels: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[LengthScore]:
    """Accuracy for each context length among the records, shortest first.

    `view` "teacher" measures the same questions under the short context. `items_path` gets one appended JSONL row per
    item, with `labels` (run, seed, step) in it. `on_progress` is called with the number of items done.
    DataError for a record without answers, and where `generate` does not give one response per prompt.
    """
    records = sorted(records, key=length_of)
    tally: dict[int, list[bool]] = {}
    for start in range(0, len(records), batch_prompts):
        batch = records[start : start + batch_prompts]
        for record in batch:
            if not record.answers:
                raise DataError(f"{record.where}, record {record.id}: field 'answers': missing; evaluation needs one")
        prompts = [build_prompt(record, view, template, tokenizer, budget_tokens) for record in batch]
        responses = generate([prompt.token_ids for prompt in prompts])
        if len(responses) != len(batch):
            raise DataError(f"{len(batch)} prompts were sent, {len(responses)} responses came back; expected as many")
        rows = []
        for record, prompt, response in zip(batch, prompts, responses, strict=True):
            correct = is_exact_match(response, record.answers, tokenizer, compare)
            tally.setdefault(length_of(record), []).append(correct)
            rows.append({
                **(labels or {}), "record": record.id, "length": length_of(record), "view": view,
                "prompt_tokens": len(prompt.token_ids), "dropped_tokens": prompt.dropped_tokens, "correct": correct,
                "response": list(response), "text": tokenizer.decode(response), "answers": list(record.answers),
            })  # fmt: skip
        if items_path is not None:
            append_rows(items_path, rows)
        on_progress(start + len(batch))
    return [LengthScore(length, len(marks), sum(marks)) for length, marks in sorted(tally.items())]


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds JSONL rows to a file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
