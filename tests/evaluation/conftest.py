"""The tokenizers of the data tests."""

from tests.data.conftest import chat_dir, paragraphs, plain_tokenizer, sentencepiece_dir

__all__ = ["chat_dir", "paragraphs", "plain_tokenizer", "sentencepiece_dir"]
