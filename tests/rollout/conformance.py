"""What every rollout server must do, whichever it is: cases over a Subject, called by test_conformance."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from opsd_megatron.errors import ServerError
from opsd_megatron.rollout.backend import (
    GenerateRequest,
    RolloutBackend,
    Sample,
    ServerRefused,
    ServerUnauthorized,
    TensorInfo,
    TransferGroup,
)
from tests.rollout.subjects import Subject

PROMPT = [5, 6, 7, 8, 9, 10]
SOON_S = 0.3
"""Long enough for a request to be under way, too short for LONG to be through."""
LONG = 900


def request(name: str = "case", **sampling) -> GenerateRequest:
    return GenerateRequest(name, PROMPT, **{"max_tokens": 6, "ignore_eos": True, "seed": 3} | sampling)


@contextmanager
def under_way(backend: Any, *requests: GenerateRequest):
    """Futures of the requests' only samples, that run when the block begins."""
    backend.generate([request("warm-up", max_tokens=1)])
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lambda one=one: backend.generate([one])[0].samples[0]) for one in requests]
        time.sleep(SOON_S)
        yield futures
        backend.abort()


def covered(sample: Sample) -> dict[str, int]:
    """Tokens by weight version; the spans are contiguous over the response."""
    reached, result = 0, {}
    for span in sample.version_spans:
        assert span.start == reached < span.end
        reached, result[span.version] = span.end, span.end - span.start
    assert reached == len(sample.token_ids) == len(sample.logprobs)
    return result


def case_samples_are_whole_and_say_where_they_come_from(subject: Subject) -> None:
    with subject.connect() as backend:
        assert isinstance(backend, RolloutBackend)
        info = backend.info()
        results = backend.generate([request("a", n=4), request("b", max_tokens=3)])
    assert [result.request_id for result in results] == ["a", "b"]
    assert [len(result.samples) for result in results] == [4, 1]
    for result, length in zip(results, (6, 3), strict=True):
        assert result.prompt_tokens == len(PROMPT) and result.server_id == info.server_id != ""
        for sample in result.samples:
            assert len(sample.token_ids) == length and sample.finish_reason == "length" and sample.stop_token is None
            assert covered(sample) == {"old": length} and sample.logprob_kind == "processed"
            assert all(logprob < 0 for logprob in sample.logprobs)
    assert len({sample.token_ids for sample in results[0].samples}) > 1  # each sample has a seed of its own


def case_a_stop_token_ends_the_response_and_stays_in_it(subject: Subject) -> None:
    with subject.connect() as backend:
        (result,) = backend.generate([request(stop_token_ids=range(512))])
    (sample,) = result.samples
    assert sample.finish_reason == "stop" and len(sample.token_ids) == 1 and sample.stop_token == sample.token_ids[0]


def case_scores_equal_the_logprobs_of_what_was_sampled(subject: Subject) -> None:
    with subject.connect() as backend:
        if not backend.capabilities().can_score:
            pytest.skip("the server does not score prompts")
        (plain,), (cool,) = (r.samples for r in backend.generate([request("t1"), request("t2", temperature=0.5)]))
        plain_scores, cool_scores, nothing = backend.score(
            [[*PROMPT, *plain.token_ids], [*PROMPT, *cool.token_ids], [5]]
        )
    assert nothing == [] and len(plain_scores) == len(PROMPT) + 6 - 1
    assert plain_scores[-6:] == pytest.approx(plain.logprobs, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(cool_scores[-6:], cool.logprobs, strict=True)) > 0.05


def case_what_the_server_refuses_is_an_error_at_once(subject: Subject) -> None:
    with subject.connect(retry_s=60) as backend:
        with pytest.raises(ServerRefused, match=r"status 400|vocabulary"):
            backend.generate([GenerateRequest("bad", [10**6], max_tokens=2)])
        with pytest.raises(ServerError):
            backend.finish_update("never-begun")
    with subject.connect(token="wrong-token", retry_s=60) as backend:
        with pytest.raises(ServerUnauthorized) as caught:
            backend.generate([request()])
        assert "wrong-token" not in str(caught.value)


def case_a_paused_server_gets_nothing_until_it_resumes(subject: Subject) -> None:
    with subject.connect() as backend, ThreadPoolExecutor(1) as pool:
        backend.generate([request()])
        backend.pause("keep")
        waiting: Future = pool.submit(backend.generate, [request()])
        time.sleep(SOON_S)
        assert not waiting.done()
        backend.resume()
        assert covered(waiting.result(20)[0].samples[0]) == {"old": 6}


def case_abort_ends_running_requests_with_what_they_have(subject: Subject) -> None:
    with subject.connect() as backend, under_way(backend, request("one", max_tokens=LONG)) as (running,):
        backend.pause("abort")
        sample = running.result(20)
        backend.resume()
    assert sample.finish_reason == "abort" and 0 < covered(sample)["old"] < LONG


