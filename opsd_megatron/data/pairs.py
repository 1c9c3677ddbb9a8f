"""From a record to two prompts: the student's, under the long context, and the teacher's, under the short one.

Both end with the same question, rendered by the same template; only the context differs (OPSDL section 3).
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from opsd_megatron.config import ChatTemplate, DataConfig, PlainTemplate
from opsd_megatron.data.records import Records
from opsd_megatron.data.schema import Document, Record
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.data.trimming import evidence_only, parts_of, trim_context
from opsd_megatron.errors import ConfigError, DataError
from opsd_megatron.types import PromptPair

Template = PlainTemplate | ChatTemplate
View = Literal["student", "teacher"]


@dataclass(frozen=True)
class Prompt:
    """One rendered view; the response starts behind its last token."""

    token_ids: tuple[int, ...]
    dropped_tokens: int = 0


def build_pair(
    record: Record, template: Template, tokenizer: Tokenizer, student_tokens: int, teacher_tokens: int
) -> PromptPair:
    """Both prompts of a record as token ids, each within its budget.

    An over-long student context is trimmed (`trimming`) and counted in `dropped_tokens`. DataError where evidence and
    question alone exceed a budget, where the record has no short context, and where the template has no place for
    what the record holds.
    """
    student = build_prompt(record, "student", template, tokenizer, student_tokens)
    teacher = build_prompt(record, "teacher", template, tokenizer, teacher_tokens)
    return PromptPair(record.id, student.token_ids, teacher.token_ids, student.dropped_tokens)


def build_pairs(records: Records, numbers: Iterable[int], config: DataConfig, tokenizer: Tokenizer) -> list[PromptPair]:
    """The pairs of the records with these numbers, as a run of that config is asked them."""
    budgets = config.student_tokens, config.teacher_tokens
    return [build_pair(records[number], config.template, tokenizer, *budgets) for number in numbers]


def build_prompt(record: Record, view: View, template: Template, tokenizer: Tokenizer, budget_tokens: int) -> Prompt:
    """One view of a record within `budget_tokens`; errors as in `build_pair`."""
    if view == "student":
        return _student_prompt(record, template, tokenizer, budget_tokens)
    documents = record.short_documents()
    if not documents:
        raise DataError(
            f"{_name(record)}: field 'evidence': missing; the teacher's view needs evidence or short_context"
        )
    token_ids = render(record, documents, template, tokenizer)
    if len(token_ids) > budget_tokens:
        raise _over_budget(record, "teacher", len(token_ids), budget_tokens)
    return Prompt(token_ids)


def count_equal_pairs(pairs: Iterable[PromptPair]) -> int:
    """Pairs whose two prompts are equal: they teach nothing, and are there on purpose only in a control run."""
    return sum(pair.student_prompt == pair.teacher_prompt for pair in pairs)


def render(record: Record, documents: Sequence[Document], template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of the record's question under these documents, however long.

    PlainTemplate: bos if the tokenizer has one, then every document and the question, each tokenized by itself, so
    that prompts which share documents share ids. ChatTemplate: the documents open the first turn of the user.
    """
    if isinstance(template, PlainTemplate):
        _refuse_turns(record)
        pieces = [render_document(document, template) for document in documents]
        pieces.append(_fill(template.question, "question", question=record.question))
        bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        return bos + tuple(token for piece in pieces for token in tokenizer.encode(piece))
    turns = [{"role": message.role, "content": message.content} for message in record.messages]
    turns[-1]["content"] = _fill(template.question, "question", question=record.question)
    context = "".join(render_document(document, template) for document in documents)
    turns[0]["content"] = context + turns[0]["content"]
    if record.system is not None:
        turns.insert(0, {"role": "system", "content": record.system})
    return tokenizer.encode_chat(turns, enable_thinking=template.enable_thinking)


def render_document(document: Document, template: Template) -> str:
    """Text of a document as it stands in the prompt."""
    return _fill(template.document, "document", title=document.title, text=document.text)


def count_document_tokens(document: Document, template: Template, tokenizer: Tokenizer) -> int:
    """Tokens of one document; exact under PlainTemplate, near it under a chat template."""
    return len(tokenizer.encode(render_document(document, template)))


def _student_prompt(record: Record, template: Template, tokenizer: Tokenizer, budget_tokens: int) -> Prompt:
    whole = render(record, record.documents, template, tokenizer)
    if len(whole) <= budget_tokens:
        return Prompt(whole)
    parts = parts_of(record)
    least = render(record, evidence_only(parts), template, tokenizer)
    if len(least) > budget_tokens:
        raise _over_budget(record, "student", len(least), budget_tokens)
    count = functools.cache(lambda document: count_document_tokens(document, template, tokenizer))
    room = budget_tokens - len(least)
    while room > 0:
        kept = trim_context(parts, room, count)
        trimmed = render(record, kept, template, tokenizer)
        if len(trimmed) <= budget_tokens:
            return Prompt(trimmed, len(whole) - len(trimmed))
        room -= len(trimmed) - budget_tokens  # pieces of a chat prompt do not add up to the token
    return Prompt(least, len(whole) - len(least))


def _over_budget(record: Record, view: View, tokens: int, budget: int) -> DataError:
    field = "short_context" if record.short_context is not None else "evidence"
    return DataError(
        f"{_name(record)}: field '{field}': evidence and question take {tokens} tokens, the {view} budget is {budget} "
        f"and neither is ever cut; set data.{view}_tokens to {tokens} or more, or shorten the evidence"
    )


def _refuse_turns(record: Record) -> None:
    if record.system is not None:
        raise DataError(f"{_name(record)}: field 'system': PlainTemplate has no place for it; use ChatTemplate")
    if len(record.messages) > 1:
        raise DataError(f"{_name(record)}: field 'messages': PlainTemplate has no turns; use ChatTemplate")


def _fill(template: str, field: str, **values: str) -> str:
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        known = " and ".join("{" + name + "}" for name in values)
        raise ConfigError(
            f"data.template.{field}={template!r}: {error!r}; it may name {known}; write other braces doubled"
        ) from None


def _name(record: Record) -> str:
    return f"{record.where}, record {record.id}" if record.where else f"record {record.id}"
