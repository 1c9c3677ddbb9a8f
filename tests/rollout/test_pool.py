"""What a pool decides: where a request goes, what becomes of half a response, who is trusted. How real servers fail is
in test_faults.py."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from opsd_megatron.rollout.backend import (
    GenerateRequest,
    MalformedReply,
    ServerRefused,
    ServerUnauthorized,
    ServerUnreachable,
    TransferGroup,
    UpdateLost,
    WrongWeightVersion,
)
from opsd_megatron.rollout.partial import Unfinished, mask_stale, staleness
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.routing import group_by_prefix
from opsd_megatron.rollout.pool.servers import ServerPool
from opsd_megatron.types import PromptPair, Rollout, VersionSpan
from tests.rollout.scripted import Scripted, cut, whole

QUICK = PoolOptions(request_s=5.0, retry_s=3.0, backoff_s=0.01, breaker_s=30.0, health_s=0.2, poll_s=0.1)


@contextmanager
def pool_of(*servers: Scripted, options: PoolOptions = QUICK) -> Iterator[ServerPool]:
    pool = ServerPool({server.name: server for server in servers}, options)
    try:
        yield pool
    finally:
        pool.close()


def publish(pool: ServerPool, version: str) -> None:
    pool.begin_update(version)
    pool.push({})
    pool.finish_update(version)


def asking(prompts: list[list[int]], max_tokens: int = 4, n: int = 1) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{number}", prompt, n, max_tokens) for number, prompt in enumerate(prompts)]


def contexts(number: int, questions: int, length: int = 200) -> list[list[int]]:
    """Prompts of several contexts in turn; all begin with the same eight tokens."""
    shared = [[1] * 8 + [(7 * context + step) % 97 for step in range(length)] for context in range(number)]
    return [shared[context] + [question] * 5 for question in range(questions) for context in range(number)]


def slowly(request, number, version):
    time.sleep(0.02)
    return whole(request, number, version)


def test_prompts_are_grouped_by_context_and_not_by_a_common_system_prompt():
    groups, shared = group_by_prefix(contexts(3, 4))
    assert len(set(groups)) == 3 and groups == groups[:3] * 4
    assert set(shared) == {208}


def test_requests_of_one_context_go_to_one_server_and_the_load_is_shared():
    servers = [Scripted(name, slowly) for name in "ab"]
    prompts = contexts(4, 5)
    with pool_of(*servers) as pool:
        pool.generate(asking(prompts, n=2))
    seen = [{prompt.token_ids[20] for prompt in server.traffic()} for server in servers]
    assert seen[0].isdisjoint(seen[1]) and [len(one) for one in seen] == [2, 2]


def test_a_context_spills_over_when_its_server_is_much_busier():
    servers = [Scripted(name, slowly) for name in "ab"]
    with pool_of(*servers) as pool:
        pool.generate(asking(contexts(1, 40), max_tokens=100))
    counts = sorted(len(server.traffic()) for server in servers)
    assert sum(counts) == 40 and counts[0] >= 8


def test_a_server_is_given_no_more_tokens_at_once_than_allowed_and_a_larger_request_alone():
    servers = [Scripted(name, slowly) for name in "ab"]
    prompts = [[number] * 90 for number in range(30)] + [[55] * 500]
    with pool_of(*servers, options=replace(QUICK, max_outstanding_tokens=300)) as pool:
        results = pool.generate(asking(prompts, max_tokens=10))
    assert [one.prompt_tokens for one in results] == [len(prompt) for prompt in prompts]
    assert sorted(server.most_tokens for server in servers) == [300, 510]


@pytest.mark.parametrize("on_abort", ["resume", "drop_partial"])
def test_aborted_responses_are_whole_in_the_end(on_abort):
    generator, lock = random.Random(3), threading.Lock()
    aborts: dict[tuple, int] = {}

    def moody(request, number, version):
        with lock:
            key = request.request_id.split("-")[0], number
            aborts[key] = aborts.get(key, 0) + 1
            stays = aborts[key] > 3 or generator.random() < 0.3
            length = request.max_tokens if stays else generator.randrange(request.max_tokens)
        sample = whole(request, number, f"step-{generator.randrange(3)}")
        return sample if stays else cut(sample, length)

    asked = asking([[number] * (5 + number) for number in range(12)], max_tokens=30, n=3)
    with pool_of(Scripted("a", moody), Scripted("b", moody), options=replace(QUICK, on_abort=on_abort)) as pool:
        results = pool.generate(asked)
        assert pool.take_counts().resumed > 10
    for request, result in zip(asked, results, strict=True):
        assert result.request_id == request.request_id and len(result.samples) == 3
        for sample in result.samples:
            right = whole(request, 0, "")
            assert (sample.token_ids, sample.logprobs) == (right.token_ids, right.logprobs)
            assert sample.finish_reason == "length"
            edges = [edge for span in sample.version_spans for edge in (span.start, span.end)]
            assert edges[0] == 0 and edges[-1] == 30 and edges[1:-1:2] == edges[2:-1:2]
    versions = {len(sample.version_spans) for result in results for sample in result.samples}
    assert (max(versions) > 1) == (on_abort == "resume")


def test_the_rest_of_a_response_has_another_seed_than_its_beginning_and_always_the_same():
    request = GenerateRequest("r", [1, 2], n=2, max_tokens=6, seed=40)
    rests = []
    for _ in range(2):
        work = Unfinished(request)
        (first,) = work.open_requests()
        samples = whole(first, 0, "v"), cut(whole(first, 1, "v"), 4)
        work.take(first, Scripted("a").generate([first])[0].__class__("r", samples, 2, "a"))
        rests.append(work.open_requests())
    assert rests[0] == rests[1]
    (rest,) = rests[0]
    assert rest.n == 1 and rest.max_tokens == 2 and list(rest.token_ids) == [1, 2, 2, 3, 4, 5]
    assert rest.seed not in (None, 40, 41)


def test_aborts_without_end_are_an_error():
    with pool_of(Scripted("a", lambda *asked: cut(whole(*asked), 0))) as pool:
        pool.members[0].state, pool.members[0].last_reply_at = "ready", time.monotonic()
        with pytest.raises(ServerRefused, match="aborted 4 times in a row; who pauses the server"):
            pool.generate(asking([[1]]))


def test_tokens_beyond_the_bound_on_staleness_carry_no_loss():
    assert staleness("step-3", "step-5") == 2 and staleness("teacher", "teacher") == 0
    assert staleness("step-6", "step-5") is None and staleness("other-3", "step-5") is None
    spans = (VersionSpan("step-2", 0, 3), VersionSpan("step-4", 3, 5), VersionSpan("step-5", 5, 6))
    rollout = Rollout(
        PromptPair("p", (1,), (1,)), 0, (1,) * 6, (-1.0,) * 6, "processed", (True,) * 6, "stop", spans, (), "s"
    )
    assert mask_stale(rollout, "step-5", 1).loss_mask == (False,) * 3 + (True,) * 3
    assert mask_stale(rollout, "step-5", 0).loss_mask == (False,) * 5 + (True,)
    assert mask_stale(rollout, "step-5", 3).loss_mask == (True,) * 6


def raising(error: Exception):
    def answer(*_):
        raise error

    return answer


@pytest.mark.parametrize("kind", [MalformedReply, ServerUnauthorized])
def test_what_waiting_does_not_mend_ends_a_batch_at_once_when_it_is_all_servers(kind):
    started = time.monotonic()
    servers = [Scripted(name, raising(kind("spoilt"))) for name in "ab"]
    with pool_of(*servers) as pool, pytest.raises(kind, match="spoilt"):
        pool.generate(asking([[1], [2]]))
    assert time.monotonic() - started < QUICK.retry_s


def test_a_request_that_one_server_refuses_is_given_to_the_other_and_raised_when_all_do():
    narrow = Scripted(
        "a", lambda r, *more: raising(ServerRefused("too long"))() if len(r.token_ids) > 50 else whole(r, *more)
    )
    with pool_of(narrow, Scripted("b")) as pool:
        results = pool.generate(asking([[number] * (10 * number) for number in range(1, 9)]))
        assert [one.prompt_tokens for one in results] == [10 * number for number in range(1, 9)]
        assert all(member.state == "ready" for member in pool.members)
    with pool_of(narrow) as pool, pytest.raises(ServerRefused, match="too long"):
        pool.generate(asking([[1] * 60]))


def test_the_breaker_opens_for_longer_each_time_up_to_a_limit_and_forgets_with_a_reply():
    member = Member("a", Scripted("a"), replace(QUICK, breaker_s=30.0, breaker_max_s=100.0))
    pauses = []
    for _ in range(4):
        member.evict(ServerUnreachable("gone"))
        pauses.append(round(member.retry_at - time.monotonic()))
        member.evict(ServerUnreachable("looked at while open"))
        member.retry_at = 0.0
    assert pauses == [30, 60, 100, 100] and member.evictions == 1
    member.count_reply()
    member.evict(ServerUnreachable("gone"))
    assert round(member.retry_at - time.monotonic()) == 30


def test_a_server_that_was_idle_proves_itself_before_it_gets_requests():
    server = Scripted("a")
    with pool_of(server, options=replace(QUICK, canary_after_s=0.1)) as pool:
        pool.generate(asking([[1]]))
        pool.generate(asking([[2]]))
        time.sleep(0.15)
        pool.generate(asking([[3]]))
    names = [request.request_id.split("-")[0] for request in server.asked]
    assert names == ["canary", "r0", "r0", "canary", "r0"]


def test_an_update_that_fails_at_one_server_takes_its_open_requests_away():
    """The server's updates are not atomic: what it says from then on may come from a mixture."""
    gate = threading.Event()

    def stuck(request, number, version):
        if not request.request_id.startswith("canary"):
            gate.wait(10)
        return whole(request, number, version)

    mixed, good = Scripted("a", stuck, is_atomic=False), Scripted("b")
    with pool_of(mixed, good) as pool:
        publish(pool, "step-1")
        results: list = []
        batch = threading.Thread(target=lambda: results.extend(pool.generate(asking([[1] * 9, [2] * 9]))))
        batch.start()
        while not mixed.traffic():
            time.sleep(0.01)
        mixed.push = raising(ServerRefused("out of memory"))  # type: ignore[method-assign]
        publish(pool, "step-2")
        gate.set()
        batch.join(10)
        assert [one.server_id for one in results] == ["b", "b"]
        assert pool.stale_servers() == ["a"] and pool.wanted == "step-2"


