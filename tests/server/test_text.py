import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from opsd_megatron.data.tokenizer import load_tokenizer
from opsd_megatron.server.text import Text, find_text


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    lines = [f"the {colour} key of room {number} is here" for number in range(60) for colour in ("red", "blue", "old")]
    (path / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"), model_prefix=str(path / "tokenizer"), vocab_size=36, minloglevel=2
    )
    return path


def test_sentencepiece_text_survives_encoding_and_decoding(directory):
    text = Text(directory)
    ids = text.encode("the red key is here", False)
    assert text.decode(ids, True) == "the red key is here"
    assert text.encode("the red key is here", True) == [1, *ids]
    assert text.decode([1, *ids, 2], True) == "the red key is here"


def test_trainer_and_server_agree_on_the_fingerprint(directory, tmp_path):
    info = Text(directory).info()
    assert info["fingerprint"] == load_tokenizer(directory).fingerprint
    assert (info["vocab_size"], info["eos_token"]) == (36, "</s>")
    write_words(tmp_path, {piece: number for number, piece in Text(directory).pieces.items()})
    assert Text(tmp_path).info()["fingerprint"] == info["fingerprint"] == load_tokenizer(tmp_path).fingerprint


def test_two_swapped_pieces_change_the_fingerprint(directory, tmp_path):
    pieces = dict(Text(directory).pieces)
    pieces[10], pieces[11] = pieces[11], pieces[10]
    write_words(tmp_path, {piece: number for number, piece in pieces.items()})
    assert Text(tmp_path).info()["fingerprint"] != Text(directory).info()["fingerprint"]


def test_a_directory_without_tokenizer_has_no_text(tmp_path):
    assert find_text(tmp_path) is None


def write_words(path, vocabulary: dict[str, int]) -> None:
    """A Hugging Face tokenizer of that vocabulary."""
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
