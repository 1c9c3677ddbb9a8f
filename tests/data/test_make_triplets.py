import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from opsd_megatron.config import ChatTemplate
from opsd_megatron.data.documents import count_documents, read_documents, split_document
from opsd_megatron.data.pairs import build_pair
from opsd_megatron.data.records import read_records
from opsd_megatron.data.schema import Document
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import DataError
from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, Sample, ServerInfo, ServerUnreachable
from opsd_megatron.types import VersionSpan

ANSWER = "1: Why {n}?\n2. How {n}?\n3) Who {n}?\nQuestion 4: When {n}?"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_triplets.py"
    spec = importlib.util.spec_from_file_location("make_triplets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_triplets"] = module
    spec.loader.exec_module(module)
    return module


class Scribe:
    """A backend that writes the questions it was told to, and can go away after some requests."""

    def __init__(self, tokenizer: Tokenizer, text: str = ANSWER, finish: Any = "stop", dies_after: int = 10**9):
        self.tokenizer, self.text, self.finish, self.dies_after = tokenizer, text, finish, dies_after
        self.asked: list[GenerateRequest] = []

    def info(self) -> ServerInfo:
        return ServerInfo("s", "exact", True, "float32", self.tokenizer.vocab_size, 4096, "v0")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        if len(self.asked) + len(requests) > self.dies_after:
            raise ServerUnreachable("gone")
        self.asked += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerateRequest) -> GenerateResult:
        ids = self.tokenizer.encode(self.text.format(n=request.seed)) + self.tokenizer.eos_ids[:1]
        spans = (VersionSpan("v0", 0, len(ids)),)
        sample = Sample(ids, (0.0,) * len(ids), self.finish, self.tokenizer.eos_ids[0], spans, "raw")
        return GenerateResult(request.request_id, (sample,), len(request.token_ids), "s")


