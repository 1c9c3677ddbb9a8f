"""Making records: gold passages hidden among distractors, and a chunk of a long document with a question.

The rows that come out are plain JSON objects of schema v1, ready for `json.dumps`.
"""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opsd_megatron.data.pairs import Template, count_document_tokens, render
from opsd_megatron.data.schema import Document, Message, Record, Span
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.data.trimming import cut_at_sentence
from opsd_megatron.errors import DataError

DEPTH_BUCKETS = 10
SMALLEST_CUT_TOKENS = 8
"""A remaining room below this is left empty instead of filled with a scrap of a passage."""


@dataclass(frozen=True)
class Example:
    """A question with the passages that answer it."""

    id: str
    question: str
    gold: tuple[Document, ...]
    answers: tuple[str, ...] = ()


def stratified_depths(count: int, seed: int, buckets: int = DEPTH_BUCKETS) -> list[float]:
    """`count` depths in [0, 1): every bucket equally often (to within one), in random order, uniform inside it."""
    rng = random.Random(f"depths {seed}")
    order: list[int] = []
    while len(order) < count:
        order += rng.sample(range(buckets), buckets)
    return [(bucket + rng.random()) / buckets for bucket in order[:count]]


def padded_rows(
    examples: Sequence[Example],
    pool: Sequence[Document],
    budget_tokens: int,
    template: Template,
    tokenizer: Tokenizer,
    seed: int,
) -> Iterable[dict[str, Any]]:
    """One row per example, its gold passages at stratified depths among distractors from the pool.

    The same seed gives the same rows. Errors as in `padded_row`.
    """
    hops = max((len(example.gold) for example in examples), default=0)
    depths = [stratified_depths(len(examples), seed + hop) for hop in range(hops)]
    for number, example in enumerate(examples):
        rng = random.Random(f"{seed} {number} {example.id}")
        chosen = [depths[hop][number] for hop in range(len(example.gold))]
        yield padded_row(example, pool, budget_tokens, chosen, template, tokenizer, rng)


def padded_row(
    example: Example,
    pool: Sequence[Document],
    budget_tokens: int,
    depths: Sequence[float],
    template: Template,
    tokenizer: Tokenizer,
    rng: random.Random,
) -> dict[str, Any]:
    """A row whose student prompt has at most `budget_tokens`, filled up with distractors in random order.

    Gold passage i stands at `depths[i]` of the context's tokens. A distractor is never a gold passage, shares no title
    with one and holds no answer; the last one is cut at a sentence end. DataError where gold and question do not fit,
    or where the pool is used up before the budget.
    """
    fixed = _prompt_tokens(example, example.gold, template, tokenizer)
    if fixed > budget_tokens:
        raise DataError(
            f"example {example.id}: gold passages and question take {fixed} tokens, the budget is {budget_tokens}; "
            "raise the budget or leave the example out"
        )
    fillers = _draw_fillers(example, pool, budget_tokens - fixed, template, tokenizer, rng)
    while True:
        documents, gold_ids = _place(example.gold, fillers, depths, template, tokenizer)
        tokens = _prompt_tokens(example, documents, template, tokenizer)
        if tokens <= budget_tokens:
            break
        fillers = fillers[:-1]  # a chat prompt is a little longer than its pieces; without fillers it fits
    return _row(example, documents, gold_ids, depths, tokens)


def draw_chunk(
    document: Document, min_tokens: int, max_tokens: int, tokenizer: Tokenizer, rng: random.Random
) -> Span | None:
    """A random run of whole paragraphs of min_tokens to max_tokens, contiguous; None where the document has none.

    Paragraphs end at blank lines (LongPO's data preparation, which OPSDL section 3.2 follows). Every paragraph from
    which such a run can start is equally likely; the run's length is drawn among those that fit.
    """
    edges = paragraph_edges(document.text)
    sizes = [len(tokenizer.encode(document.text[start:end])) for start, end in edges]
    starts = list(range(len(edges)))
    rng.shuffle(starts)
    for first in starts:
        ends, total = [], 0
        for last in range(first, len(edges)):
            total += sizes[last]
            if total > max_tokens:
                break
            if total >= min_tokens:
                ends.append(last)
        if ends:
            return Span(document.id, edges[first][0], edges[rng.choice(ends)][1])
    return None


