"""Tokenizers trained on the language reference that ships with Python, and its paragraphs as documents."""

import io
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from opsd_megatron.data.tokenizer import Tokenizer, load_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Prose of at least 40 characters, in reading order."""
    blocks = [" ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n")]
    return list(dict.fromkeys(block for block in blocks if len(block) >= 40 and block[0].isalpha()))


@pytest.fixture(scope="session")
def sentencepiece_dir(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but tokenizer.model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs[:1500]), model_writer=model, model_type="bpe", vocab_size=700,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, byte_fallback=True, required_chars="\n", num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="session")
def chat_dir(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: byte-level BPE, a chat template, no bos, two stop ids in generation_config.json."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(paragraphs[:1500], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    directory = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return directory


@pytest.fixture(scope="session")
def plain_tokenizer(sentencepiece_dir: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_dir)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_dir: Path) -> Tokenizer:
    return load_tokenizer(chat_dir)
