"""The tokenizer of the served model, for text prompts and for comparing vocabularies; the server works without one."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from opsd_megatron.server.refusal import Refusal
from opsd_megatron.types import vocabulary_fingerprint


class Text:
    """Encodes and decodes with the tokenizer of a model directory: Hugging Face files, else SentencePiece's."""

    def __init__(self, directory: Path):
        self.chat_template: str | None = None
        self._apply_template: Callable | None = None
        self.special: dict[str, str | None] = {"bos_token": None, "eos_token": None, "pad_token": None}
        if (directory / "tokenizer.json").exists() or (directory / "tokenizer_config.json").exists():
            self._load_hugging_face(directory)
        else:
            self._load_sentencepiece(directory / "tokenizer.model")

    def _load_hugging_face(self, directory: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self.pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
        self.special = {name: getattr(tokenizer, name) for name in self.special}
        self.chat_template = tokenizer.chat_template
        self._apply_template = tokenizer.apply_chat_template
        self.encode = lambda text, add_special: list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
        self.decode = lambda ids, skip_special: tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        self._piece = lambda token_id: self.decode([token_id], False)

    def _load_sentencepiece(self, file: Path) -> None:
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.pieces = {number: tokenizer.id_to_piece(number) for number in range(tokenizer.vocab_size())}
        numbers = {"bos_token": tokenizer.bos_id(), "eos_token": tokenizer.eos_id(), "pad_token": tokenizer.pad_id()}
        self.special = {name: self.pieces.get(number) for name, number in numbers.items()}
        hidden = {number for number in self.pieces if tokenizer.is_control(number)}

        def decode(ids: Sequence[int], skip_special: bool) -> str:
            return tokenizer.decode([n for n in ids if n in self.pieces and not (skip_special and n in hidden)])

        self.encode = lambda text, add_special: tokenizer.encode(text, add_bos=add_special and tokenizer.bos_id() >= 0)
        self.decode = decode
        self._piece = lambda token_id: self.pieces.get(token_id, "").replace("\N{LOWER ONE EIGHTH BLOCK}", " ")

    def piece(self, token_id: int) -> str:
        """What the token stands for by itself; `token_id:7` where that is no text, for example half a character."""
        written = self._piece(token_id)
        return written if written and "\ufffd" not in written else f"token_id:{token_id}"

    def render(self, messages: list[dict], template_variables: dict, **options: bool) -> str:
        """The conversation in the model's own template; Refusal 400 where there is none or where it refuses."""
        if self._apply_template is None or self.chat_template is None:
            raise Refusal(400, "the model has no chat template; use /v1/completions")
        taken = inspect.signature(self._apply_template).parameters.keys() & template_variables.keys()
        if taken:
            raise Refusal(400, f"chat_template_kwargs cannot set {', '.join(sorted(taken))}: no word of the template")
        try:
            written = self._apply_template(messages, tokenize=False, **options, **template_variables)
        except Exception as error:  # a template may raise anything
            raise Refusal(400, f"the chat template does not take these messages: {error}") from error
        return str(written)

    def info(self) -> dict:
        """Reply of /tokenizer_info."""
        return {
            "vocab_size": len(self.pieces),
            "fingerprint": vocabulary_fingerprint({piece: number for number, piece in self.pieces.items()}),
            "chat_template": self.chat_template,
            **self.special,
        }


def find_text(directory: Path) -> Text | None:
    """The tokenizer in `directory`, or None where there is none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return Text(directory) if any((directory / name).is_file() for name in names) else None
