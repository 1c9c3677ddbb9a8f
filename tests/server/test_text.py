import hashlib

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from opsd_megatron.server.text import Text, find_text


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    lines = [f"the {colour} key of room {number} is here" for number in range(60) for colour in ("red", "blue", "old")]
    (path / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"), model_prefix=str(path / "tokenizer"), vocab_size=80, minloglevel=2
    )
    return path


def test_sentencepiece_text_survives_encoding_and_decoding(directory):
    text = Text(directory)
    ids = text.encode("the red key is here", False)
    assert text.decode(ids, True) == "the red key is here"
    assert text.encode("the red key is here", True) == [1, *ids]
    assert text.decode([1, *ids, 2], True) == "the red key is here"


def test_the_fingerprint_is_that_of_the_ids_and_pieces(directory):
    text = Text(directory)
    lines = "".join(f"{number}\t{piece}\n" for number, piece in sorted(text.pieces.items()))
    info = text.info()
    assert info["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()
    assert (info["vocab_size"], info["eos_token"]) == (80, "</s>")


def test_a_hugging_face_tokenizer_of_the_same_pieces_has_the_same_fingerprint(directory, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    text = Text(directory)
    vocabulary = {piece: number for number, piece in text.pieces.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path)
    info = Text(tmp_path).info()
    assert (info["fingerprint"], info["vocab_size"]) == (text.info()["fingerprint"], 80)
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({"swapped": 0, **{p: n for p, n in vocabulary.items() if n}}, unk_token="")
        )
    )
    changed.save_pretrained(tmp_path / "changed")
    assert Text(tmp_path / "changed").info()["fingerprint"] != info["fingerprint"]


def test_a_directory_without_tokenizer_has_no_text(tmp_path):
    assert find_text(tmp_path) is None
