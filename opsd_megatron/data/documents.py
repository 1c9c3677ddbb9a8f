"""A user's own documents: text files, JSON lines with "text", folders of both."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opsd_megatron.data.evidence import paragraph_edges
from opsd_megatron.data.row_files import open_rows
from opsd_megatron.data.schema import Document
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz")


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """All documents in order; one whose text is null or blank has empty text. DataError for what is no document."""
    seen: set[str] = set()
    for document in itertools.chain.from_iterable(map(_documents_of, paths)):
        if document.id in seen:
            raise DataError(f"two documents have the id {document.id!r}; give each its own")
        seen.add(document.id)
        yield document


def count_documents(paths: Sequence[Path]) -> int:
    """How many `read_documents` gives, without reading texts."""
    files = itertools.chain.from_iterable(_files_of(path, path.name) for path in paths)
    return sum(1 if file.suffix in TEXT_SUFFIXES else len(open_rows(file)) for file, _ in files)


def _files_of(path: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Files with the names by which their documents go."""
    if not path.is_dir():
        yield path, name
        return
    for inner in sorted(path.rglob("*")):
        if inner.name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES):
            yield inner, f"{name}/{inner.relative_to(path)}"


def _documents_of(path: Path) -> Iterator[Document]:
    for file, name in _files_of(path, path.name):
        if file.suffix in TEXT_SUFFIXES:
            try:
                yield Document(name, file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: not a readable UTF-8 text: {error}") from error
            continue
        rows = open_rows(file)
        for index in range(len(rows)):
            row = rows.row(index)
            if not isinstance(row, Mapping) or not isinstance(row.get("text"), str | None):
                raise DataError(f"{rows.where(index)}: field 'text': expected text or null")
            yield Document(
                str(row.get("id") or f"{name}:{index + 1}"), row.get("text") or "", str(row.get("title") or "")
            )


def split_document(document: Document, max_tokens: int, tokenizer: Tokenizer) -> list[Document]:
    """The document, or pieces of whole paragraphs of at most `max_tokens`; a longer paragraph is left out."""
    if len(tokenizer.encode(document.text)) <= max_tokens:
        return [document]
    pieces: list[list[tuple[int, int]]] = [[]]
    filled = 0
    for edge in paragraph_edges(document.text):
        tokens = len(tokenizer.encode(document.text[edge[0] : edge[1]]))
        if filled + tokens > max_tokens:
            pieces.append([])
            filled = 0
        if tokens <= max_tokens:
            pieces[-1].append(edge)
            filled += tokens
    texts = [document.text[piece[0][0] : piece[-1][1]] for piece in pieces if piece]
    return [Document(f"{document.id}/{number}", text, document.title) for number, text in enumerate(texts)]
