import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from opsd_megatron.config import PlainTemplate
from opsd_megatron.data.pairs import build_prompt
from opsd_megatron.data.schema import Document, Message, Record
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import DataError
from opsd_megatron.evaluation.exact_match import LengthScore, answer_part, evaluate_lengths, is_exact_match

PLAIN = PlainTemplate()


def make_records(lengths: Sequence[int], **meta: object) -> list[Record]:
    return [
        Record(
            f"r{n}", (Message("user", f"Code {n}?"),), (Document("a", f"Code {n} is {n} {n}."), Document("b", "No.")),
            evidence=("a",), task="eval", answers=(f"{n} {n}",), meta={"n_tokens": length, **meta},
        )
        for n, length in enumerate(lengths)
    ]  # fmt: skip


def answer_number(prompt: tuple[int, ...], tokenizer: Tokenizer) -> int:
    return int(tokenizer.decode(prompt).rsplit("Code ", 1)[1].split("?")[0])


def test_a_response_is_right_when_it_is_the_answer_and_then_ends(plain_tokenizer: Tokenizer):
    answer, (end, *_) = plain_tokenizer.encode("47 12 83"), plain_tokenizer.eos_ids
    right = [(*answer, end), (*answer, end, 5, 6)]
    wrong = [answer, (end,), (*answer[:-1], end), (*answer, 5, end), ()]
    for compare in ("ids", "text"):
        assert all(is_exact_match(response, ["x", "47 12 83"], plain_tokenizer, compare) for response in right)
        assert not any(is_exact_match(response, ["x", "47 12 83"], plain_tokenizer, compare) for response in wrong)


def test_text_comparison_forgives_another_segmentation_and_ids_do_not(plain_tokenizer: Tokenizer):
    pieces = (*plain_tokenizer.encode("4"), *plain_tokenizer.encode("7"), plain_tokenizer.eos_ids[0])
    text = plain_tokenizer.decode(pieces[:-1])
    assert is_exact_match(pieces, [text], plain_tokenizer, "text")
    assert is_exact_match(pieces, [text], plain_tokenizer) == (plain_tokenizer.encode(text) == pieces[:-1])


def test_the_answer_ends_before_the_first_of_any_end_tokens():
    assert answer_part((7, 8, 2, 9, 3), (3, 2)) == ((7, 8), True)
    assert answer_part((7, 8), (3, 2)) == ((7, 8), False)


def test_accuracy_is_counted_by_length_with_binomial_errors(plain_tokenizer: Tokenizer, tmp_path: Path):
    records = make_records([256, 128, 128, 256, 128, 128, 256])

    def generate(prompts):
        """Right for odd numbers."""
        numbers = [answer_number(prompt, plain_tokenizer) for prompt in prompts]
        texts = [f"{n} {n}" if n % 2 else "no" for n in numbers]
        return [(*plain_tokenizer.encode(text), plain_tokenizer.eos_ids[0]) for text in texts]

    path = tmp_path / "runs" / "items.jsonl"
    seen: list[int] = []
    scores = evaluate_lengths(
        generate, records, PLAIN, plain_tokenizer, budget_tokens=500, batch_prompts=3, items_path=path,
        labels={"run": "base"}, on_progress=seen.append,
    )  # fmt: skip
    assert scores == [LengthScore(128, 4, 2), LengthScore(256, 3, 1)]
    assert scores[0].standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 4))
    assert scores[1].row()["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert seen == [3, 6, 7]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 7
    assert sum(row["correct"] for row in rows) == 3
    assert {row["run"] for row in rows} == {"base"}
    assert all(row["length"] == records[int(row["record"][1:])].meta["n_tokens"] for row in rows)


def test_the_nominal_length_goes_before_the_exact_one(plain_tokenizer: Tokenizer):
    records = make_records([126, 128, 127], context_tokens=128)
    scores = evaluate_lengths(lambda prompts: [()] * len(prompts), records, PLAIN, plain_tokenizer, budget_tokens=500)
    assert scores == [LengthScore(128, 3, 0)]


def test_each_view_is_asked_with_its_own_prompt(plain_tokenizer: Tokenizer):
    (record,) = make_records([128])
    for view in ("student", "teacher"):
        asked: list[tuple[int, ...]] = []
        evaluate_lengths(
            lambda prompts, asked=asked: [asked.append(p) or () for p in prompts],
            [record], PLAIN, plain_tokenizer, budget_tokens=500, view=view,
        )  # fmt: skip
        assert asked == [build_prompt(record, view, PLAIN, plain_tokenizer, 500).token_ids]


def test_records_without_answer_or_length_and_lost_responses_are_refused(plain_tokenizer: Tokenizer):
    (good,) = make_records([128])

    def evaluate(record: Record, generate=lambda prompts: [()]):
        return evaluate_lengths(generate, [record], PLAIN, plain_tokenizer, budget_tokens=500)

    with pytest.raises(DataError, match="field 'answers'"):
        evaluate(Record("r", good.messages, good.documents, ("a",), meta={"n_tokens": 3}))
    with pytest.raises(DataError, match=r"field 'meta\.n_tokens'"):
        evaluate(Record("r", good.messages, good.documents, ("a",), answers=("x",)))
    with pytest.raises(DataError, match="1 prompts were sent, 0 responses"):
        evaluate(good, generate=lambda prompts: [])
