"""Schema v1 of a record, and the check of a row against it, field by field.

The fields, their meaning and examples are in docs/data.md.
"""

import difflib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

from opsd_megatron.errors import DataError

Task = Literal["opsdl", "opcd", "opsd", "grpo", "dgrpo", "sft", "dpo", "eval"]
Role = Literal["user", "assistant"]
ResolveReference = Callable[[str], Any]  # "corpus.jsonl#12" -> the row there


@dataclass(frozen=True)
class Document:
    """One passage or a whole book; the unit that is a distractor or evidence."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of one document's text."""

    document_id: str
    start: int
    end: int


@dataclass(frozen=True)
class Record:
    """A checked row; texts that were given by reference are filled in."""

    id: str
    messages: tuple[Message, ...]
    """Prior turns and, last, the user's question."""
    documents: tuple[Document, ...] = ()
    """The long context in order; a `long_context` text is one document named "long_context"."""
    evidence: tuple[str, ...] = ()
    """Documents of the short context, in this order."""
    short_context: str | Span | None = None
    """The short context where it is not whole documents."""
    task: Task = "opsdl"
    system: str | None = None
    answers: tuple[str, ...] = ()
    """Read by evaluation and rewards, never by a distillation loss."""
    privileged: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    reward: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    """File and line, for messages."""

    @property
    def question(self) -> str:
        return self.messages[-1].content

    def document(self, document_id: str) -> Document:
        return next(document for document in self.documents if document.id == document_id)

    def short_documents(self) -> tuple[Document, ...]:
        """The teacher's context; empty where the record has none."""
        if isinstance(self.short_context, Span):
            whole = self.document(self.short_context.document_id)
            text = whole.text[self.short_context.start : self.short_context.end]
            return (Document(whole.id, text, whole.title),)
        if self.short_context is not None:
            return (Document("short_context", self.short_context),)
        return tuple(self.document(name) for name in self.evidence)


FIELDS = (
    "id", "task", "system", "question", "messages", "documents", "evidence", "short_context", "long_context",
    "answers", "privileged", "chosen", "rejected", "reward", "meta",
)  # fmt: skip


def parse_record(row: Any, where: str, resolve: ResolveReference) -> Record:
    """The record of one decoded row; DataError naming `where` and the field that does not fit.

    `resolve` gives the corpus row that a document's reference names. A field that is null counts as absent.
    """
    fields = _Fields.of(row, where, allowed=FIELDS)
    task = fields.choice("task", get_args(Task), default="opsdl")
    documents = _parse_documents(fields, resolve)
    names = {document.id for document in documents}
    record = Record(
        id=fields.text("id"),
        messages=_parse_messages(fields),
        documents=documents,
        evidence=_parse_evidence(fields, names),
        short_context=_parse_short_context(fields, documents),
        task=task,
        system=fields.optional_text("system"),
        answers=fields.texts("answers"),
        privileged=fields.optional_text("privileged"),
        chosen=fields.optional_text("chosen"),
        rejected=fields.optional_text("rejected"),
        reward=fields.mapping("reward"),
        meta=fields.mapping("meta"),
        where=where,
    )
    if task == "opsdl" and not documents:
        fields.fail("documents", "missing; task opsdl needs documents or long_context")
    if task == "opsdl" and not record.evidence and record.short_context is None:
        fields.fail("evidence", "missing; task opsdl needs evidence or short_context for the teacher's view")
    return record


