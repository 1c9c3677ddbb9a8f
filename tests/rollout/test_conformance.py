"""The conformance cases against every server that can be had here."""

import os

import pytest

from tests.rollout.conformance import CASES, THROUGH_GENERATION, UNDER_WAY
from tests.rollout.subjects import Subject, serving

PAIRS = [(name, case) for name in ("embedded-exact", "vllm", "sglang") for case in CASES]
PAIRS += [("embedded-fast", case) for case in UNDER_WAY]
PAIRS += [("vllm-completions", case) for case in THROUGH_GENERATION]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
def test_conformance(name, case):
    with serving(name) as subject:
        before = subject.violations()
        case(subject)
        assert subject.violations() == before


@pytest.mark.vllm_cpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_conformance_of_a_real_vllm(case):
    """prepare_vllm_cpu.sh starts it and prints the variables to set."""
    url, models = os.environ.get("OPSD_VLLM_URL"), os.environ.get("OPSD_VLLM_MODELS")
    if not url or not models:
        pytest.skip("OPSD_VLLM_URL and OPSD_VLLM_MODELS are not set; see tests/rollout/prepare_vllm_cpu.sh")
    paths = {name: f"{models}/{name}" for name in ("old", "new", "broken")}
    subject = Subject(url, "vllm", paths=paths)
    with subject.connect(timeout_s=120.0) as backend:
        backend.update_from_disk(paths["old"], "old")
    case(subject)