@pytest.fixture
def documents(tmp_path: Path, paragraphs: list[str]) -> Path:
    """A folder of five documents that are long enough, one short one and one without text."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(3):
        (folder / f"b{number}.txt").write_text(
            "\n\n".join(paragraphs[30 * number : 30 * number + 30]), encoding="utf-8"
        )
    rows: list[dict[str, Any]] = [
        {"id": f"row{n}", "title": "T", "text": "\n\n".join(paragraphs[100 + 30 * n : 130 + 30 * n])} for n in range(2)
    ]
    rows += [{"text": "short"}, {"id": "null", "text": None}]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make(tool: ModuleType, documents: Path, output: Path, backend: Scribe, **changes: Any):
    settings = {
        "documents": (documents,), "tokenizer": Path("here"), "output": output, "min_document_tokens": 500,
        "max_document_tokens": 100_000, "min_chunk_tokens": 100, "max_chunk_tokens": 300, "max_question_tokens": 100,
        "concurrent": 2,
    } | changes  # fmt: skip
    return tool.make_triplets(tool.MakeTriplets(**settings), backend.tokenizer, backend, Console(quiet=True))


def read_all(output: Path) -> dict[str, list[Any]]:
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(output.parent.glob(f"{output.stem}*"))
    }


def test_records_hold_the_document_a_chunk_of_it_and_one_of_the_four_questions(
    tool, documents, chat_tokenizer, tmp_path
):
    output = tmp_path / "out" / "train.jsonl"
    backend = Scribe(chat_tokenizer)
    counts = make(tool, documents, output, backend)
    assert counts == {"kept": 5, "document too short": 1, "no text": 1}
    records = list(read_records(output))
    assert len(records) == 5
    for record, request in zip(records, backend.asked, strict=True):
        (chunk,) = record.short_documents()
        assert chunk.text in record.documents[0].text
        assert chunk.text.strip() in chat_tokenizer.decode(request.token_ids)
        assert re.fullmatch(rf"(Why|How|Who|When) {request.seed}\?", record.question)
        assert record.answers == ()
        assert 95 <= len(chat_tokenizer.encode(chunk.text)) <= 305
        pair = build_pair(record, ChatTemplate(), chat_tokenizer, 3000, 400)
        assert len(pair.student_prompt) > 500
    assert len({record.question.split()[0] for record in records}) > 1


def test_a_run_that_was_stopped_goes_on_to_the_same_files(tool, documents, chat_tokenizer, tmp_path):
    whole, stopped = tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl"
    make(tool, documents, whole, Scribe(chat_tokenizer))
    with pytest.raises(ServerUnreachable):
        make(tool, documents, stopped, Scribe(chat_tokenizer, dies_after=2))
    with stopped.open("a") as file:
        file.write('{"id": "cut off in the mid')
    progress = stopped.with_name("train.progress.jsonl")
    lines = progress.read_text().splitlines(keepends=True)
    progress.write_text("".join(lines[:-1]) + lines[-1][:20])  # the record was written, its mark was not
    again = Scribe(chat_tokenizer)
    counts = make(tool, documents, stopped, again)
    assert counts["kept"] == 5
    assert len(again.asked) == 3
    left, right = read_all(whole), read_all(stopped)
    assert left["train.jsonl"] == right["train.jsonl"]
    assert left["train.corpus.jsonl"] == right["train.corpus.jsonl"]
    key = lambda row: row.get("id", "")  # noqa: E731
    assert sorted(left["train.progress.jsonl"], key=key) == sorted(right["train.progress.jsonl"], key=key)
    idle = Scribe(chat_tokenizer, dies_after=0)
    assert make(tool, documents, stopped, idle) == counts


def test_going_on_with_other_settings_is_refused_by_name(tool, documents, chat_tokenizer, tmp_path):
    output = tmp_path / "train.jsonl"
    make(tool, documents, output, Scribe(chat_tokenizer))
    with pytest.raises(DataError, match=r"seed=0 then, 1 now"):
        make(tool, documents, output, Scribe(chat_tokenizer), seed=1)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("1: a?\n2: b?\n3: c?", "stop", "not four numbered questions"),
        ("1: a?\n2: b?\n3: c?\n4: d?\n5: e?", "stop", "not four numbered questions"),
        ("Sure, here they are.", "stop", "not four numbered questions"),
        (ANSWER, "length", "questions cut off"),
    ],
)
def test_drops_are_counted_by_reason(tool, documents, chat_tokenizer, tmp_path, text: str, finish: str, reason: str):
    counts = make(tool, documents, tmp_path / "train.jsonl", Scribe(chat_tokenizer, text, finish))
    assert counts == {reason: 5, "document too short": 1, "no text": 1}


def test_chunks_that_do_not_exist_or_do_not_fit_the_server_are_counted(tool, documents, chat_tokenizer, tmp_path):
    sizes = {"min_chunk_tokens": 300, "max_chunk_tokens": 301, "chunks_per_document": 2}
    counts = make(tool, documents, tmp_path / "a.jsonl", Scribe(chat_tokenizer), **sizes)
    assert counts["no run of paragraphs of that length"] > 0
    counts = make(tool, documents, tmp_path / "b.jsonl", Scribe(chat_tokenizer), max_question_tokens=4090)
    assert counts["chunk too long for the server"] == 5


def test_a_reasoning_preamble_is_not_read_as_questions(tool):
    assert tool.parse_questions("1: no\n</think>\n" + ANSWER.format(n=1)) == ["Why 1?", "How 1?", "Who 1?", "When 1?"]


def test_a_tokenizer_larger_than_the_served_vocabulary_is_refused(
    tool, documents, chat_tokenizer, plain_tokenizer, tmp_path
):
    backend = Scribe(chat_tokenizer)
    backend.info = lambda: ServerInfo("s", "exact", True, "float32", 10, 4096, "v0")  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"has 700 tokens, the served model 10"):
        make(tool, documents, tmp_path / "train.jsonl", backend)


def test_a_long_document_is_split_into_whole_paragraphs(paragraphs: list[str], plain_tokenizer: Tokenizer):
    document = Document("book", "\n\n".join(paragraphs[:60]))
    pieces = split_document(document, 600, plain_tokenizer)
    assert "".join(piece.text for piece in pieces) == document.text
    assert all(len(plain_tokenizer.encode(piece.text)) <= 610 for piece in pieces)
    assert [piece.id for piece in pieces] == [f"book/{n}" for n in range(len(pieces))]
    assert split_document(document, 10**6, plain_tokenizer) == [document]


def test_documents_are_counted_and_bad_ones_named(documents: Path, tmp_path: Path):
    assert count_documents([documents]) == len(list(read_documents([documents]))) == 7
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl line 2: field 'text'"):
        list(read_documents([bad]))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not a readable UTF-8 text"):
        list(read_documents([latin]))
    with pytest.raises(DataError, match="two documents have the id"):
        list(read_documents([documents, documents]))
    with pytest.raises(DataError, match="no such file"):
        count_documents([tmp_path / "gone.jsonl"])
