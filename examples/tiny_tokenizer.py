"""The demo's tokenizer: a SentencePiece model trained on the task's own text, and the same as Hugging Face files."""

import io
import random
from pathlib import Path

import sentencepiece
from tiny_task import ADJECTIVES, NOUNS, NUMBERS, Encode, draw_facts, prose_passages
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3


def make_tokenizer(output: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """Train, write both forms into ``output`` and check that they agree."""
    processor = train_tokenizer(output, seed)
    check_tokenizers_agree(processor, export_tokenizer(processor, output), seed)
    check_words_are_pieces(processor.encode)
    return processor


def train_tokenizer(output: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE over the prose and the facts; every word of a fact becomes one piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose_passages("train") + draw_fact_lines(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        byte_fallback=True,
        required_chars="\n",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (output / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def draw_fact_lines(seed: int, count: int = 20_000) -> list[str]:
    rng = random.Random(seed)
    keys = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    lines: list[str] = []
    while len(lines) < count:
        fact = draw_facts(rng, keys, 1)[0]
        lines += [fact.sentence.removesuffix("."), f"Q: {fact.question}", "A:"]  # a number and its full stop stay apart
    return lines


def export_tokenizer(processor: sentencepiece.SentencePieceProcessor, output: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer as `tokenizer.json`, for transformers."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (vocab[left + right], left, right)
        for piece in pieces
        if not processor.is_byte(vocab[piece]) and not processor.is_control(vocab[piece])
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab
    ]
    pairs = [(left, right) for _, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = [AddedToken(pieces[i], special=True, normalized=False) for i in (UNK_ID, BOS_ID, EOS_ID, PAD_ID)]
    tokenizer.add_special_tokens(specials)
    exported = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    exported.save_pretrained(output)
    return exported


def check_tokenizers_agree(
    processor: sentencepiece.SentencePieceProcessor, exported: PreTrainedTokenizerFast, seed: int
) -> None:
    texts = [text + "\n" for split in ("train", "eval") for text in prose_passages(split)]
    texts += ["", "\n", " two  spaces ", "tab\tünïcode 漢字 🙂", "Q: a?\nA:", "47 12 83", *draw_fact_lines(seed)[:3000]]
    for text in texts:
        expected, got = processor.encode(text), exported.encode(text, add_special_tokens=False)
        if expected != got:
            raise ValueError(f"tokenizer.json gives {got} for {text!r}, SentencePiece gives {expected}")
        if exported.decode(got) != processor.decode(got):
            raise ValueError(f"tokenizer.json decodes {got} to {exported.decode(got)!r}, not {processor.decode(got)!r}")


def check_words_are_pieces(encode: Encode) -> None:
    """An answer's ids must occur in the fact's sentence as they are, one piece per word."""
    for word in ADJECTIVES + NOUNS + NUMBERS:
        alone, inside = encode(word), encode(f"is {word}.")
        if len(alone) != 1 or alone[0] not in inside:
            raise ValueError(f"{word!r} is tokenised as {alone} alone and as {inside} in 'is {word}.'")
