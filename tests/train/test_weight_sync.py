"""Publication of weights: over every transport, and when anything on the way fails."""

import hashlib
import time

import pytest
import safetensors.torch
import torch

from opsd_megatron.checkpoint.shard_plan import TensorSpec
from opsd_megatron.config import ParallelConfig, RolloutConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.rollout.backend import (
    Capabilities,
    HalfUpdated,
    ServerRefused,
    TransferGroup,
    UpdateLost,
    WrongChecksum,
)
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.groups import divide_group
from opsd_megatron.train.transports import HttpCarrier
from opsd_megatron.train.weight_sync import _Update, possible_transports
from opsd_megatron.transfer import ALIGNMENT, as_bytes, pack, packed_buckets, unpack
from tests.ranks import forked, run_on_ranks
from tests.server.serving import NEW, OLD, http, requests, served, shared_root, shared_servers
from tests.train.publishing import Publishing, publish_by_each, publish_slowly


@pytest.fixture(scope="module")
def root():
    return shared_root()


@pytest.fixture
def server():
    with served(shared_servers()["exact"], OLD) as ready:
        yield ready


def sums_of(directory) -> dict[str, str]:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    return {name: hashlib.sha256(as_bytes(tensor).numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_every_transport_publishes_a_sharded_model_and_a_failure_reaches_every_rank(server, root):
    seen = run_on_ranks(4, publish_by_each, root, (OLD, NEW), server.url, ParallelConfig(tp=2, pp=2))
    wanted = sums_of(root / NEW)
    assert seen[0][::2] == [(name, wanted) for name in ("gloo", "disk", "http")]
    assert all(rank[1::2] == ["ServerUnauthorized"] * 3 for rank in seen)
    assert [path.name for path in (root / "shared").iterdir()] == ["weights-second"]


def test_published_through_a_group_weights_answer_bit_for_bit_as_from_disk(server, root):
    one = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig(transport="gloo"))
    assert one.backend is not None
    one.backend.update_from_disk(NEW, NEW)
    wanted = [result.samples for result in one.backend.generate(requests(4))]
    for _ in range(3):  # the third lies where the first lay
        one.publish(NEW)
        assert [result.samples for result in one.backend.generate(requests(4))] == wanted
    one.close()


def test_a_trainer_that_dies_in_a_broadcast_leaves_the_server_whole_and_ready_for_the_next(server, root, tmp_path):
    before = sums_of(root / OLD)
    victim = forked(publish_slowly, root, NEW, server.url, tmp_path / "sent")
    with http(server) as client, server.backend() as backend:
        wait_for((tmp_path / "sent").exists)
        second = client.post("/update_weights", json=UPDATE_OF_NOTHING)
        assert second.status_code == 409 and "another transfer is under way" in second.text
        assert backend.generate(requests(1))[0].samples  # the loop is not held up by what is being received
        victim.kill()
        victim.join()
        assert (backend.weight_version(), backend.checksum()) == (OLD, before)
    one = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig(transport="gloo", checksum_every=1))
    one.publish(NEW)
    one.close()


UPDATE_OF_NOTHING = {"update_info": {"names": ["x"], "dtype_names": ["float32"], "shapes": [[1]]}}


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_knows_nothing_of_the_group_any_more_is_met_again(server, root):
    one = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig(transport="gloo", checksum_every=1))
    one.publish("first")
    with http(server) as client:
        client.post("/shutdown_weight_transfer_engine")  # as after a restart
    with pytest.raises(UpdateLost, match="publish again"):
        one.publish("second")
    one.publish("second")
    assert one.backend is not None and one.backend.weight_version() == "second"
    one.close()


def test_a_group_that_is_not_formed_gives_way_to_http_under_auto_only(server, root, monkeypatch):
    monkeypatch.setattr("opsd_megatron.train.transports.GROUP_S", 0.5)
    monkeypatch.setattr(EmbeddedBackend, "join_group", lambda *_: None)
    auto = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig())
    published = auto.publish(NEW)
    assert published is not None and published.transport == "http"
    fixed = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig(transport="gloo"))
    with pytest.raises(UpdateLost, match="was not formed"):
        fixed.publish("other")
    auto.close()
    fixed.close()


def test_a_checksum_finds_one_wrong_value(server, root, monkeypatch):
    def push(self, bucket):
        name = next(iter(bucket))
        wrong = bucket[name].clone()
        wrong.view(-1)[0] += 1
        original(self, {**bucket, name: wrong})

    original = EmbeddedBackend.push
    one = Publishing(root / NEW, server.url, ParallelConfig(), RolloutConfig(transport="http", checksum_every=2))
    one.publish("right")
    monkeypatch.setattr(EmbeddedBackend, "push", push)
    one.publish("not looked at")
    with pytest.raises(WrongChecksum, match=r"1 of \d+ served tensors differ"):
        one.publish("looked at")
    one.close()


