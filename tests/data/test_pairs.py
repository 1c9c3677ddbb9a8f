import random
import sys
from pathlib import Path

import pytest

from opsd_megatron.config import ChatTemplate, PlainTemplate
from opsd_megatron.data.pairs import Template, build_pair, build_prompt, count_equal_pairs, render
from opsd_megatron.data.schema import Document, Message, Record, Span
from opsd_megatron.data.tokenizer import Tokenizer, load_tokenizer
from opsd_megatron.errors import ConfigError, DataError

PLAIN, CHAT = PlainTemplate("{text}\n", "Q: {question}\nA:"), ChatTemplate()
MANY = 1_000_000
KINDS = ["plain", "chat"]


@pytest.fixture(params=KINDS)
def view_of(request, plain_tokenizer: Tokenizer, chat_tokenizer: Tokenizer) -> tuple[Template, Tokenizer]:
    return (PLAIN, plain_tokenizer) if request.param == "plain" else (CHAT, chat_tokenizer)


def make_record(paragraphs: list[str], rng: random.Random, kind: str = "evidence", count: int = 24) -> Record:
    """A record about paragraphs drawn from the prose, with its short context given in one of the four ways."""
    chosen = rng.sample(paragraphs, count)
    question = (Message("user", f"What does passage {rng.randrange(count)} say about names?"),)
    documents = tuple(Document(f"d{number}", text) for number, text in enumerate(chosen))
    book = (Document("book", "\n\n".join(chosen)),)
    middle = rng.choice(chosen)
    start = book[0].text.index(middle)
    if kind == "evidence":
        names = tuple(rng.sample([document.id for document in documents], rng.randint(1, 3)))
        return Record("r", question, documents, evidence=names)
    if kind == "span":
        return Record("r", question, book, short_context=Span("book", start, start + len(middle)))
    if kind == "text":
        return Record("r", question, book, short_context=middle)
    return Record("r", question, documents, short_context="a summary that stands nowhere in the documents")


def evidence_texts(record: Record) -> list[str]:
    return [] if record.short_context and "summary" in str(record.short_context) else [
        document.text for document in record.short_documents()
    ]  # fmt: skip


def test_a_plain_prompt_is_bos_and_every_piece_tokenized_by_itself(plain_tokenizer: Tokenizer):
    documents = (Document("a", "def"), Document("b", "ault value"))
    record = Record("r", (Message("user", "Which?"),), documents, evidence=("b",))
    pair = build_pair(record, PLAIN, plain_tokenizer, MANY, MANY)
    encode, bos = plain_tokenizer.encode, plain_tokenizer.bos_id
    assert pair.student_prompt == (bos, *encode("def\n"), *encode("ault value\n"), *encode("Q: Which?\nA:"))
    assert pair.teacher_prompt == (bos, *encode("ault value\n"), *encode("Q: Which?\nA:"))
    assert pair.dropped_tokens == 0


def test_the_demo_task_renders_the_same_prompts():
    examples = Path(__file__).parents[2] / "examples"
    if not (examples / "tiny" / "tokenizer.model").is_file():
        pytest.skip("the demo's tokenizer is not here")
    sys.path.insert(0, str(examples))
    try:
        import tiny_task
    finally:
        sys.path.remove(str(examples))
    from opsd_megatron.data.schema import parse_record

    tokenizer = load_tokenizer(examples / "tiny")
    template = PlainTemplate(tiny_task.DOCUMENT_TEMPLATE, tiny_task.QUESTION_TEMPLATE)
    rows = tiny_task.make_training_set(lambda text: list(tokenizer.encode(text)), 0, [128, 256, 512])
    for row in rows:
        pair = build_pair(parse_record(row, "row", lambda _: None), template, tokenizer, 512, 512)
        texts = [document["text"] for document in row["documents"]]
        encode = lambda text: list(tokenizer.encode(text))  # noqa: E731
        assert tokenizer.bos_id is not None
        assert list(pair.student_prompt) == tiny_task.render_prompt(encode, tokenizer.bos_id, texts, row["question"])
        assert len(pair.student_prompt) == row["meta"]["n_tokens"]
        assert len(pair.teacher_prompt) == row["meta"]["n_short_tokens"]


