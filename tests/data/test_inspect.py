import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from opsd_megatron.config import PlainTemplate
from opsd_megatron.data.inspect import Inspect, run
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.errors import UserError


@pytest.fixture
def records_path(tmp_path: Path) -> Path:
    documents = [{"id": f"d{n}", "text": f"Passage number {n} says nothing of use."} for n in range(12)]
    rows = [
        {"id": f"r{n}", "question": f"What of question {n}?", "documents": documents, "evidence": [f"d{n}"]}
        for n in range(3)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(arguments: Inspect, **settings) -> str:
    out = io.StringIO()
    run(arguments, Console(file=out, soft_wrap=True, **settings))
    return out.getvalue()


def test_both_prompts_are_printed_with_counts_and_the_start_of_the_response(
    records_path: Path, sentencepiece_dir: Path, plain_tokenizer: Tokenizer
):
    text = printed(Inspect(records_path, sentencepiece_dir, record=2, student_tokens=150))
    assert "record 2: r1" in text
    assert "student prompt: " in text
    assert " of 150 tokens, " in text
    assert " 0 dropped from the context" in text.split("teacher prompt")[1]
    assert "Passage number 11" not in text
    teacher = 1 + sum(
        len(plain_tokenizer.encode(piece))
        for piece in (
            "Passage number 1 says nothing of use.\n",
            PlainTemplate().question.format(question="What of question 1?"),
        )
    )
    assert f"teacher prompt: {teacher} of 256 tokens" in text
    assert f"^ the response starts here, at token {teacher}" in text


def test_a_terminal_gets_colour_and_a_file_does_not(records_path: Path, chat_dir: Path):
    arguments = Inspect(records_path, chat_dir, chat=True, view="student")
    assert "\x1b[" in printed(arguments, force_terminal=True)
    assert "\x1b[" not in printed(arguments)
    assert "<|im_start|>user" in printed(arguments)


def test_a_long_prompt_is_shown_without_its_middle(records_path: Path, sentencepiece_dir: Path):
    text = printed(Inspect(records_path, sentencepiece_dir, view="student", max_chars=100))
    assert "characters; --max-chars 0 shows them ...]" in text
    assert "Passage number 5" not in text
    assert "What of question 0?" in text


def test_the_sharing_report_tells_that_one_context_is_computed_once(records_path: Path, sentencepiece_dir: Path):
    text = printed(Inspect(records_path, sentencepiece_dir, sharing=True, samples=4))
    assert "3 records of 1 contexts; 0 trimmed" in text
    assert "12 sequences in 1 microbatches" in text
    factor = float(text.split("student prompts")[1].split(" tokens instead of")[1].split("(")[1].split("x")[0])
    assert factor > 3


def test_a_record_out_of_range_is_refused_with_the_range(records_path: Path, sentencepiece_dir: Path):
    for arguments in (
        Inspect(records_path, sentencepiece_dir, record=0),
        Inspect(records_path, sentencepiece_dir, count=4),
    ):
        with pytest.raises(UserError, match="has records 1 to 3"):
            run(arguments, Console(file=io.StringIO()))


def test_the_command_ends_with_code_2_and_a_message_on_bad_input(tmp_path: Path, sentencepiece_dir: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "r"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "opsd_megatron.data.inspect", str(path), "--tokenizer", str(sentencepiece_dir)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "bad.jsonl line 1: field" in done.stderr
    assert "Traceback" not in done.stderr
