"""Shows recorded rollouts in a terminal: tokens with their loss mask and advantage in colour.

python -m opsd_megatron.launch.view rollouts
python -m opsd_megatron.launch.view rollouts --step 12 --rollout 3 --plain
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.style import Style
from rich.text import Text

from opsd_megatron.data.tokenizer import Tokenizer, load_tokenizer
from opsd_megatron.errors import DataError, UserError
from opsd_megatron.rollout.recording import RecordedRollout, RecordedStep, read_step, recorded_steps

SATURATED_NATS = 3.0
"""|advantage| that is shown in full colour."""
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as their pictures: a response must not be able to steer the terminal."""
KEYS = "Enter next, p previous, s NUMBER step, r NUMBER rollout, q quit"


@dataclass(frozen=True)
class View:
    """Page through the rollouts that a run with --rollout.record-to has left."""

    directory: tyro.conf.Positional[Path]
    """What record_to was."""
    step: int | None = None
    """Step to begin with, as in metrics.jsonl; the first by default."""
    rollout: int | None = None
    """Rollout of that step to begin with, counted from 1."""
    tokenizer: Path | None = None
    """Tokenizer directory; by default that of the recording, and where it is gone ids are shown."""
    prompt_tokens: int = 48
    """So many of the prompt's last tokens are shown."""
    plain: bool = False
    """No colour and no keys: everything from there on, as text; advantages are written behind their tokens."""


def view(arguments: View, console: Console) -> None:
    """Pages on a terminal, prints the whole step elsewhere; UserError for what is not there."""
    steps = recorded_steps(arguments.directory)
    if not steps:
        raise DataError(f"{arguments.directory}: no recorded step; a run leaves them with --rollout.record-to")
    step = read_step(arguments.directory, arguments.step or steps[0])
    number = (arguments.rollout or 1) - 1
    tokenizer = _tokenizer(arguments.tokenizer, step)
    paging = console.is_terminal and not arguments.plain and sys.stdin.isatty()
    if not paging:
        chosen = step.rollouts if arguments.rollout is None else (_chosen(step, number),)
        for index, row in enumerate(chosen, start=number):
            show(row, _title(step, index), tokenizer, arguments, console)
        return
    while True:
        show(_chosen(step, number), _title(step, number), tokenizer, arguments, console)
        answer = console.input(Text(f"{KEYS}: ", "dim")).split()
        if answer[:1] == ["q"]:
            return
        try:
            step, number = _move(arguments.directory, steps, step, number, answer)
        except (UserError, ValueError) as error:
            console.print(Text(str(error), "red"))


def show(row: RecordedRollout, title: str, tokenizer: Tokenizer | None, arguments: View, console: Console) -> None:
    """One rollout: what it was asked, what it said, and what the step made of every token."""
    rollout = row.rollout
    console.rule(Text(title), characters="-" if arguments.plain else "─")
    facts = [
        f"record {rollout.pair.record_id}, sample {rollout.sample}",
        f"{len(rollout.token_ids)} tokens, {sum(rollout.loss_mask)} in the loss, finished by {rollout.finish_reason}",
        "weights " + ", ".join(f"{span.version} [{span.start}:{span.end}]" for span in rollout.version_spans),
        f"server {rollout.server_id}",
    ]
    console.print(Text("\n".join(facts), "" if arguments.plain else "cyan"), soft_wrap=True)
    tail = rollout.pair.student_prompt[-arguments.prompt_tokens :]
    left_out = len(rollout.pair.student_prompt) - len(tail)
    before = f"prompt, behind {left_out} more tokens: " if left_out else "prompt: "
    console.print(Text(before + "".join(pieces(tail, tokenizer)), "" if arguments.plain else "dim"), soft_wrap=True)
    console.print(Text("response:"))
    console.print(response_text(row, tokenizer, arguments.plain), soft_wrap=True)
    console.print(Text(_summary(row), "" if arguments.plain else "cyan"), soft_wrap=True)