def test_a_chat_prompt_holds_system_context_turns_and_question_in_order(chat_tokenizer: Tokenizer):
    turns = (Message("user", "First?"), Message("assistant", "Yes."), Message("user", "Then?"))
    record = Record("r", turns, (Document("a", "Alpha."),), evidence=("a",), system="Be brief.")
    text = chat_tokenizer.decode(render(record, record.documents, CHAT, chat_tokenizer))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAlpha.\n\nFirst?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nThen?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_both_views_differ_in_the_context_alone(paragraphs: list[str], view_of):
    template, tokenizer = view_of
    record = make_record(paragraphs, random.Random(0))
    pair = build_pair(record, template, tokenizer, MANY, MANY)
    student, teacher = tokenizer.decode(pair.student_prompt), tokenizer.decode(pair.teacher_prompt)
    question = student.rindex("What does passage")
    assert teacher.endswith(student[question:])
    for document in record.documents:
        assert document.text in student
        assert (document.text in teacher) == (document.id in record.evidence)


def test_two_questions_on_one_context_share_all_of_its_ids(paragraphs: list[str], view_of):
    template, tokenizer = view_of
    documents = tuple(Document(f"d{n}", text) for n, text in enumerate(paragraphs[:20]))
    prompts = [
        render(Record("r", (Message("user", question),), documents), documents, template, tokenizer)
        for question in ("How long?", "Who wrote it?")
    ]
    nothing = Record("r", (Message("user", "How long?"),))
    context_tokens = len(prompts[0]) - len(render(nothing, (), template, tokenizer))
    assert prompts[0][:context_tokens] == prompts[1][:context_tokens]


@pytest.mark.parametrize("kind", ["evidence", "span", "text", "summary"])
def test_trimming_fits_the_budget_and_never_touches_evidence_or_question(kind: str, paragraphs: list[str], view_of):
    template, tokenizer = view_of
    for seed in range(12):
        rng = random.Random(seed)
        record = make_record(paragraphs, rng, kind)
        whole = build_prompt(record, "student", template, tokenizer, MANY)
        least = len(render(record, (), template, tokenizer)) + 8
        least += sum(len(tokenizer.encode(text)) + 4 for text in evidence_texts(record))
        budget = rng.randint(least, len(whole.token_ids))
        prompt = build_prompt(record, "student", template, tokenizer, budget)
        text = tokenizer.decode(prompt.token_ids)
        assert len(prompt.token_ids) <= budget
        assert prompt.dropped_tokens == len(whole.token_ids) - len(prompt.token_ids)
        assert text.count(record.question) == 1
        tail = 12
        assert prompt.token_ids[-tail:] == whole.token_ids[-tail:]
        for evidence in evidence_texts(record):
            assert evidence in text


@pytest.mark.parametrize("kind", ["evidence", "span", "text"])
def test_the_tightest_budget_leaves_the_whole_evidence_and_nothing_else(kind: str, paragraphs: list[str], view_of):
    template, tokenizer = view_of
    for seed in range(4):
        record = make_record(paragraphs, random.Random(seed), kind)
        in_order = sorted(record.short_documents(), key=record.documents.index if kind == "evidence" else str)
        least = render(record, in_order, template, tokenizer)
        assert build_prompt(record, "student", template, tokenizer, len(least)).token_ids == least
        with pytest.raises(DataError, match=f"set data.student_tokens to {len(least)}"):
            build_prompt(record, "student", template, tokenizer, len(least) - 1)


def test_trimming_fills_the_budget_to_within_a_sentence(paragraphs: list[str], view_of):
    template, tokenizer = view_of
    for seed in range(8):
        rng = random.Random(seed)
        record = make_record(paragraphs, rng, rng.choice(["evidence", "span", "summary"]))
        whole = len(build_prompt(record, "student", template, tokenizer, MANY).token_ids)
        budget = whole * 3 // 4
        assert budget - len(build_prompt(record, "student", template, tokenizer, budget).token_ids) <= 110