def test_no_server_with_the_wanted_weights_asks_for_a_publication():
    servers = [Scripted("a"), Scripted("b")]
    with pool_of(*servers) as pool:
        publish(pool, "step-1")
        pool.generate(asking([[1], [2]]))
        for server in servers:
            server.version = "default"
        with pytest.raises(WrongWeightVersion, match="publish the weights again"):
            pool.generate(asking([[1], [2]]))
        publish(pool, "step-1")
        assert len(pool.generate(asking([[1], [2]]))) == 2


def test_pools_that_do_not_publish_trust_the_servers_that_the_publisher_trusts():
    servers = [Scripted("a"), Scripted("b")]
    with pool_of(*servers) as publisher, pool_of(*servers) as other:
        publish(publisher, "step-1")
        publisher.members[0].soil(UpdateLost("half way"))
        other.expect("step-1", publisher.synced())
        before = len(servers[0].asked)
        assert len(other.generate(asking([[1], [2]]))) == 2
        assert len(servers[0].asked) == before and other.stale_servers() == ["a"]
        publish(publisher, "step-1")
        other.expect("step-1", publisher.synced())
        other.generate(asking([[1], [2]]))
        assert not other.stale_servers()


def test_a_transfer_group_spans_all_servers_and_is_refused_when_they_have_changed():
    servers = [Scripted("a"), Scripted("b")]
    with pool_of(*servers) as pool:
        size = pool.world_size() + 1
        pool.join_group(TransferGroup("gloo", "127.0.0.1", 1, 1, size, "g", 1))
        assert [server.joined for server in servers] == [(1, 5), (3, 5)]
        pool.begin_update("step-1")
        pool.receive([])
        pool.finish_update("step-1")
        pool.members[0].evict(ServerUnreachable("gone"))
        pool.begin_update("step-2")
        with pytest.raises(UpdateLost, match="join a group again"):
            pool.receive([])