def test_what_does_not_fit_is_refused_before_a_byte_is_sent(server, root):
    with http(server) as client:
        client.post("/start_weight_update")
        join = {"backend": "gloo", "master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
        join |= {"group_name": "g", "packed_buffer_size_bytes": 1000, "timeout_s": 0.3}
        assert client.post("/init_weight_transfer_engine", json={"init_info": join}).status_code == 409
        nccl = client.post("/init_weight_transfer_engine", json={"init_info": join | {"backend": "nccl"}})
        assert nccl.status_code == 400 and "knows ['gloo']" in nccl.text
        lengths = {"names": ["a", "b"], "dtype_names": ["float32"], "shapes": [[1]]}
        assert client.post("/update_weights", json={"update_info": lengths}).status_code == 400
        assert "NoTransferGroupError" in client.post("/update_weights", json=UPDATE_OF_NOTHING).text
        client.post("/abort_weight_update")


class Listed:
    """A server that lists what it is asked and fails at one call; what it has would be weights."""

    def __init__(self, is_atomic: bool, fails_at: str | None):
        self.calls: list[str] = []
        self._is_atomic, self._fails_at = is_atomic, fails_at

    def capabilities(self) -> Capabilities:
        modes, ways = frozenset(("keep",)), frozenset(("http", "gloo"))
        return Capabilities("processed", False, True, modes, ways, self._is_atomic, False, False, False)

    def __getattr__(self, name: str):
        def call(*_):
            self.calls.append(name)
            if name == self._fails_at:
                raise ServerRefused(f"{name} failed")

        return call


class Held(HttpCarrier):
    """As a group: weights may change with the first bucket."""

    touches_early = True


@pytest.mark.parametrize("is_atomic", [True, False])
@pytest.mark.parametrize("fails_at", ["pause", "begin_update", "push", "finish_update", "flush_cache", "resume", None])
def test_a_server_is_resumed_unless_its_weights_may_be_a_mixture(is_atomic, fails_at):
    backend = Listed(is_atomic, fails_at)
    tensors = [(f"t{number}", torch.ones(number + 1)) for number in range(4)]
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    carrier = Held(backend)  # type: ignore[arg-type]
    carrier.bucket_bytes = 8
    update = _Update(backend, backend.capabilities(), RolloutConfig(pause="keep"), False)  # type: ignore[arg-type]
    if fails_at is None:
        assert update.run(carrier, specs, iter(tensors), "v").transport == "http"
    else:
        is_mixture = not is_atomic and fails_at != "pause"
        with pytest.raises(HalfUpdated if is_mixture else ServerRefused, match=f"{fails_at} failed"):
            update.run(carrier, specs, iter(tensors), "v")
        assert ("resume" in backend.calls) == ((not is_mixture and "pause" in backend.calls) or fails_at == "resume")
        assert "abort_update" in backend.calls
    if fails_at is None:
        pushes = ["push"] * 3
        inside = ["begin_update", *pushes, "pause"] if is_atomic else ["pause", "begin_update", *pushes]
        assert backend.calls == [*inside, "finish_update", "flush_cache", "resume"]


def test_auto_takes_what_both_have_and_a_pause_mode_that_the_server_lacks_is_refused(tmp_path):
    everything = frozenset(("disk", "http", "gloo", "nccl"))
    offered = Capabilities("processed", True, True, frozenset(("abort",)), everything, True, True, True, True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert possible_transports(RolloutConfig(), offered, cpu) == ["gloo", "http"]
    assert possible_transports(RolloutConfig(), offered, gpu) == ["nccl", "gloo", "http"]
    shared = RolloutConfig(shared_directory=tmp_path, colocated=True)
    assert possible_transports(shared, offered, gpu) == ["disk", "gloo", "http"]
    assert possible_transports(RolloutConfig(transport="nccl"), offered, cpu) == []
    with pytest.raises(ConfigError, match=r"rollout\.pause=wait: this server knows keep"):
        _Update(Listed(True, None), Listed(True, None).capabilities(), RolloutConfig(), False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot join two processes on one GPU"):
        RolloutConfig(transport="nccl", colocated=True)


def test_packed_tensors_come_out_as_they_went_in_at_aligned_places():
    shapes = [(3, 5), (7,), (64, 4), (), (1000,)]
    kinds = [torch.bfloat16, torch.float32, torch.float32, torch.float64, torch.bfloat16]
    tensors = [torch.randn(shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    sizes = [tensor.nbytes for tensor in tensors]
    assert packed_buckets(sizes, 50) == [range(2), range(2, 3), range(3, 5)]
    assert packed_buckets(sizes, 58) == [range(3), range(3, 5)] and packed_buckets([], 5) == []
    for limit in (1, 50, 2000, 10**6):
        out = []
        for bucket in packed_buckets(sizes, limit):
            flat = pack([tensors[i] for i in bucket], torch.empty(sum(sizes), dtype=torch.uint8)).clone()
            out += unpack(flat, [kinds[i] for i in bucket], [shapes[i] for i in bucket])
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, out, strict=True))
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in out)


def test_servers_share_a_group_by_their_ranks():
    group = TransferGroup("gloo", "127.0.0.1", 1, 1, 8, "g", 1)
    assert [one.rank_offset for one in divide_group(group, [4, 1, 2])] == [1, 5, 6]
    with pytest.raises(ValueError, match="room for 7"):
        divide_group(group, [4, 4])
