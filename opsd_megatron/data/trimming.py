"""Cutting an over-long context: distractors first, the farthest from the evidence first; never the evidence.

Distance is counted in documents; inside the document that holds the evidence, in characters. A context without known
evidence loses its end. The document at the border is cut at a line or sentence where there is one.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opsd_megatron.data.schema import Document, Record, Span

LONGEST_PIECE_CHARS = 200
STRAIGHT_LINES = 8
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n+")

CountTokens = Callable[[Document], int]


class Part(NamedTuple):
    """A document of the context and the characters [start, end) of it that must stay; start = end where none must."""

    document: Document
    start: int
    end: int

    @property
    def has_evidence(self) -> bool:
        return self.start < self.end

    def cut(self, start: int, end: int) -> Document:
        return Document(self.document.id, self.document.text[start:end], self.document.title)

    @property
    def evidence(self) -> Document:
        return self.cut(self.start, self.end)


def parts_of(record: Record) -> tuple[Part, ...]:
    """The long context with its evidence located: by document ids, by span, or by finding the short context's text."""
    short = record.short_context
    parts = []
    for document in record.documents:
        start = end = 0
        if document.id in record.evidence:
            end = len(document.text)
        elif isinstance(short, Span) and short.document_id == document.id:
            start, end = short.start, short.end
        elif isinstance(short, str) and (found := document.text.find(short)) >= 0:
            start, end = found, found + len(short)
        parts.append(Part(document, start, end))
    return tuple(parts)


def evidence_only(parts: Sequence[Part]) -> tuple[Document, ...]:
    """The least that a trimmed context can be."""
    return tuple(part.evidence for part in parts if part.has_evidence)


def trim_context(parts: Sequence[Part], room_tokens: int, count_tokens: CountTokens) -> tuple[Document, ...]:
    """The documents that fit `room_tokens` beside the evidence, in their order, the border one cut.

    `room_tokens` is for everything but the evidence. `count_tokens` gives the tokens of one document as it will stand
    in the prompt.
    """
    kept: dict[int, Document] = {index: part.evidence for index, part in enumerate(parts) if part.has_evidence}
    for index in _nearest_first(parts):
        part = parts[index]
        least = count_tokens(part.evidence) if part.has_evidence else 0
        cost = count_tokens(part.document) - least
        if cost <= room_tokens:
            kept[index] = part.document
            room_tokens -= cost
            continue
        shorter = _cut_part(part, _faces_back(parts, index), room_tokens + least, count_tokens)
        if shorter is not None:
            kept[index] = shorter
        break
    return tuple(kept[index] for index in sorted(kept))


def _nearest_first(parts: Sequence[Part]) -> list[int]:
    """Documents in the order in which they get room: those with evidence, then by distance, then from the start."""
    places = [index for index, part in enumerate(parts) if part.has_evidence] or [0]
    return sorted(range(len(parts)), key=lambda index: (min(abs(index - place) for place in places), index))


def _faces_back(parts: Sequence[Part], index: int) -> bool:
    """Whether the nearest evidence follows document `index`, so that its end is worth more than its start."""
    places = [place for place, part in enumerate(parts) if part.has_evidence]
    return bool(places) and min(places, key=lambda place: (abs(index - place), place)) > index


def _cut_part(part: Part, keep_end: bool, room_tokens: int, count_tokens: CountTokens) -> Document | None:
    """The longest stretch of the document, grown piece by piece from what must stay, that fits; None if empty."""
    text = part.document.text
    start, end = (part.start, part.end) if part.has_evidence else ((len(text),) * 2 if keep_end else (0, 0))
    stretches = [(start, end)]
    for piece_start, piece_end in _pieces_outwards(text, start, end):
        stretches.append((min(stretches[-1][0], piece_start), max(stretches[-1][1], piece_end)))
    longest = _last_that_fits(stretches, room_tokens, lambda stretch: count_tokens(part.cut(*stretch)))
    start, end = stretches[longest]
    return part.cut(start, end) if text[start:end].strip() else None


def _last_that_fits(
    stretches: Sequence[tuple[int, int]], room_tokens: int, count: Callable[[tuple[int, int]], int]
) -> int:
    """Number of the last stretch within the room, where the first is taken for granted and the last is too long.

    Tokens are nearly proportional to characters, so a straight line between the known stretches finds it in a few
    counts, and a book is not tokenized once for every bit of its length. Halving ends what does not converge.
    """
    widths = [end - start for start, end in stretches]
    good, bad = 0, len(stretches) - 1
    good_tokens, bad_tokens = count(stretches[good]), count(stretches[bad])
    counted = 0
    while bad - good > 1:
        share = max(0, room_tokens - good_tokens) / max(1, bad_tokens - good_tokens)
        aim = bisect_right(widths, widths[good] + share * (widths[bad] - widths[good])) - 1
        middle = min(max(aim, good + 1), bad - 1) if counted < STRAIGHT_LINES else (good + bad) // 2
        tokens = count(stretches[middle])
        counted += 1
        if tokens <= room_tokens:
            good, good_tokens = middle, tokens
        else:
            bad, bad_tokens = middle, tokens
    return good


def _pieces_outwards(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The pieces of the text outside [start, end), nearest first."""
    before = _pieces(text, 0, start)
    after = _pieces(text, end, len(text))
    distances = [(start - piece[1], 0, piece) for piece in before] + [(piece[0] - end, 1, piece) for piece in after]
    return [piece for _, _, piece in sorted(distances)]


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) cut at sentence and line ends, and inside longer runs at white space or at a fixed length."""
    cuts = [match.end() for match in _SENTENCE_END.finditer(text, start, end)]
    pieces, at = [], start
    for cut in [*cuts, end]:
        while cut - at > LONGEST_PIECE_CHARS:
            space = text.rfind(" ", at + 1, at + LONGEST_PIECE_CHARS)
            next_at = space + 1 if space > 0 else at + LONGEST_PIECE_CHARS
            pieces.append((at, next_at))
            at = next_at
        if cut > at:
            pieces.append((at, cut))
            at = cut
    return pieces


@dataclass(frozen=True)
class SentenceCut:
    """A document cut to a budget, and its size."""

    document: Document
    tokens: int


def cut_at_sentence(document: Document, room_tokens: int, count_tokens: CountTokens) -> SentenceCut | None:
    """The longest start of the document that ends at a piece and fits; None if no piece does."""
    whole = count_tokens(document)
    if whole <= room_tokens:
        return SentenceCut(document, whole)
    shorter = _cut_part(Part(document, 0, 0), False, room_tokens, count_tokens)
    return None if shorter is None else SentenceCut(shorter, count_tokens(shorter))
