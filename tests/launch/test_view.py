"""The viewer shows what was recorded, and nothing that steers the terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from opsd_megatron.errors import DataError
from opsd_megatron.launch.view import View, pieces, response_text, view
from opsd_megatron.rollout.recording import RecordedRollout, write_step
from opsd_megatron.types import PromptPair
from tests.train.parallel_step import make_rollout


class Letters:
    """Token 65 is A; 200 and 201 are the halves of one character."""

    def decode(self, token_ids):
        text = "".join(map(chr, token_ids)).replace("\xc8\xc9", "\N{SNOWMAN}")
        return text.replace("\xc8", "\N{REPLACEMENT CHARACTER}")


def recorded(response=(72, 105, 33)) -> RecordedRollout:
    rollout = make_rollout(PromptPair("r1", (81, 63), (81,)), 0, response)
    return RecordedRollout(rollout, {"advantage": (0.5, -9.0, 1.25)})


def test_plain_text_has_advantages_and_the_loss_mask_behind_the_tokens():
    assert response_text(recorded(), Letters(), plain=True).plain == "H[+0.50]i[masked]![+1.25]"


def test_colour_is_the_sign_of_the_advantage_and_its_depth_the_size():
    spans = response_text(replace(recorded(), values={"advantage": (0.3, 0.0, -3.0)}), Letters(), plain=False).spans
    good, masked, bad = (span.style for span in spans)
    assert good.bgcolor.triplet == (0, 16, 0) and bad.bgcolor.triplet == (160, 0, 0) and masked.strike


def test_characters_of_several_tokens_stand_whole_and_control_characters_are_pictures():
    assert pieces((65, 200, 201, 66), Letters()) == ["A", "", "\N{SNOWMAN}", "B"]
    assert pieces((27, 91, 50, 74), Letters()) == ["\u241b", "[", "2", "J"]


def test_a_directory_is_printed_whole_or_from_one_rollout(tmp_path):
    about = {"tokenizer": "nowhere"}
    write_step(tmp_path, 3, 0, 1, about, [recorded(), recorded((72, 72, 72))])
    write_step(tmp_path, 4, 0, 1, about, [recorded()])

    def printed(**choice) -> str:
        console = Console(file=io.StringIO(), width=100, no_color=True)
        view(View(tmp_path, plain=True, **choice), console)
        return console.file.getvalue()

    assert "step 3, rollout 1 of 2" in printed() and "<72>[+0.50]<105>[masked]" in printed()
    assert "rollout 1 of 2" not in (second := printed(rollout=2)) and "<72>[masked]<72>[+1.25]" in second
    assert "step 4, rollout 1 of 1" in printed(step=4) and "mean +0.875, from +0.500 to +1.250" in printed(step=4)
    with pytest.raises(DataError, match="rollouts 1 to 1, not 5"):
        printed(step=4, rollout=5)
