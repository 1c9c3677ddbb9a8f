import random

import pytest

from opsd_megatron.config import ChatTemplate, PlainTemplate
from opsd_megatron.data.evidence import (
    Example,
    chunk_row,
    contains_answer,
    draw_chunk,
    normalise,
    padded_row,
    padded_rows,
    stratified_depths,
)
from opsd_megatron.data.pairs import build_pair
from opsd_megatron.data.schema import Document, parse_record
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import DataError

PLAIN = PlainTemplate()


def make_examples(count: int, hops: int = 1) -> list[Example]:
    def gold(number: int, hop: int) -> Document:
        return Document(
            f"g{hop}", f"The warden of gate {number} in year {hop} was Zebulon Quill {number}.", f"Gate {hop}"
        )

    return [
        Example(f"e{n}", f"Who kept gate {n}?", tuple(gold(n, h) for h in range(hops)), (f"Zebulon Quill {n}",))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def pool(paragraphs: list[str]) -> list[Document]:
    return [Document(f"p{n}", text) for n, text in enumerate(paragraphs)]


@pytest.mark.parametrize("budget", [150, 600, 2000])
def test_padded_prompts_fill_the_budget_and_say_how_long_they_are(budget: int, pool, plain_tokenizer: Tokenizer):
    for row in padded_rows(make_examples(10), pool, budget, PLAIN, plain_tokenizer, seed=1):
        pair = build_pair(parse_record(row, "row", lambda _: None), PLAIN, plain_tokenizer, budget, 200)
        assert len(pair.student_prompt) == row["meta"]["n_tokens"]
        assert budget - 90 <= len(pair.student_prompt) <= budget
        assert pair.dropped_tokens == 0
        answer = row["answers"][0]
        assert answer in plain_tokenizer.decode(pair.teacher_prompt)


def test_chat_prompts_stay_within_the_budget(pool, chat_tokenizer: Tokenizer):
    for row in padded_rows(make_examples(5), pool, 700, ChatTemplate(), chat_tokenizer, seed=1):
        pair = build_pair(parse_record(row, "row", lambda _: None), ChatTemplate(), chat_tokenizer, 700, 200)
        assert 600 <= len(pair.student_prompt) == row["meta"]["n_tokens"] <= 700


def test_the_same_seed_gives_the_same_rows(pool, plain_tokenizer: Tokenizer):
    rows = [list(padded_rows(make_examples(4), pool, 400, PLAIN, plain_tokenizer, seed)) for seed in (1, 1, 2)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_depths_are_stratified_over_the_buckets():
    for count, seed in ((10, 0), (100, 1), (37, 2)):
        buckets = [int(depth * 10) for depth in stratified_depths(count, seed)]
        counts = [buckets.count(bucket) for bucket in range(10)]
        assert max(counts) - min(counts) <= (count % 10 != 0)


def test_evidence_stands_at_its_depth_and_hops_are_independent(pool, plain_tokenizer: Tokenizer):
    (example,) = make_examples(1, hops=2)
    for depths in ([0.0, 0.95], [0.5, 0.1]):
        row = padded_row(example, pool, 3000, depths, PLAIN, plain_tokenizer, random.Random(0))
        assert [row["documents"][int(name[1:])]["text"] for name in row["evidence"]] == [g.text for g in example.gold]
        sizes = [len(plain_tokenizer.encode(document["text"] + "\n")) for document in row["documents"]]
        for name, depth in zip(row["evidence"], depths, strict=True):
            assert abs(sum(sizes[: int(name[1:])]) / sum(sizes) - depth) < 0.06


def test_no_distractor_holds_the_answer_a_gold_title_or_a_text_twice(pool, plain_tokenizer: Tokenizer):
    (example,) = make_examples(1)
    traps = [
        Document("t1", "Some say that ZEBULON QUILL, 0, was here."),
        Document("t2", "A harmless passage under the title of the gold one.", "gate 0"),
        *[Document(f"t{n}", "This very passage stands in the pool many times over.") for n in range(3, 9)],
    ]
    for seed in range(10):
        row = padded_row(example, traps + pool[:60], 2400, [0.5], PLAIN, plain_tokenizer, random.Random(seed))
        texts = [document["text"] for document in row["documents"]]
        assert traps[0].text not in texts
        assert traps[1].text not in texts
        assert len(set(texts)) == len(texts)


def test_answers_are_found_as_whole_words_whatever_their_dress():
    assert normalise("The Émile-Zola  (novel)") == "emile zola novel"
    assert contains_answer("He read ÉMILE ZOLA.", ["Emile Zola"])
    assert not contains_answer("the cathedral", ["cat"])
    assert not contains_answer("anything", ["", "the"])


def test_what_cannot_be_padded_is_refused_with_numbers(pool, plain_tokenizer: Tokenizer):
    (example,) = make_examples(1)
    with pytest.raises(DataError, match=r"example e0: gold passages and question take \d+ tokens, the budget is 10"):
        padded_row(example, pool, 10, [0.5], PLAIN, plain_tokenizer, random.Random(0))
    with pytest.raises(DataError, match=r"pool of 3 passages is used up with \d+ tokens left"):
        padded_row(example, pool[:3], 5000, [0.5], PLAIN, plain_tokenizer, random.Random(0))


def test_a_chunk_is_a_run_of_whole_paragraphs_within_its_bounds(paragraphs: list[str], plain_tokenizer: Tokenizer):
    document = Document("book", "\n\n".join(paragraphs[:80]))
    starts = set()
    for seed in range(30):
        span = draw_chunk(document, 200, 500, plain_tokenizer, random.Random(seed))
        assert span is not None
        chunk = document.text[span.start : span.end]
        assert all(paragraph in paragraphs for paragraph in chunk.strip().split("\n\n"))
        assert 190 <= len(plain_tokenizer.encode(chunk)) <= 510
        starts.add(span.start)
    assert len(starts) > 15
    assert draw_chunk(document, 10**6, 2 * 10**6, plain_tokenizer, random.Random(0)) is None


def test_a_chunk_row_gives_the_document_to_the_student_and_the_chunk_to_the_teacher(
    paragraphs: list[str], plain_tokenizer: Tokenizer
):
    document = Document("book", "\n\n".join(paragraphs[:30]))
    span = draw_chunk(document, 100, 300, plain_tokenizer, random.Random(0))
    assert span is not None
    row = chunk_row("book-0", {"id": "book", "text": document.text}, span, "What of it?", {"source": "test"})
    record = parse_record(row, "row", lambda _: None)
    assert record.documents[0].text == document.text
    assert record.short_documents()[0].text == document.text[span.start : span.end]
