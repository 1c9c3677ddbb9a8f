"""A tiny random model, a tokenizer and records, made from the text that every Python carries."""

import json
import random
import textwrap
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

VOCAB_SIZE = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_world(directory: Path, hf_config: Mapping[str, Any], records: int, student_tokens: int) -> None:
    """`directory`/model in Hugging Face layout and `directory`/records.jsonl; the same for the same arguments."""
    write_tokenizer(directory / "model")
    write_model(directory / "model", hf_config)
    write_records(directory / "records.jsonl", records, student_tokens)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_passages(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(directory)


def write_model(directory: Path, hf_config: Mapping[str, Any]) -> None:
    """Random weights whose logits are neither flat nor wild, so that distributions differ between contexts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    eos = json.loads((directory / "tokenizer_config.json").read_text())
    fields = dict(hf_config) | {"vocab_size": VOCAB_SIZE, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    assert eos["eos_token"] == "<|im_end|>"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)


def write_records(path: Path, count: int, student_tokens: int) -> None:
    """OPSDL records whose passages nearly fill, or overfill, the student's budget; lengths differ."""
    draw = random.Random(0)
    passages = _passages()
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            room = draw.uniform(0.4, 1.2) * student_tokens * 2  # characters: about two to a token
            chosen: list[str] = []
            while sum(map(len, chosen)) < room:
                chosen.append(draw.choice(passages))
            documents = [{"id": f"d{index}", "text": text} for index, text in enumerate(chosen)]
            record = {
                "id": f"rehearsal-{number}",
                "task": "opsdl",
                "question": "What does the text say?",
                "documents": documents,
                "evidence": [f"d{draw.randrange(len(chosen))}"],
            }
            file.write(json.dumps(record) + "\n")


def _passages(width: int = 160) -> list[str]:
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return textwrap.wrap(text[:200_000], width)
