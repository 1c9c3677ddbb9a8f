"""A byte-level tokenizer with a chat template, small enough for the tiny models."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB

CORPUS = [
    f"the {colour} key of room {number} costs 5 € in the café." for number in range(90) for colour in ("red", "old")
]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if shout %}!{% endif %} {% endif %}"
)


def write_tiny_tokenizer(directory: Path) -> None:
    """`VOCAB` tokens, of which 1 is the end token; bytes that are not in its corpus are unknown to it."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *(chr(number) for number in range(32, 127)), "\n"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(directory)
