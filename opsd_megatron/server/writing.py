"""The text of one sample as its tokens come: whole characters only, ended by the first stop string."""

from collections.abc import Sequence

from opsd_megatron.server.text import Text

INCOMPLETE = "\ufffd"
WINDOW = 64
"""Tokens after which bytes that are no UTF-8 are taken as they are."""


class Pieces:
    """Splits the text of a growing token sequence into what each token added.

    A token may end inside a character; its bytes are then part of the piece of the token that completes it. Tokens are
    decoded together with those before them, because some tokenizers write a token differently at the start.
    """

    def __init__(self, text: Text, skip_special: bool):
        self._text, self._skip_special = text, skip_special
        self._window: list[int] = []
        self._settled = 0
        """Characters of the window that were given out."""

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        written = self._text.decode(self._window, self._skip_special)
        is_long = len(self._window) > WINDOW
        incomplete = 0 if is_long else min(3, len(written) - len(written.rstrip(INCOMPLETE)))
        piece = written[self._settled : len(written) - incomplete]
        self._settled += len(piece)
        if is_long or (piece and not incomplete):
            self._window = [token_id]
            self._settled = len(self._text.decode(self._window, self._skip_special))
        return piece

    def rest(self) -> str:
        """What is left when no token follows."""
        return self._text.decode(self._window, self._skip_special)[self._settled :]


class Writing:
    """One sample's text. `stops` end it and are not part of it, as are not the tokens `stop_token_ids`."""

    def __init__(self, text: Text | None, stops: Sequence[str], stop_token_ids: frozenset[int], skip_special: bool):
        self.stops = [stop for stop in stops if stop]
        self.stop: str | None = None
        """The stop string that ended it."""
        self.written = ""
        self._text, self._skip_special = text, skip_special
        self._pieces = Pieces(text, skip_special) if text else None
        self._stop_token_ids = stop_token_ids
        self._seen = self._given = 0

    @classmethod
    def of_nothing(cls) -> "Writing":
        """For samples whose text nobody asks for."""
        return cls(None, (), frozenset(), True)

    def extend(self, token_ids: Sequence[int]) -> int | None:
        """`token_ids` are all so far. After how many of them a stop string was complete; None where none is."""
        while self._pieces and self.stop is None and self._seen < len(token_ids):
            token_id = token_ids[self._seen]
            self._seen += 1
            if token_id not in self._stop_token_ids:
                self._write(self._pieces.add(token_id))
        return self._seen if self.stop is not None else None

    def finish(self, token_ids: Sequence[int]) -> None:
        """These are all tokens that it will ever have."""
        if self._text is None or self.stop is not None:
            return
        if self._seen or self.stops:
            self.extend(token_ids)
            self._write(self._pieces.rest() if self._pieces and self.stop is None else "")
        else:
            kept = [token_id for token_id in token_ids if token_id not in self._stop_token_ids]
            self.written = self._text.decode(kept, self._skip_special)

    def take(self, is_last: bool) -> str:
        """The text since the last call, without an end that a stop string may begin with."""
        end = len(self.written)
        if not is_last and self.stop is None:
            longest = max(map(len, self.stops), default=1)
            held = range(min(longest - 1, end), 0, -1)
            end -= next((size for size in held if any(s.startswith(self.written[-size:]) for s in self.stops)), 0)
        start, self._given = self._given, max(self._given, end)
        return self.written[start:end]

    def _write(self, piece: str) -> None:
        searched = max(0, len(self.written) - max(map(len, self.stops), default=0))
        self.written += piece
        found = [(at, stop) for stop in self.stops if (at := self.written.find(stop, searched)) >= 0]
        if piece and found:
            at, self.stop = min(found)
            self.written = self.written[:at]
