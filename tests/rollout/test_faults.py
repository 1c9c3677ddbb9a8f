"""The fault table: whatever happens to one of two servers, or to both for a while, the step ends with every response
whole, once, and of the right weights. Both servers are exact and seeded, so that this is equality with the responses of
a server that nothing happened to."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
from torch import Tensor

from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, UpdateLost
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.servers import ServerPool
from opsd_megatron.rollout.process import ServerProcess
from tests.rollout.faulty_proxy import Fault, Faults, proxied
from tests.server.serving import NEW, OLD, TOKEN, largest_gap, load, requests, server_for
from tests.tiny_models import write_tiny_model

FAST = PoolOptions(
    request_s=20.0,
    retry_s=30.0,
    backoff_s=0.02,
    breaker_s=0.3,
    breaker_max_s=1.0,
    health_s=0.4,
    canary_s=10.0,
    poll_s=0.2,
)
VERSIONS = (f"step-{number}" for number in count())
A, B = 0, 1


@dataclass
class Cluster:
    """Two servers behind a proxy that spoils their traffic on demand."""

    root: Path
    servers: list[ServerProcess]
    faults: Faults
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.root / OLD / "model.safetensors")

    def buckets(self, number: int = 2) -> list[dict[str, Tensor]]:
        names = sorted(self.weights)
        return [{name: self.weights[name] for name in names[start::number]} for start in range(number)]

    def publish(self, pool: ServerPool, between: Callable[[], None] = lambda: None, number: int = 2) -> str:
        """The weights of OLD under a new version; `between` runs after the first bucket."""
        version = next(VERSIONS)
        pool.begin_update(version)
        for order, bucket in enumerate(self.buckets(number)):
            pool.push(bucket)
            if order == 0:
                between()
        pool.finish_update(version)
        return version

    @contextmanager
    def pool(self, **options) -> Iterator[ServerPool]:
        """Both servers, up and with weights of a new version."""
        for number, server in enumerate(self.servers):
            self.faults.set(number, None)
            if server._process is None:
                server.start()
            server.wait_until_ready()
        named = dict(zip("AB", self.faults.urls, strict=True))
        backends = {name: EmbeddedBackend(url, TOKEN, retry_s=0.1, timeout_s=60) for name, url in named.items()}
        pool = ServerPool(backends, FAST if not options else PoolOptions(**vars(FAST) | options))
        try:
            pool.wait_until_healthy(30)
            self.publish(pool)
            yield pool
        finally:
            for number in (A, B):
                self.faults.set(number, Fault("cut", ""))  # whoever still waits for a reply gets an end
            pool.close()

    def begin(self, pool: ServerPool, asked: list[GenerateRequest]) -> "Future[list[GenerateResult]]":
        return self.threads.submit(pool.generate, asked)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate((OLD, NEW)):  # 1.5 MiB of weights
        write_tiny_model(root / name, "qwen3", seed=seed, max_position_embeddings=1024, intermediate_size=384)
    servers = []
    for name, limit_mb in {"a": "2", "b": "1"}.items():
        (root / name).mkdir()
        servers.append(server_for(root, OLD, "exact", root / name, "--max-bucket-mb", limit_mb))
    for server in servers:
        server.launch()
    for server in servers:
        server.wait_until_ready()
    with proxied([server.port for server in servers]) as faults:
        yield Cluster(root, servers, faults)
    for server in servers:
        server.stop()


SHORT = requests(6, n=2, max_tokens=6)
LONG = requests(6, n=1, max_tokens=90)


@pytest.fixture(scope="module")
def wanted(cluster) -> dict[str, list[GenerateResult]]:
    """What an undisturbed server answers to SHORT and LONG."""
    with EmbeddedBackend(cluster.servers[A].url, TOKEN) as backend:
        return {"short": backend.generate(SHORT), "long": backend.generate(LONG)}


def assert_whole(results: list[GenerateResult], wanted: list[GenerateResult], version: str | None) -> None:
    """Every response once, in order, bit for bit, and every token from `version`."""
    assert [one.request_id for one in results] == [one.request_id for one in wanted]
    for result, reference in zip(results, wanted, strict=True):
        for sample, right in zip(result.samples, reference.samples, strict=True):
            assert (sample.token_ids, sample.logprobs) == (right.token_ids, right.logprobs)
            assert sample.finish_reason == right.finish_reason
            (span,) = sample.version_spans
            assert (span.version, span.start, span.end) == (version, 0, len(sample.token_ids))


def assert_comes_back(cluster, pool, wanted) -> None:
    """A whole update makes the second server serve again."""
    pool.members[B].retry_at = 0.0
    cluster.publish(pool)
    assert_whole(pool.generate(SHORT[:2]), wanted["short"][:2], pool.wanted)
    assert state(pool, B) == "ready"


def servers_of(results: list[GenerateResult]) -> set[str]:
    return {result.server_id for result in results}


def state(pool: ServerPool, number: int) -> str:
    return pool.members[number].state


SPOILT = {  # fault at B -> whether B is out of the pool at the end
    "503 burst": (Fault("503", times=5), False),
    "truncated JSON": (Fault("truncated"), True),
    "wrong length": (Fault("short"), True),
    "NaN log-prob": (Fault("nan"), True),
    "unauthorised": (Fault("401"), True),
    "hung": (Fault("hang", path="/"), True),
    "hung, but healthy": (Fault("hang", times=1), False),
    "replies lost": (Fault("lost reply", times=3), False),
    "network cut": (Fault("cut", path="/"), True),
    "slow client": (Fault("slow client", times=3), False),
}


@pytest.mark.parametrize("row", SPOILT)
def test_a_step_is_completed_when_one_server_is(cluster, wanted, row):
    fault, is_lost = SPOILT[row]
    with cluster.pool(request_s=2.0 if row == "hung, but healthy" else 20.0) as pool:
        pool.generate(SHORT[:2])  # both have proved themselves
        good = pool.members[A].server_id
        cluster.faults.set(B, fault)
        results = pool.generate(SHORT)
        assert cluster.faults.hits(B) > 0
        assert_whole(results, wanted["short"], pool.wanted)
        if is_lost:
            assert servers_of(results) == {good} and state(pool, B) != "ready"
            assert pool.take_counts().evictions >= 1
            cluster.faults.set(B, None)
            assert_comes_back(cluster, pool, wanted)


def test_a_step_is_completed_when_one_server_is_killed_in_the_middle_of_it(cluster, wanted):
    with cluster.pool() as pool:
        running = cluster.begin(pool, LONG)
        while not pool.members[B].running:
            time.sleep(0.01)
        cluster.servers[B].kill()
        cluster.servers[B].launch()
        assert_whole(running.result(60), wanted["long"], pool.wanted)
        assert pool.take_counts().retries >= 1
        cluster.servers[B].wait_until_ready()
        pool.members[B].retry_at = 0.0
        again = pool.generate(SHORT)  # it is there again, with other weights than are wanted
        assert_whole(again, wanted["short"], pool.wanted)
        assert servers_of(again) == {pool.members[A].server_id} and pool.stale_servers() == ["B"]
        cluster.publish(pool)
        again = pool.generate(SHORT)
        assert_whole(again, wanted["short"], pool.wanted)
        assert len(servers_of(again)) == 2 and not pool.stale_servers()


def test_a_step_is_completed_when_one_server_serves_other_weights(cluster, wanted):
    with cluster.pool() as pool, cluster.servers[B].backend() as backend:
        pool.generate(SHORT[:2])
        backend.update_from_disk(NEW, "someone-elses")
        results = pool.generate(SHORT)
        assert_whole(results, wanted["short"], pool.wanted)
        assert servers_of(results) == {pool.members[A].server_id} and pool.stale_servers() == ["B"]


@pytest.mark.parametrize("row", ["failing half way", "cut half way", "too large a body"])
def test_a_step_is_completed_when_the_update_of_one_server_is(cluster, wanted, row):
    with cluster.pool() as pool:
        fault = {"failing half way": Fault("500", "/weights/1"), "cut half way": Fault("cut", "/")}.get(row)
        # one bucket of all weights is larger than B takes
        cluster.publish(pool, lambda: cluster.faults.set(B, fault), number=1 if row == "too large a body" else 2)
        assert state(pool, B) in ("dirty", "evicted")
        cluster.faults.set(B, None)
        results = pool.generate(SHORT)
        assert_whole(results, wanted["short"], pool.wanted)
        assert servers_of(results) == {pool.members[A].server_id} and state(pool, B) != "ready"
        assert_comes_back(cluster, pool, wanted)


def test_a_step_is_completed_when_all_servers_are_down_for_30_seconds(cluster, wanted):
    with cluster.pool(retry_s=60.0) as pool:
        running = cluster.begin(pool, LONG)
        while not pool.members[B].running:
            time.sleep(0.01)
        for number in (A, B):
            cluster.faults.set(number, Fault("cut", "/"))
        time.sleep(30)
        assert not running.done() and not pool.health()
        for number in (A, B):
            cluster.faults.set(number, None)
        assert_whole(running.result(60), wanted["long"], pool.wanted)


def test_responses_aborted_by_a_pause_go_on_where_they_were(cluster):
    with cluster.pool() as pool:
        running = cluster.begin(pool, LONG)
        while not pool.members[B].running:
            time.sleep(0.01)
        time.sleep(0.1)
        pool.pause("abort")
        first = pool.wanted
        second = cluster.publish(pool)
        pool.resume()
        results = running.result(60)
        assert pool.take_counts().resumed >= 1
        spans = [tuple(span.version for span in one.samples[0].version_spans) for one in results]
        assert (first, second) in spans
        model = load(cluster.root / OLD)
        for request, result in zip(LONG, results, strict=True):
            assert len(result.samples[0].token_ids) == request.max_tokens
            assert largest_gap(model, request, result.samples[0]) <= 1e-5


def test_a_step_is_completed_when_one_server_is_killed_in_the_middle_of_an_update(cluster, wanted):
    with cluster.pool() as pool:
        cluster.publish(pool, cluster.servers[B].kill)
        results = pool.generate(SHORT)
        assert_whole(results, wanted["short"], pool.wanted)
        assert state(pool, B) == "evicted"
        cluster.faults.set(A, Fault("cut", "/weights"))
        with pytest.raises(UpdateLost, match="publish again"):
            cluster.publish(pool)
        cluster.faults.set(A, Fault("cut", "/"))
        threading.Timer(0.5, cluster.faults.set, (A, None)).start()
        cluster.publish(pool)  # waits for a server
        assert_whole(pool.generate(SHORT), wanted["short"], pool.wanted)