def test_distractors_go_first_where_they_are_farthest_from_the_evidence(plain_tokenizer: Tokenizer):
    documents = tuple(Document(f"d{n}", f"Passage number {n} says nothing.") for n in range(9))
    record = Record("r", (Message("user", "Which?"),), documents, evidence=("d2",))
    kept_by_budget = []
    whole = build_prompt(record, "student", PLAIN, plain_tokenizer, MANY)
    cost = len(plain_tokenizer.encode("Passage number 3 says nothing.\n"))
    for dropped in (1, 4, 6, 8):
        prompt = build_prompt(record, "student", PLAIN, plain_tokenizer, len(whole.token_ids) - dropped * cost)
        text = plain_tokenizer.decode(prompt.token_ids)
        kept_by_budget.append([n for n in range(9) if f"number {n} says nothing" in text])
    assert kept_by_budget == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4], [1, 2, 3], [2]]


def test_a_long_document_is_cut_on_both_sides_of_its_chunk(plain_tokenizer: Tokenizer):
    sentences = [f"Sentence {n} of the book. " for n in range(100)]
    text = "".join(sentences)
    start = text.index("Sentence 40 ")
    end = text.index("Sentence 45 ")
    record = Record("r", (Message("user", "Which?"),), (Document("b", text),), short_context=Span("b", start, end))
    prompt = build_prompt(record, "student", PLAIN, plain_tokenizer, 500)
    kept = [n for n in range(100) if f"Sentence {n} of the book." in plain_tokenizer.decode(prompt.token_ids)]
    assert kept == list(range(kept[0], kept[-1] + 1))
    assert abs((40 - kept[0]) - (kept[-1] - 44)) <= 1
    assert 485 <= len(prompt.token_ids) <= 500


@pytest.mark.parametrize(("view", "budgets"), [("teacher", (MANY, 30)), ("student", (30, MANY))])
def test_evidence_over_the_budget_names_record_numbers_and_remedy(view: str, budgets, plain_tokenizer: Tokenizer):
    text = "a few words that are evidence " * 10
    record = Record("r7", (Message("user", "Q?"),), (Document("d", text),), evidence=("d",), where="train.jsonl line 3")
    tokens = len(render(record, record.documents, PLAIN, plain_tokenizer))
    with pytest.raises(DataError) as error:
        build_pair(record, PLAIN, plain_tokenizer, *budgets)
    assert "train.jsonl line 3, record r7: field 'evidence'" in str(error.value)
    assert f"take {tokens} tokens, the {view} budget is 30" in str(error.value)
    assert f"set data.{view}_tokens to {tokens}" in str(error.value)


def test_equal_views_are_allowed_and_counted(plain_tokenizer: Tokenizer):
    documents = (Document("a", "One."), Document("b", "Two."))
    question = (Message("user", "Q?"),)
    same = Record("same", question, documents, evidence=("a", "b"))
    other = Record("other", question, documents, evidence=("a",))
    pairs = [build_pair(record, PLAIN, plain_tokenizer, MANY, MANY) for record in (same, other)]
    assert pairs[0].student_prompt == pairs[0].teacher_prompt
    assert count_equal_pairs(pairs) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("r", (Message("user", "Q?"),), (Document("a", "x"),), task="eval"), "field 'evidence'"),
        (Record("r", (Message("user", "Q?"),), (Document("a", "x"),), ("a",), system="s"), "field 'system'"),
        (
            Record("r", (Message("user", "a"), Message("assistant", "b"), Message("user", "c")), (), ()),
            "field 'messages'",
        ),
    ],
)
def test_what_the_plain_view_has_no_place_for_is_refused(record: Record, message: str, plain_tokenizer: Tokenizer):
    with pytest.raises(DataError, match=message):
        build_pair(record, PLAIN, plain_tokenizer, MANY, MANY)


def test_braces_in_documents_are_text_and_unknown_ones_in_templates_are_refused(plain_tokenizer: Tokenizer):
    record = Record("r", (Message("user", "{what}?"),), (Document("a", "{text} {0}"),), ("a",))
    text = plain_tokenizer.decode(build_pair(record, PLAIN, plain_tokenizer, MANY, MANY).student_prompt)
    assert "{text} {0}" in text
    assert "{what}?" in text
    for wrong in ("{context}", "{", "{0}"):
        with pytest.raises(ConfigError, match=r"data\.template\.document"):
            build_pair(record, PlainTemplate(document=wrong), plain_tokenizer, MANY, MANY)
