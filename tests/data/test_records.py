import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from opsd_megatron.data.records import Records, read_records
from opsd_megatron.data.row_files import JsonLines, open_rows
from opsd_megatron.data.schema import Span
from opsd_megatron.errors import DataError


def good_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "r1",
        "question": "Who?",
        "documents": [{"id": "d0", "text": "Nobody."}, {"id": "d1", "title": "T", "text": "It was Ada."}],
        "evidence": ["d1"],
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


BAD_ROWS = {
    "no id": (good_row(id=...), "field 'id': missing"),
    "null id": (good_row(id=None), "field 'id': missing or null"),
    "number as id": (good_row(id=7), "field 'id': the number 7; expected text"),
    "no question": (good_row(question=...), "field 'question': missing"),
    "empty question": (good_row(question=" \n"), "field 'question': empty text"),
    "question is a list": (good_row(question=["Who?"]), "field 'question': a list; expected text"),
    "question and messages": (good_row(messages=[{"role": "user", "content": "x"}]), "field 'messages': given beside"),
    "assistant last": (
        good_row(question=..., messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        "field 'messages': must begin and end with a turn of the user",
    ),
    "turn without content": (
        good_row(question=..., messages=[{"role": "user"}]),
        "field 'messages[0].content': missing",
    ),
    "no documents": (good_row(documents=..., evidence=..., short_context="x"), "field 'documents': missing"),
    "documents is text": (good_row(documents="long text"), "field 'documents': text; expected a list"),
    "null document": (good_row(documents=[None], evidence=...), "field 'documents[0]' is missing or null"),
    "document with null text": (
        good_row(documents=[{"id": "d0", "text": "x"}, {"id": "d1", "text": None}]),
        "field 'documents[1].text': missing or null",
    ),
    "empty document": (good_row(documents=[{"id": "d1", "text": ""}]), "field 'documents[0].text': empty text"),
    "text and ref": (good_row(documents=[{"id": "d1", "text": "x", "ref": "c.jsonl#1"}]), "given beside 'ref'"),
    "two documents of one id": (
        good_row(documents=[{"id": "d1", "text": "x"}, {"id": "d1", "text": "y"}]),
        "field 'documents[1].id': 'd1' is the id of an earlier document",
    ),
    "documents and long_context": (good_row(long_context="x"), "field 'long_context': given beside 'documents'"),
    "unknown evidence": (good_row(evidence=["d9"]), "field 'evidence[0]': 'd9' is no document"),
    "evidence named twice": (good_row(evidence=["d1", "d1"]), "field 'evidence[1]': 'd1' is named twice"),
    "evidence is text": (good_row(evidence="d1"), "field 'evidence': text; expected a list"),
    "no evidence": (good_row(evidence=...), "field 'evidence': missing; task opsdl needs"),
    "evidence and short_context": (good_row(short_context="x"), "field 'evidence': given beside 'short_context'"),
    "span past the end": (
        good_row(evidence=..., short_context={"doc": "d0", "start": 0, "end": 99}),
        "field 'short_context.end': [0, 99) is no part of a text of 7 characters",
    ),
    "span in no document": (
        good_row(evidence=..., short_context={"doc": "d7", "start": 0, "end": 1}),
        "field 'short_context.doc': 'd7'",
    ),
    "span with text as number": (
        good_row(evidence=..., short_context={"doc": "d0", "start": "0", "end": 1}),
        "field 'short_context.start': text; expected a whole number",
    ),
    "answers is text": (good_row(answers="Ada"), "field 'answers': text; expected a list"),
    "answer is a number": (good_row(answers=[1815]), "field 'answers[0]': the number 1815; expected text"),
    "meta is a list": (good_row(meta=[]), "field 'meta': a list; expected a JSON object"),
    "unknown task": (good_row(task="opsld"), "field 'task': 'opsld'; expected one of opsdl"),
    "misspelt field": (good_row(evidences=["d1"]), "field 'evidences': unknown; did you mean 'evidence'?"),
    "row is a list": ([1], "the row is a list; expected a JSON object"),
    "cut JSON": ('{"id": "r2", "question": "Wh', "not a JSON value"),
    "reference to no file": (
        good_row(documents=[{"id": "d1", "ref": "gone.jsonl#1"}]),
        "field 'documents[0].ref': 'gone.jsonl#1'",
    ),
    "malformed reference": (good_row(documents=[{"id": "d1", "ref": "corpus.jsonl"}]), "expected '<file>#<line>'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(name: str, tmp_path: Path):
    bad, message = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "train.jsonl", [good_row(id="r0"), "", bad])
    with pytest.raises(DataError) as error:
        read_records(path)
    assert f"{path} line 3" in str(error.value)
    assert message in str(error.value)
    assert "line 1" not in str(error.value)


def test_an_id_that_occurs_twice_names_both_lines(tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", [good_row(), good_row(id="r2"), good_row()])
    with pytest.raises(DataError, match=r"line 3: field 'id': 'r1' is the id of .*train.jsonl line 1 too"):
        read_records(path)


def test_a_file_with_many_bad_rows_shows_ten_and_counts_the_rest(tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", [good_row(id=str(n), question=None) for n in range(14)])
    with pytest.raises(DataError) as error:
        read_records(path)
    assert "line 10" in str(error.value)
    assert "line 11" not in str(error.value)
    assert "and 4 more" in str(error.value)


@pytest.mark.parametrize("name", ["train.csv", "gone.jsonl", "empty.jsonl", "cut.jsonl.gz", "cut.parquet"])
def test_an_unusable_file_is_a_data_error_that_names_it(name: str, tmp_path: Path):
    path = tmp_path / name
    if name.startswith("empty"):
        path.write_text("\n\n")
    elif not name.startswith("gone"):
        path.write_bytes(gzip.compress(json.dumps(good_row()).encode() * 1000)[:-20])
    with pytest.raises(DataError, match=name):
        read_records(path)


def test_a_large_file_is_checked_as_it_is_read(tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", [good_row(), good_row(id=None)])
    records = read_records(path, check_all_below_bytes=0)
    assert records[0].id == "r1"
    with pytest.raises(DataError, match="line 2"):
        records[1]


def all_fields() -> list[dict[str, Any]]:
    return [
        good_row(answers=["Ada", "Ada L."], meta={"n_tokens": 9}, system="Be brief.", task="eval"),
        good_row(id="r2", evidence=["d1", "d0"]),
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    return path


def test_gzip_and_parquet_give_the_same_records_as_plain_jsonl(tmp_path: Path):
    plain = write_jsonl(tmp_path / "a.jsonl", all_fields())
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = write_parquet(tmp_path / "a.parquet", all_fields())
    for path in (packed, table):
        for one, other in zip(read_records(plain), read_records(path), strict=True):
            assert {**vars(one), "where": ""} == {**vars(other), "where": ""}


def test_a_bad_parquet_row_is_named_by_row_and_field(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", [good_row(), good_row(id="r2", question=None)])
    with pytest.raises(DataError, match=r"a.parquet row 2: field 'question': missing or null"):
        read_records(path)


def test_records_are_read_in_any_order_and_from_the_end(tmp_path: Path):
    rows = [good_row(id=str(number), question="é" * number + "?") for number in range(50)]
    records = read_records(write_jsonl(tmp_path / "train.jsonl", rows))
    for number in (49, 0, 17, 17, 3, -1):
        assert records[number].question == rows[number]["question"]
    with pytest.raises(IndexError):
        records[50]


def test_references_take_text_title_and_id_from_the_line_of_the_corpus(tmp_path: Path):
    write_jsonl(tmp_path / "corpus.jsonl", ["", {"id": "book", "title": "B", "text": "A long book."}])
    documents = [{"ref": "corpus.jsonl#2"}, {"id": "mine", "title": "M", "ref": "corpus.jsonl#2"}]
    row = good_row(documents=documents, evidence=["book"])
    record = read_records(write_jsonl(tmp_path / "train.jsonl", [row]))[0]
    assert [(d.id, d.title, d.text) for d in record.documents] == [
        ("book", "B", "A long book."),
        ("mine", "M", "A long book."),
    ]
    row["documents"][0]["ref"] = "corpus.jsonl#1"
    with pytest.raises(DataError, match=r"train.jsonl line 1: field 'documents\[0\].ref'.*has no row on line 1"):
        read_records(write_jsonl(tmp_path / "train.jsonl", [row]))


def test_short_documents_are_the_evidence_in_its_order_or_the_span_or_the_text(tmp_path: Path):
    rows = [
        good_row(evidence=["d1", "d0"]),
        good_row(id="r2", evidence=..., short_context={"doc": "d1", "start": 7, "end": 10}),
        good_row(id="r3", evidence=..., short_context="a summary"),
        good_row(id="r4", documents=..., evidence=..., long_context="all of it", short_context="of"),
    ]
    records = read_records(write_jsonl(tmp_path / "train.jsonl", rows))
    texts = [[document.text for document in record.short_documents()] for record in records]
    assert texts == [["It was Ada.", "Nobody."], ["Ada"], ["a summary"], ["of"]]
    assert records[1].short_context == Span("d1", 7, 10)
    assert [document.text for document in records[3].documents] == ["all of it"]


def test_the_kept_index_is_used_and_made_anew_when_the_file_changes(tmp_path: Path):
    path = write_jsonl(tmp_path / "train.jsonl", [good_row(), "", good_row(id="r2")])
    JsonLines(path, index_file_from_bytes=0)
    index = tmp_path / "train.jsonl.idx"
    assert index.exists()
    before = index.stat().st_mtime_ns
    again = JsonLines(path, index_file_from_bytes=0)
    assert index.stat().st_mtime_ns == before
    assert again.where(1).endswith("line 3")
    with path.open("a") as file:
        file.write(json.dumps(good_row(id="r3")) + "\n")
    assert Records(open_rows(path, index_file_from_bytes=0))[2].id == "r3"
    index.write_bytes(index.read_bytes()[:-8])
    assert Records(open_rows(path, index_file_from_bytes=0))[2].id == "r3"
    assert not list(tmp_path.glob("*.part"))


def test_an_index_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "train.jsonl", [good_row()])

    def refuse(*_: Any):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert Records(open_rows(path, index_file_from_bytes=0))[0].id == "r1"
    assert sorted(tmp_path.iterdir()) == [path]