class _Fields:
    """Typed access to one JSON object; every failure names the row and the field's path."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = ""):
        self.values, self.where, self.path = values, where, path

    @classmethod
    def of(cls, value: Any, where: str, path: str = "", allowed: tuple[str, ...] | None = None) -> "_Fields":
        if not isinstance(value, Mapping):
            at = f"field '{path}'" if path else "the row"
            raise DataError(f"{where}: {at} is {_kind(value)}; expected a JSON object")
        fields = cls({name: inner for name, inner in value.items() if inner is not None}, where, path)
        for name in fields.values:
            if allowed is not None and name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(allowed)}"
                fields.fail(name, f"unknown; {hint}" + (" Data of your own belongs in 'meta'." if not path else ""))
        return fields

    def name(self, field_name: str) -> str:
        return f"{self.path}.{field_name}" if self.path else field_name

    def fail(self, field_name: str, problem: str) -> NoReturn:
        raise DataError(f"{self.where}: field '{self.name(field_name)}': {problem}")

    def text(self, field_name: str) -> str:
        if field_name not in self.values:
            self.fail(field_name, "missing or null; expected text")
        value = self.values[field_name]
        if not isinstance(value, str):
            self.fail(field_name, f"{_kind(value)}; expected text")
        if not value.strip():
            self.fail(field_name, "empty text")
        return value

    def optional_text(self, field_name: str) -> str | None:
        return self.text(field_name) if field_name in self.values else None

    def items(self, field_name: str) -> list[Any]:
        value = self.values.get(field_name, [])
        if not isinstance(value, list):
            self.fail(field_name, f"{_kind(value)}; expected a list")
        return value

    def texts(self, field_name: str) -> tuple[str, ...]:
        values = self.items(field_name)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                self.fail(f"{field_name}[{index}]", f"{_kind(value)}; expected text")
        return tuple(values)

    def mapping(self, field_name: str) -> Mapping[str, Any]:
        value = self.values.get(field_name, {})
        if not isinstance(value, Mapping):
            self.fail(field_name, f"{_kind(value)}; expected a JSON object")
        return value

    def choice(self, field_name: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        value = self.values.get(field_name, default)
        if value not in choices:
            self.fail(field_name, f"{value!r}; expected one of {', '.join(choices)}")
        return value

    def number(self, field_name: str) -> int:
        value = self.values.get(field_name)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(field_name, f"{_kind(value)}; expected a whole number")
        return value


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "missing or null"}
    return kinds.get(type(value), f"the number {value!r}")


def _parse_messages(fields: _Fields) -> tuple[Message, ...]:
    if "messages" not in fields.values:
        return (Message("user", fields.text("question")),)
    if "question" in fields.values:
        fields.fail("messages", "given beside 'question'; a record has one of the two")
    messages = []
    for index, item in enumerate(fields.items("messages")):
        inner = _Fields.of(item, fields.where, f"messages[{index}]", ("role", "content"))
        messages.append(Message(inner.choice("role", get_args(Role)), inner.text("content")))
    if not messages:
        fields.fail("messages", "empty; expected turns that end with the user's")
    for index, (before, after) in enumerate(itertools.pairwise(messages), 1):
        if before.role == after.role:
            fields.fail(f"messages[{index}]", f"{after.role} follows {before.role}; turns must alternate")
    if messages[0].role != "user" or messages[-1].role != "user":
        fields.fail("messages", "must begin and end with a turn of the user")
    return tuple(messages)


def _parse_documents(fields: _Fields, resolve: ResolveReference) -> tuple[Document, ...]:
    if "long_context" in fields.values:
        if "documents" in fields.values:
            fields.fail("long_context", "given beside 'documents'; a record has one of the two")
        return (Document("long_context", fields.text("long_context")),)
    documents: list[Document] = []
    for index, item in enumerate(fields.items("documents")):
        path = f"documents[{index}]"
        inner = _Fields.of(item, fields.where, path, ("id", "title", "text", "ref"))
        documents.append(_parse_document(inner, index, resolve))
    seen: set[str] = set()
    for index, document in enumerate(documents):
        if document.id in seen:
            fields.fail(f"documents[{index}].id", f"{document.id!r} is the id of an earlier document")
        seen.add(document.id)
    return tuple(documents)


def _parse_document(fields: _Fields, index: int, resolve: ResolveReference) -> Document:
    has_text, reference = "text" in fields.values, fields.optional_text("ref")
    if has_text == (reference is not None):
        fields.fail("text", "missing or null; expected 'text' or 'ref'" if not has_text else "given beside 'ref'")
    name, title = fields.optional_text("id"), fields.values.get("title", "")
    if not isinstance(title, str):
        fields.fail("title", f"{_kind(title)}; expected text")
    if reference is None:
        return Document(name or str(index), fields.text("text"), title)
    try:
        target = resolve(reference)
    except DataError as error:
        fields.fail("ref", f"{reference!r}: {error}")
    found = _Fields.of(target, f"{fields.where}: field '{fields.name('ref')}': {reference!r}")
    own_title = found.values.get("title", "")
    return Document(name or found.optional_text("id") or str(index), found.text("text"), title or str(own_title))


def _parse_evidence(fields: _Fields, names: set[str]) -> tuple[str, ...]:
    evidence = fields.texts("evidence")
    if evidence and "short_context" in fields.values:
        fields.fail("evidence", "given beside 'short_context'; a record has one of the two")
    for index, name in enumerate(evidence):
        if name not in names:
            known = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            fields.fail(f"evidence[{index}]", f"{name!r} is no document of this record; its documents are: {known}")
        if name in evidence[:index]:
            fields.fail(f"evidence[{index}]", f"{name!r} is named twice")
    return evidence


def _parse_short_context(fields: _Fields, documents: tuple[Document, ...]) -> str | Span | None:
    if not isinstance(fields.values.get("short_context"), Mapping):
        return fields.optional_text("short_context")
    inner = _Fields.of(fields.values["short_context"], fields.where, "short_context", ("doc", "start", "end"))
    span = Span(inner.text("doc"), inner.number("start"), inner.number("end"))
    lengths = {document.id: len(document.text) for document in documents}
    if span.document_id not in lengths:
        inner.fail("doc", f"{span.document_id!r} is no document of this record")
    if not 0 <= span.start < span.end <= lengths[span.document_id]:
        length = lengths[span.document_id]
        inner.fail("end", f"[{span.start}, {span.end}) is no part of a text of {length} characters")
    return span
