"""Real questions and a real novel; skipped unless OPSD_TEST_DATA names a folder that holds them."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from opsd_megatron.config import PlainTemplate
from opsd_megatron.data.evidence import Example, draw_chunk, padded_rows
from opsd_megatron.data.pairs import build_pair, build_prompt
from opsd_megatron.data.schema import Document, Message, Record, parse_record
from opsd_megatron.data.tokenizer import Tokenizer

DATA = Path(os.environ.get("OPSD_TEST_DATA", "/nonexistent"))
PLAIN = PlainTemplate(document="{title}\n{text}\n")


def needs(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"OPSD_TEST_DATA holds no {name}")
    return DATA / name


def test_natural_questions_are_padded_with_passages_that_do_not_answer_them(plain_tokenizer: Tokenizer):
    with gzip.open(needs("nq-open-oracle.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:400]
    passages = [Document(f"p{n}", row["ctxs"][0]["text"], row["ctxs"][0]["title"]) for n, row in enumerate(rows)]
    examples = [
        Example(f"nq{n}", row["question"], (passages[n],), tuple(row["answers"])) for n, row in enumerate(rows[:12])
    ]
    for row in padded_rows(examples, passages, 4000, PLAIN, plain_tokenizer, seed=3):
        record = parse_record(row, "row", lambda _: None)
        pair = build_pair(record, PLAIN, plain_tokenizer, 4000, 1000)
        assert 3800 <= len(pair.student_prompt) == row["meta"]["n_tokens"] <= 4000
        assert any(answer in record.short_documents()[0].text for answer in record.answers)


def test_a_novel_with_a_chunk_of_it_is_trimmed_around_the_chunk(plain_tokenizer: Tokenizer):
    book = Document("book", needs("moby-dick.txt").read_text(encoding="utf-8"), "Moby Dick")
    span = draw_chunk(book, 2000, 4000, plain_tokenizer, random.Random(1))
    assert span is not None
    record = Record("r", (Message("user", "Who speaks?"),), (book,), short_context=span)
    prompt = build_prompt(record, "student", PLAIN, plain_tokenizer, 60_000)
    assert 59_800 <= len(prompt.token_ids) <= 60_000
    assert prompt.dropped_tokens > 100_000
    assert book.text[span.start : span.end].strip() in plain_tokenizer.decode(prompt.token_ids)
