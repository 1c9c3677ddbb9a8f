"""One face for Hugging Face and SentencePiece tokenizers: text to ids without special tokens, and back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from opsd_megatron.errors import DataError
from opsd_megatron.types import vocabulary_fingerprint


@runtime_checkable
class Tokenizer(Protocol):
    """What the program needs of a tokenizer."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends a response; the tokenizer's own end token first."""
    pad_id: int
    """An id to fill with; 0 where the tokenizer names none."""
    vocab_size: int
    """Number of ids; a model's embedding may have more rows."""
    fingerprint: str
    """`vocabulary_fingerprint` of the vocabulary."""
    has_chat_template: bool

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the text alone: nothing is put before or after it."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids, special tokens shown by name where the tokenizer can."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **flags: Any) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant begins to answer; DataError without a chat template."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, of a directory with only a SentencePiece `tokenizer.model`, or of a
    .model file. Code that comes with a tokenizer is never run. DataError where there is none or it does not load.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    raise DataError(
        f"{path}: no tokenizer; expected tokenizer.json, tokenizer_config.json or a SentencePiece tokenizer.model"
    )


class HuggingFaceTokenizer:
    """A tokenizer of transformers; stop ids also come from generation_config.json."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises whatever the broken file led to
            raise DataError(f"{directory}: the tokenizer does not load: {error}") from error
        self._directory = directory
        own = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_ids = tuple(dict.fromkeys(own + _configured_eos_ids(directory)))
        self.pad_id: int = self._tokenizer.pad_token_id or 0
        self.vocab_size = len(self._tokenizer)
        self.fingerprint = vocabulary_fingerprint(self._tokenizer.get_vocab())
        self.has_chat_template = bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str) -> tuple[int, ...]:
        # verbose=False: a document longer than the model's context is no mistake, the budget is applied later
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **flags: Any) -> tuple[int, ...]:
        if not self.has_chat_template:
            raise DataError(
                f"{self._directory}: the tokenizer has no chat template; set data.template to PlainTemplate"
            )
        turns = [dict(message) for message in messages]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **flags)
        return self.encode(text)


class SentencePieceTokenizer:
    """A bare SentencePiece model; it has no chat template."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self._path = path
        try:
            self._processor: Any = SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # RuntimeError or OSError, depending on what is wrong
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        pieces = self._processor.get_piece_size()
        own = [] if self._processor.eos_id() < 0 else [self._processor.eos_id()]
        self.bos_id: int | None = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        self.eos_ids = tuple(dict.fromkeys(own + _configured_eos_ids(path.parent)))
        self.pad_id = max(0, self._processor.pad_id())
        self.vocab_size: int = pieces
        self.fingerprint = vocabulary_fingerprint({self._processor.id_to_piece(i): i for i in range(pieces)})
        self.has_chat_template = False

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._processor.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode(list(token_ids))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], **flags: Any) -> tuple[int, ...]:
        raise DataError(f"{self._path}: a SentencePiece model has no chat template; set data.template to PlainTemplate")


def check_same_vocabulary(ours: str, theirs: str, who: str) -> None:
    """DataError where two fingerprints differ: ids would mean other tokens to `who`."""
    if ours != theirs:
        raise DataError(
            f"the tokenizer here has vocabulary {ours[:12]}, {who} has {theirs[:12]}; "
            "token ids are exchanged, so both must come from the same tokenizer files"
        )


def _configured_eos_ids(directory: Path) -> list[int]:
    """Stop ids that generation_config.json names, else those of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a JSON object: {error}") from error
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []
