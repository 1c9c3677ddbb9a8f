"""README.md of a released model, in the form that the Hugging Face hub reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

_CARD = Template("""---
$header
---

# $title

$summary

| | |
|---|---|
| Base model | $base |
| Method | $method |
| Data | $data |
| Training step | $step |
| Licence | $licence |

## Evaluation

$evaluation

## Checks before release

$checks

Every file and its sha256 is listed in MANIFEST.json.
""")
_NOT_GIVEN = "not stated"


@dataclass(frozen=True)
class CardFacts:
    """What the files cannot tell; what is not given says so in the card."""

    base: str | None = None
    method: str | None = None
    data: str | None = None
    evaluation: str | None = None
    """Markdown."""
    licence: str | None = None


def model_card(title: str, facts: CardFacts, step: int | None, verification: Mapping[str, Any]) -> str:
    """The text; what was verified is listed with its figures, and what was not is said to be unverified."""
    header = {"library_name": "transformers", "tags": ["opsd-megatron"]}
    if facts.base:
        header["base_model"] = facts.base
    if facts.licence:
        header["license"] = facts.licence
    return _CARD.substitute(
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        title=title,
        summary=f"Trained with opsd_megatron from {facts.base or 'a base model that was not stated'}.",
        base=facts.base or _NOT_GIVEN,
        method=facts.method or _NOT_GIVEN,
        data=facts.data or _NOT_GIVEN,
        step=_NOT_GIVEN if step is None else step,
        licence=facts.licence or _NOT_GIVEN,
        evaluation=facts.evaluation or "None was given.",
        checks="\n".join(_checks(verification)) or "None: weights and logits were not verified.",
    )


def licence_of(directory: Path) -> str | None:
    """The licence in the header of a model directory's README.md, which a model trained from it inherits."""
    path = directory / "README.md"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("\"'") or None
    return None


def _checks(verification: Mapping[str, Any]) -> list[str]:
    lines = []
    if verification.get("weights"):
        lines.append(f"- Weights: {verification['weights']}.")
    for check in verification.get("logits", []):
        first, last = check["positions"]
        lines.append(
            f"- Logits, {check['what']} (positions {first:,} to {last:,}): largest difference from transformers in "
            f"float32 {check['worst']:.1e}, tolerance {check['tolerance']:.1e}."
        )
    return lines