def case_abort_by_name_ends_that_request_only(subject: Subject) -> None:
    asked = [request("r1", max_tokens=LONG), request("r10", max_tokens=LONG)]
    with subject.connect() as backend, under_way(backend, *asked) as (first, second):
        backend.abort(["r1"])
        assert first.result(20).finish_reason == "abort"
        time.sleep(0.05)
        assert not second.done()


def case_pause_wait_lets_requests_finish(subject: Subject) -> None:
    with subject.connect() as backend, under_way(backend, request("one", max_tokens=LONG // 2)) as (running,):
        backend.pause("wait")
        assert running.result(1).finish_reason == "length"
        backend.resume()


def case_new_weights_from_a_disk_are_served_under_their_version(subject: Subject) -> None:
    with subject.connect() as backend:
        before = backend.generate([request(temperature=0.0)])[0].samples[0]
        backend.update_from_disk(subject.paths["new"], "new")
        assert backend.weight_version() == backend.info().weight_version == "new"
        after = backend.generate([request(temperature=0.0)])[0].samples[0]
    assert covered(before) == {"old": 6} and covered(after) == {"new": 6}
    assert before.token_ids != after.token_ids or before.logprobs != after.logprobs


def case_tokens_around_an_update_are_told_apart(subject: Subject) -> None:
    with subject.connect() as backend, under_way(backend, request("one", max_tokens=LONG)) as (running,):
        backend.pause("keep")
        backend.update_from_disk(subject.paths["new"], "new")
        backend.resume()
        time.sleep(SOON_S)
        backend.abort()
        tokens = covered(running.result(20))
    assert list(tokens) == ["old", "new"] and min(tokens.values()) > 0


def case_no_token_comes_from_a_failed_update(subject: Subject) -> None:
    with subject.connect(retry_s=0.5) as backend:
        is_atomic = backend.capabilities().has_atomic_updates
        with pytest.raises(ServerError):
            backend.update_from_disk(subject.paths["broken"], "broken")
        if is_atomic:
            assert covered(backend.generate([request()])[0].samples[0]) == {"old": 6}
        else:
            with pytest.raises(ServerError, match="paused"):
                backend.generate([request()])
        backend.update_from_disk(subject.paths["new"], "new")
        assert covered(backend.generate([request()])[0].samples[0]) == {"new": 6}


def case_weights_through_a_group_are_received_in_order(subject: Subject) -> None:
    tensors = [TensorInfo("model.a", "bfloat16", (8, 4)), TensorInfo("model.b", "bfloat16", (64,))]
    with subject.connect() as backend:
        if "nccl" not in backend.capabilities().transports:
            pytest.skip("the server takes part in no group")
        ranks = backend.world_size()
        unique_id = "A" * 170 + "w=="  # 128 bytes
        group = TransferGroup(
            "nccl", "127.0.0.1", 29500, 1, 1 + ranks, "opsd-0", bucket_bytes=32, nccl_unique_id=unique_id
        )
        with pytest.raises(ServerError):
            backend.receive(tensors)
        backend.join_group(group)
        with pytest.raises(ServerRefused, match="pause"):
            backend.begin_update("new")
        with under_way(backend, request("one", max_tokens=LONG)) as (running,):
            backend.pause("keep")
            backend.begin_update("new")
            backend.receive(tensors)
            backend.finish_update("new")
            backend.resume()
            time.sleep(SOON_S)
            backend.abort()
            assert list(covered(running.result(20))) == ["old", "new"]
        backend.leave_group()


def case_a_sleeping_server_serves_again_once_woken(subject: Subject) -> None:
    with subject.connect() as backend:
        if not backend.capabilities().can_sleep:
            pytest.skip("the server cannot sleep")
        backend.pause("abort")
        backend.sleep()
        backend.wake(["weights"])
        backend.update_from_disk(subject.paths["new"], "new")
        backend.wake(["kv_cache"])
        backend.resume()
        assert covered(backend.generate([request()])[0].samples[0]) == {"new": 6}


def case_checksums_follow_the_weights(subject: Subject) -> None:
    def embedding(sums: dict[str, str]) -> set[str]:
        return {value for name, value in sums.items() if name.endswith("embed_tokens.weight")}

    with subject.connect() as backend:
        before = backend.checksum()
        backend.flush_cache()
        backend.update_from_disk(subject.paths["new"], "new")
        after = backend.checksum()
    assert before.keys() == after.keys() and embedding(before) and not embedding(before) & embedding(after)


CASES = [value for name, value in list(globals().items()) if name.startswith("case_")]
UNDER_WAY = [
    case_abort_ends_running_requests_with_what_they_have,
    case_abort_by_name_ends_that_request_only,
    case_tokens_around_an_update_are_told_apart,
]
"""Depend on the engine, not on the routes."""
THROUGH_GENERATION = [
    case_samples_are_whole_and_say_where_they_come_from,
    case_a_stop_token_ends_the_response_and_stays_in_it,
    case_scores_equal_the_logprobs_of_what_was_sampled,
    case_what_the_server_refuses_is_an_error_at_once,
    case_a_paused_server_gets_nothing_until_it_resumes,
    case_abort_by_name_ends_that_request_only,
]
"""Look different on another generating route."""
