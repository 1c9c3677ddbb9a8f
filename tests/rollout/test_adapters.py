"""What is particular to one kind of server: recorded replies, kinds of log-probs, ways round what a server lacks."""

import importlib.util
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from opsd_megatron.errors import ServerError
from opsd_megatron.rollout import sglang_wire
from opsd_megatron.rollout.backend import (
    GenerateRequest,
    ServerRefused,
    ServerUnauthorized,
    ServerUnreachable,
    Unsupported,
    WrongWeightVersion,
)
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.replies import parse_completions, parse_generate, parse_prompt_logprobs
from opsd_megatron.rollout.sglang import SglangBackend
from opsd_megatron.rollout.vllm import VllmBackend
from opsd_megatron.types import VersionSpan
from tests.rollout.conformance import LONG, PROMPT, request, under_way
from tests.rollout.misbehaving import misbehaving_servers
from tests.rollout.subjects import ADMIN, TOKEN, fake, serving

RECORDED = Path(__file__).parents[1] / "fixtures" / "wire" / "vllm-0.32.0" / "vllm-0.32.0-transcript.json"
ONLY_IN_VLLM_0_33 = [
    "return_weight_versions of /v1/completions answered by the server",
    "503, not a hang, for requests to a server paused with abort or wait",
    "weight_version of /finish_weight_update set together with the weights",
    "NCCL group joined by nccl_unique_id_b64",
]


def recorded(path: str, number: int) -> tuple[dict, dict]:
    found = [e for e in json.loads(RECORDED.read_text()) if (e["path"], e["status"]) == (path, 200)]
    return found[number]["request"], found[number]["response"]


@pytest.mark.parametrize("what", ONLY_IN_VLLM_0_33)
def test_only_in_vllm_0_33(what):
    pytest.skip(f"not run: vLLM 0.33 was not at hand: {what}")


def test_recorded_replies_of_vllm_become_samples():
    asked, reply = recorded("/inference/v1/generate", 0)
    wanted = GenerateRequest("r1", asked["token_ids"], n=2, max_tokens=4)
    result = parse_generate(reply, wanted, 0, "raw", "here")
    assert result.server_id == "here" and result.prompt_tokens == 6 and len(result.samples) == 2
    first = result.samples[0]
    assert first.token_ids == (359, 346, 465, 488) and first.logprobs[0] == -6.491750717163086
    assert first.version_spans == (VersionSpan("default", 0, 4),) and first.logprob_kind == "raw"

    asked, reply = recorded("/v1/completions", 0)
    wanted = GenerateRequest("c", asked["prompt"], n=2, max_tokens=4)
    result = parse_completions(reply, wanted, "raw", "here", "step-1")
    assert result.samples[1].token_ids == (103, 94, 283, 484)
    assert result.samples[1].version_spans == (VersionSpan("step-1", 0, 4),)
    with_spans = json.loads(json.dumps(reply))
    for choice in with_spans["choices"]:
        choice["weight_versions"] = [{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 1, "end": 4}]
    result = parse_completions(with_spans, wanted, "raw", "here", None)
    assert result.samples[0].version_spans == (VersionSpan("a", 0, 1), VersionSpan("b", 1, 4))

    asked, reply = recorded("/inference/v1/generate", 2)
    scores = parse_prompt_logprobs(reply["prompt_logprobs"], asked["token_ids"], "score")
    assert len(scores) == 5 and scores[0] == -6.489075660705566
    with pytest.raises(ServerError, match="token 1"):
        parse_prompt_logprobs(reply["prompt_logprobs"], [5, 7, 7, 8, 9, 10], "score")


@pytest.mark.parametrize("name", ["vllm-raw", "sglang-raw"])
def test_raw_logprobs_are_noticed_and_refused_where_they_are_not_those_of_the_samples(name):
    with serving(name) as subject, subject.connect() as backend:
        assert backend.capabilities().logprob_kind == "raw"
        assert backend.capabilities().transports >= {"disk"}
        assert backend.generate([request()])[0].samples[0].logprob_kind == "raw"
        assert backend.generate([request(temperature=0.0)])[0].samples[0].logprob_kind == "raw"
        with pytest.raises(Unsupported, match=r"processed_logprobs|SGLANG_RETURN_ORIGINAL_LOGPROB"):
            backend.generate([request(temperature=0.5)])


def test_sglang_reports_no_logprobs_after_filters():
    with serving("sglang") as subject, subject.connect() as backend:
        assert backend.capabilities().logprob_kind == "processed"
        with pytest.raises(Unsupported, match="top_p"):
            backend.generate([request(top_p=0.9)])


def test_without_spans_a_change_of_weights_under_a_request_is_an_error():
    with serving("vllm-completions") as subject, subject.connect() as backend, subject.connect() as other:
        assert not backend.capabilities().has_spans
        with under_way(backend, request("one", max_tokens=2000)) as (running,):
            other.update_from_disk("new", "new")
            with pytest.raises(WrongWeightVersion, match="old to new"):
                running.result(20)


