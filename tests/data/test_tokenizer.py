import json
import shutil
from pathlib import Path

import pytest

from opsd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from opsd_megatron.errors import DataError
from opsd_megatron.types import vocabulary_fingerprint

TEXTS = ["", "\n", " two  spaces ", "tab\tünïcode 漢字 🙂", "Q: a?\nA:", "if x > 1:\n    return x\n"]


def test_sentencepiece_and_chat_tokenizers_give_text_back(
    plain_tokenizer: Tokenizer, chat_tokenizer: Tokenizer, paragraphs: list[str]
):
    for text in TEXTS + paragraphs[::100]:
        assert chat_tokenizer.decode(chat_tokenizer.encode(text)) == text
        assert plain_tokenizer.decode(plain_tokenizer.encode(text)).lstrip(" ") == text.lstrip(" ")


def test_no_special_token_is_added_to_text(plain_tokenizer: Tokenizer, chat_tokenizer: Tokenizer):
    for tokenizer in (plain_tokenizer, chat_tokenizer):
        specials = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids}
        assert not specials & set(tokenizer.encode("Nothing before and nothing after."))


def test_stop_ids_are_the_tokenizers_own_and_those_of_the_generation_config(chat_tokenizer: Tokenizer):
    assert chat_tokenizer.eos_ids == (2, 0)
    assert chat_tokenizer.bos_id is None


def test_stop_ids_come_from_config_json_where_no_generation_config_names_them(sentencepiece_dir: Path, tmp_path: Path):
    shutil.copytree(sentencepiece_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text("[1")
    with pytest.raises(DataError, match=r"generation_config\.json"):
        load_tokenizer(tmp_path)


def test_the_chat_prompt_ends_where_the_assistant_begins(chat_tokenizer: Tokenizer):
    ids = chat_tokenizer.encode_chat([{"role": "user", "content": "Hi"}], enable_thinking=True)
    assert chat_tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    quiet = chat_tokenizer.encode_chat([{"role": "user", "content": "Hi"}], enable_thinking=False)
    assert chat_tokenizer.decode(quiet).endswith("<think>\n\n</think>\n\n")


def test_a_tokenizer_without_chat_template_says_which_template_to_use(plain_tokenizer: Tokenizer):
    assert not plain_tokenizer.has_chat_template
    with pytest.raises(DataError, match="PlainTemplate"):
        plain_tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_the_fingerprint_tells_vocabularies_apart(plain_tokenizer: Tokenizer, chat_tokenizer: Tokenizer):
    assert vocabulary_fingerprint({"a": 0, "b": 1}) == vocabulary_fingerprint({"b": 1, "a": 0})
    assert vocabulary_fingerprint({"a": 0, "b": 1}) != vocabulary_fingerprint({"a": 1, "b": 0})
    check_same_vocabulary(plain_tokenizer.fingerprint, plain_tokenizer.fingerprint, "the server")
    with pytest.raises(DataError, match="the server has"):
        check_same_vocabulary(plain_tokenizer.fingerprint, chat_tokenizer.fingerprint, "the server")


def test_a_sentencepiece_model_and_its_hugging_face_export_have_one_fingerprint_and_one_segmentation():
    tiny = Path(__file__).parents[2] / "examples" / "tiny"
    if not (tiny / "tokenizer.json").is_file() or not (tiny / "tokenizer.model").is_file():
        pytest.skip("the demo's tokenizer is not here")
    exported, bare = load_tokenizer(tiny), load_tokenizer(tiny / "tokenizer.model")
    assert exported.fingerprint == bare.fingerprint
    for text in TEXTS:
        assert exported.encode(text) == bare.encode(text)


@pytest.mark.parametrize("broken", ["empty directory", "cut model", "cut json", "own code"])
def test_what_is_no_usable_tokenizer_is_a_data_error(broken: str, sentencepiece_dir: Path, tmp_path: Path):
    if broken == "cut model":
        (tmp_path / "tokenizer.model").write_bytes((sentencepiece_dir / "tokenizer.model").read_bytes()[:500])
    if broken == "cut json":
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if broken == "own code":
        canary = tmp_path / "ran"
        (tmp_path / "tokenization_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