def chunk_row(
    record_id: str, document: dict[str, Any], span: Span, question: str, meta: dict[str, Any]
) -> dict[str, Any]:
    """A row of the paper's form (long document, contiguous chunk, question); `document` holds text or ref."""
    return {
        "id": record_id,
        "task": "opsdl",
        "question": question,
        "documents": [document],
        "short_context": {"doc": span.document_id, "start": span.start, "end": span.end},
        "meta": meta,
    }


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether a normalised answer stands in the normalised text as whole words."""
    words = f" {normalise(text)} "
    return any(f" {wanted} " in words for answer in answers if (wanted := normalise(answer)))


def normalise(text: str) -> str:
    """Lower case without accents, punctuation and articles, single spaces."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(mark for mark in plain if not unicodedata.combining(mark))
    return " ".join(word for word in re.findall(r"\w+", plain) if word not in ("a", "an", "the"))


def _draw_fillers(
    example: Example,
    pool: Sequence[Document],
    room_tokens: int,
    template: Template,
    tokenizer: Tokenizer,
    rng: random.Random,
) -> list[Document]:
    def count(document: Document) -> int:
        return count_document_tokens(document, template, tokenizer)

    used = {normalise(document.text) for document in example.gold}
    titles = {normalise(document.title) for document in example.gold if document.title}
    fillers: list[Document] = []
    for index in rng.sample(range(len(pool)), len(pool)):
        document = pool[index]
        text = normalise(document.text)
        if text in used or normalise(document.title) in titles or contains_answer(document.text, example.answers):
            continue
        used.add(text)
        cost = count(document)
        if cost > room_tokens:
            cut = cut_at_sentence(document, room_tokens, count)
            return fillers + ([cut.document] if cut and cut.tokens >= SMALLEST_CUT_TOKENS else [])
        fillers.append(document)
        room_tokens -= cost
        if room_tokens < SMALLEST_CUT_TOKENS:
            return fillers
    raise DataError(
        f"example {example.id}: the pool of {len(pool)} passages is used up with {room_tokens} tokens left to fill; "
        "give a larger pool or a smaller budget"
    )


def _place(
    gold: Sequence[Document],
    fillers: Sequence[Document],
    depths: Sequence[float],
    template: Template,
    tokenizer: Tokenizer,
) -> tuple[list[Document], list[str]]:
    """Documents renamed d0, d1, ... with the gold at their depths, and the names of the gold in the order given."""
    sizes = [count_document_tokens(document, template, tokenizer) for document in fillers]
    total = sum(sizes)
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    slots = [min(range(len(ends)), key=lambda slot: abs(ends[slot] - depth * total)) for depth in depths]
    items = [(slot, 0, number, document) for number, (slot, document) in enumerate(zip(slots, gold, strict=True))]
    items += [(slot, 1, number, document) for slot, (number, document) in enumerate(enumerate(fillers))]
    items.sort(key=lambda item: item[:3])
    documents = [Document(f"d{place}", item[3].text, item[3].title) for place, item in enumerate(items)]
    names = {item[2]: f"d{place}" for place, item in enumerate(items) if item[1] == 0}
    return documents, [names[number] for number in range(len(gold))]


def _row(
    example: Example, documents: Sequence[Document], gold_ids: list[str], depths: Sequence[float], tokens: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.id, "task": "opsdl", "question": example.question}
    row["documents"] = [
        {"id": document.id, "text": document.text} | ({"title": document.title} if document.title else {})
        for document in documents
    ]
    row["evidence"] = gold_ids
    if example.answers:
        row["answers"] = list(example.answers)
    row["meta"] = {"n_tokens": tokens, "depth": round(depths[0], 4)}
    return row


def _prompt_tokens(example: Example, documents: Sequence[Document], template: Template, tokenizer: Tokenizer) -> int:
    record = Record(id=example.id, messages=(Message("user", example.question),))
    return len(render(record, documents, template, tokenizer))


def paragraph_edges(text: str) -> list[tuple[int, int]]:
    """[start, end) of each paragraph that is not blank, the white space behind it included."""
    cuts = [0, *(match.end() for match in re.finditer(r"\n\s*\n", text)), len(text)]
    return [(start, end) for start, end in itertools.pairwise(cuts) if text[start:end].strip()]
