import concurrent.futures
import pickle
import time

import pytest

from opsd_megatron.config import RolloutConfig
from opsd_megatron.rollout.backend import (
    GenerateResult,
    MalformedReply,
    RolloutBackend,
    Sample,
    ServerRefused,
    WrongWeightVersion,
)
from opsd_megatron.rollout.sampler import sample_rollouts, sample_seed
from opsd_megatron.types import PromptPair, VersionSpan
from tests.server.serving import NEW, OLD, largest_gap, prompts, requests, server_for

PAIRS = [PromptPair(f"record-{n}", tuple(p), tuple(p[-3:])) for n, p in enumerate(prompts(6))]
CONFIG = RolloutConfig(samples_per_prompt=2, max_response_tokens=5)
SEEDED = RolloutConfig(samples_per_prompt=2, max_response_tokens=5, seeded=True)


class Scripted(RolloutBackend):
    """Makes up responses; `spoil` may replace the samples of a call."""

    def __init__(self, spoil=lambda call, request, samples: samples):
        self.spoil, self.calls, self.asked = spoil, 0, []

    def generate(self, requests):
        self.calls += 1
        self.asked.append(list(requests))
        sample = Sample((4, 2), (-1.0, -2.0), "stop", 2, (VersionSpan("v1", 0, 2),), "processed")
        return [
            GenerateResult(r.request_id, tuple(self.spoil(self.calls, r, [sample] * r.n)), len(r.token_ids), "s1")
            for r in requests
        ]


def aborted(count: int) -> list[Sample]:
    return [Sample((), (), "abort", None, (), "processed")] * count


def test_rollouts_come_in_the_order_of_pairs_then_samples(server, old_model):
    rollouts = sample_rollouts(PAIRS, server.backend(), CONFIG, [3], seed=1, step=0, weight_version=OLD)
    assert [(r.pair.record_id, r.sample) for r in rollouts] == [(p.record_id, s) for p in PAIRS for s in (0, 1)]
    for rollout in rollouts:
        (request,) = requests(1)
        asked = type(request)("x", rollout.pair.student_prompt)
        sample = Sample(rollout.token_ids, rollout.logprobs, "length", None, (), "processed")
        assert largest_gap(old_model, asked, sample) <= 1e-5
        assert all(rollout.loss_mask) and rollout.logprob_kind == "processed"


def test_seeded_rollouts_depend_on_seed_step_and_record_only(exact):
    backend = exact.backend()

    def responses(pairs, seed=1, step=0):
        rollouts = sample_rollouts(pairs, backend, SEEDED, [3], seed, step, OLD)
        return {(r.pair.record_id, r.sample): (r.token_ids, r.logprobs) for r in rollouts}

    whole = responses(PAIRS)
    assert responses(PAIRS[::-1]) == whole
    assert responses(PAIRS[2:3]) == {key: value for key, value in whole.items() if key[0] == "record-2"}
    for other in (responses(PAIRS, step=1), responses(PAIRS, seed=2)):
        assert all(other[key] != whole[key] for key in whole)
    assert whole["record-0", 0] != whole["record-0", 1]


def test_the_fast_engine_is_refused_for_seeded_rollouts(fast):
    with pytest.raises(ServerRefused, match="--engine exact"):
        sample_rollouts(PAIRS[:1], fast.backend(), SEEDED, [3], 1, 0, OLD)


def test_rollouts_of_other_weights_are_refused_with_their_count(exact):
    with pytest.raises(WrongWeightVersion, match=r"weights step-7 were expected, but got 10 tokens from old"):
        sample_rollouts(PAIRS[:1], exact.backend(), RolloutConfig(max_response_tokens=10), [], 1, 0, "step-7")
    sample_rollouts(PAIRS[:1], exact.backend(), CONFIG, [], 1, 0, None)


def test_aborted_samples_are_asked_for_again_and_only_those():
    backend = Scripted(lambda call, r, s: aborted(r.n) if call <= 2 and "record-1" in r.request_id else s)
    rollouts = sample_rollouts(PAIRS[:3], backend, CONFIG, [2], 1, 0, "v1")  # type: ignore[arg-type]
    assert [[request.n for request in asked] for asked in backend.asked] == [[2, 2, 2], [1, 1], [1, 1]]
    assert [r.token_ids for r in rollouts] == [(4, 2)] * 6


def test_prompts_that_are_always_aborted_are_an_error():
    with pytest.raises(ServerRefused, match="2 samples of step0-1-record-1 were aborted"):
        sample_rollouts(
            PAIRS[:3],
            Scripted(lambda _, r, s: aborted(r.n) if "record-1" in r.request_id else s),  # type: ignore[arg-type]
            CONFIG,
            [2],
            1,
            0,
            "v1",
        )


def test_an_empty_response_is_an_error():
    empty = Sample((), (), "stop", None, (), "processed")
    with pytest.raises(MalformedReply, match="record-0, sample 0: the server sent an empty response"):
        sample_rollouts(PAIRS[:1], Scripted(lambda _, r, s: [empty] * r.n), CONFIG, [2], 1, 0, None)  # type: ignore[arg-type]


def test_a_record_that_occurs_twice_in_a_step_gets_two_seeds():
    backend = Scripted()
    sample_rollouts([PAIRS[0], PAIRS[1], PAIRS[0]], backend, CONFIG, [2], 1, 0, None)  # type: ignore[arg-type]
    assert len({request.seed for request in backend.asked[0]}) == 3
    assert backend.asked[0][0].seed == sample_seed(1, 0, "record-0")


def test_errors_survive_the_way_to_other_ranks():
    error = pickle.loads(pickle.dumps(WrongWeightVersion("weights a were expected")))
    assert isinstance(error, WrongWeightVersion) and "weights a" in str(error)


def test_a_server_killed_in_the_middle_is_waited_for_and_other_weights_are_noticed(root, tmp_path, old_model):
    config = RolloutConfig(samples_per_prompt=1, max_response_tokens=250, seeded=True)
    server = server_for(root, OLD, "exact", tmp_path)
    with server, server.backend(retry_s=120) as backend, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(sample_rollouts, PAIRS, backend, config, [], 1, 0, OLD)
        before = backend.info().server_id
        time.sleep(0.5)
        assert not running.done()
        server.kill()
        assert not backend.health()
        server.start()
        rollouts = running.result(timeout=200)
        assert [r.pair.record_id for r in rollouts] == [p.record_id for p in PAIRS]
        after = backend.info().server_id
        assert after != before and after in {r.server_id for r in rollouts} <= {before, after}
        backend.update_from_disk(NEW, NEW)
        with pytest.raises(WrongWeightVersion, match="publish the weights again"):
            sample_rollouts(PAIRS[:2], backend, CONFIG, [], 1, 0, OLD)