def test_another_clients_pause_holds_requests_back_too():
    with serving("vllm") as subject, subject.connect() as backend, subject.connect() as other:
        before = subject.violations()
        backend.generate([request()])
        other.pause("abort")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(backend.generate, [request()])
            time.sleep(0.3)
            assert not waiting.done()
            other.resume()
            assert waiting.result(20)[0].samples[0].finish_reason == "length"
        assert subject.violations() == before


def test_the_kind_of_a_server_is_found_out():
    for name, kind in {"vllm": VllmBackend, "sglang": SglangBackend, "sglang-raw": SglangBackend}.items():
        subject = fake(name)
        subject.kind = "auto"
        try:
            with subject.connect() as backend:
                assert type(backend) is kind
        finally:
            subject.kind = name.split("-")[0]
    with serving("embedded-exact") as subject:
        subject.kind = "auto"
        with subject.connect() as backend:
            assert type(backend) is EmbeddedBackend
    with misbehaving_servers(["good"]) as urls:
        subject.url = urls["good"]
        with pytest.raises(ServerRefused, match="is it vLLM"):
            subject.connect()


def test_sglangs_admin_key_opens_control_routes_and_the_other_does_not():
    with serving("sglang") as subject, subject.connect(admin_token="not-" + ADMIN) as backend:
        backend.generate([request()])
        with pytest.raises(ServerUnauthorized, match="admin token") as caught:
            backend.pause("keep")
        assert ADMIN not in str(caught.value)
        backend.generate([request()])


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_request_that_timed_out_may_be_sent_again_while_the_first_still_runs(name):
    with serving(name) as subject, subject.connect(timeout_s=0.3, retry_s=1.0) as backend:
        with pytest.raises(ServerUnreachable, match="ReadTimeout"):
            backend.generate([request("one", max_tokens=LONG)])
        backend.abort()


def test_a_session_that_a_dead_trainer_left_open_is_closed_first():
    with serving("sglang") as subject, subject.connect() as dead, subject.connect() as backend:
        dead.pause("keep")
        dead.begin_update("new")
        backend.begin_update("new")
        backend.abort_update()
        backend.abort_update()
        backend.resume()


def test_an_sglang_that_is_too_busy_is_unreachable_not_aborted():
    reason = {"type": "abort", "message": "The request queue is full.", "status_code": 503, "err_type": None}
    body = {"text": "", "output_ids": [], "meta_info": {"id": "case/0.0", "finish_reason": reason}}
    with pytest.raises(ServerUnreachable, match="queue is full"):
        sglang_wire.parse_replies(body, request(), "processed", "here")


def test_the_stand_ins_notice_broken_rules():
    """Otherwise the conformance cases would show nothing."""
    with serving("vllm") as subject:
        before = len(subject.violations())
        headers = {"Authorization": f"Bearer {TOKEN}"}
        good = {"token_ids": PROMPT, "sampling_params": {"n": 1, "max_tokens": 1, "temperature": 1, "seed": 1,
                "stop_token_ids": [], "ignore_eos": True}}  # fmt: skip
        for wrong in ({"tokens": [1]}, {"sampling_params": good["sampling_params"] | {"max_new_tokens": 1}},
                      {"sampling_params": good["sampling_params"] | {"top_p": "a"}}):  # fmt: skip
            httpx.post(subject.url + "/inference/v1/generate", json=good | wrong, headers=headers, trust_env=False)
        httpx.post(subject.url + "/pause?model=keep", headers=headers, trust_env=False)
        httpx.post(subject.url + "/resume", headers=headers, trust_env=False)  # without the admin token
        assert len(subject.violations()) == before + 5
    with serving("sglang") as subject:
        before = len(subject.violations())
        body = sglang_wire.as_wire(request()) | {"max_tokens": 1}
        httpx.post(subject.url + "/generate", json=body, headers=headers, trust_env=False)
        assert len(subject.violations()) == before + 1


@pytest.mark.skipif("OPSD_SGLANG_API_TYPES" not in os.environ, reason="fetch it with fetch_sglang_contract.sh")
def test_requests_fit_the_contract_of_sglangs_wheel():
    spec = importlib.util.spec_from_file_location("api_types", os.environ["OPSD_SGLANG_API_TYPES"])
    assert spec is not None and spec.loader is not None
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    for body in (sglang_wire.as_wire(request()), sglang_wire.as_wire(request(n=3)), sglang_wire.as_score(PROMPT)):
        read = contract.GenerateRequest.from_json_value(body)
        unknown = set(body) - set(read.__struct_fields__)
        assert not unknown, unknown
    with pytest.raises(contract.JsonContractError):
        contract.GenerateRequest.from_json_value(
            sglang_wire.as_wire(request()) | {"sampling_params": {"max_tokens": 1}}
        )