def response_text(row: RecordedRollout, tokenizer: Tokenizer | None, plain: bool) -> Text:
    """Green: the teacher finds the token likelier than the student; red: less likely; struck out: not in the loss."""
    advantages = row.values.get("advantage")
    text = Text()
    for index, piece in enumerate(pieces(row.rollout.token_ids, tokenizer)):
        in_loss = row.rollout.loss_mask[index]
        advantage = advantages[index] if advantages is not None else None
        if plain:
            mark = "masked" if not in_loss else "" if advantage is None else f"{advantage:+.2f}"
            text.append(f"{piece}[{mark}]" if mark else piece)
        else:
            text.append(piece, _style(advantage, in_loss))
    return text


def pieces(token_ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text of each token; joined they are the text of all. A character of several tokens stands at its last."""
    if tokenizer is None:
        return [f"<{token}>" for token in token_ids]
    found, start = [], 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end])
        is_part = text.endswith("\N{REPLACEMENT CHARACTER}") and end - start < 4 and end < len(token_ids)
        found.append("" if is_part else text.translate(_VISIBLE))
        start = start if is_part else end
    return found


def _style(advantage: float | None, in_loss: bool) -> Style:
    if not in_loss:
        return Style(strike=True, dim=True)
    if advantage is None or not math.isfinite(advantage):
        return Style()
    strength = round(160 * min(abs(advantage) / SATURATED_NATS, 1))
    red, green = (0, strength) if advantage > 0 else (strength, 0)
    return Style(color="white", bgcolor=f"rgb({red},{green},0)")


def _summary(row: RecordedRollout) -> str:
    advantages = row.values.get("advantage")
    if advantages is None:
        return "no advantages were recorded: these rollouts have not been trained on"
    kept = [value for value, in_loss in zip(advantages, row.rollout.loss_mask, strict=True) if in_loss]
    if not kept:
        return "no token is in the loss"
    return (
        f"advantage (teacher - student, nats): mean {sum(kept) / len(kept):+.3f}, from {min(kept):+.3f} to "
        f"{max(kept):+.3f}, negative {sum(value < 0 for value in kept)} of {len(kept)}"
    )


def _title(step: RecordedStep, number: int) -> str:
    return f"step {step.header['step']}, rollout {number + 1} of {len(step.rollouts)}"


def _chosen(step: RecordedStep, number: int) -> RecordedRollout:
    if not 0 <= number < len(step.rollouts):
        raise DataError(f"step {step.header['step']} has rollouts 1 to {len(step.rollouts)}, not {number + 1}")
    return step.rollouts[number]


def _move(
    directory: Path, steps: list[int], step: RecordedStep, number: int, answer: list[str]
) -> tuple[RecordedStep, int]:
    """The step and rollout that a key leads to; past the end of a step lies the next one."""
    key, value = (answer or ["n"])[0], int(answer[1]) if len(answer) > 1 else None
    if key in ("s", "r") and value is None:
        raise DataError(f"{key} needs a number. {KEYS}")
    if key == "s":
        assert value is not None
        return read_step(directory, value), 0
    if key == "r":
        assert value is not None
        _chosen(step, value - 1)
        return step, value - 1
    if key not in ("n", "p"):
        raise DataError(KEYS)
    number += 1 if key == "n" else -1
    if 0 <= number < len(step.rollouts):
        return step, number
    place = steps.index(step.header["step"]) + (1 if key == "n" else -1)
    if not 0 <= place < len(steps):
        raise DataError("that was the last rollout" if key == "n" else "that was the first rollout")
    other = read_step(directory, steps[place])
    return other, 0 if key == "n" else len(other.rollouts) - 1


def _tokenizer(given: Path | None, step: RecordedStep) -> Tokenizer | None:
    """The one given must load; the recording's own may have moved away."""
    if given is not None:
        return load_tokenizer(given)
    try:
        return load_tokenizer(step.header["tokenizer"])
    except DataError as error:
        print(f"showing token ids: {error}; --tokenizer DIRECTORY names another", file=sys.stderr)
        return None


def main() -> None:
    arguments = tyro.cli(View, description=__doc__)
    try:
        view(arguments, Console(no_color=arguments.plain or None, highlight=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
