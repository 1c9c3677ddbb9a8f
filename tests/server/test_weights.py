import concurrent.futures
import hashlib
import socket
import time

import pytest
import safetensors.torch
import torch

from opsd_megatron.rollout.backend import GenerateRequest, ServerRefused, UpdateLost
from tests.server.serving import NEW, OLD, TOKEN, http, largest_gap, prompts, requests, server_for


@pytest.fixture(scope="module")
def fresh_answers(root, tmp_path_factory):
    """What a server that was started with the new weights answers, and their checksums."""
    with server_for(root, NEW, "exact", tmp_path_factory.mktemp("fresh")) as server, server.backend() as backend:
        return [result.samples for result in backend.generate(requests(5))], backend.checksum()


def new_weights(root) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(root / NEW / "model.safetensors")


def buckets(tensors: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i : i + size]} for i in range(0, len(names), size)]


@pytest.mark.parametrize("way", ["body", "disk"])
def test_published_weights_answer_like_a_fresh_server(exact, root, fresh_answers, way):
    with exact.backend() as backend:
        before = backend.checksum()
        if way == "body":
            backend.begin_update(NEW)
            for bucket in buckets(new_weights(root), 7):
                backend.push(bucket)
            backend.finish_update(NEW)
        else:
            backend.update_from_disk(NEW, NEW)
        answers = [result.samples for result in backend.generate(requests(5))]
        assert (answers, backend.checksum()) == fresh_answers
        assert backend.weight_version() == NEW
        assert before.keys() == backend.checksum().keys() and before != backend.checksum()


def test_nothing_of_the_old_weights_is_left_in_the_fast_engines_cache(fast, new_model):
    asked = requests(8)
    with fast.backend() as backend:
        backend.generate(asked)
        backend.update_from_disk(NEW, NEW)
        again = backend.generate(asked)
    assert max(largest_gap(new_model, a, r.samples[0]) for a, r in zip(asked, again, strict=True)) <= 1e-5


def test_an_update_waits_for_requests_in_flight(server, old_model):
    long = GenerateRequest("long", prompts(1)[0], max_tokens=150, ignore_eos=True)
    with server.backend() as backend, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(backend.generate, [long])
        wait_until_running(server)
        backend.update_from_disk(NEW, NEW)
        sample = running.result()[0].samples[0]
    assert [span.version for span in sample.version_spans] == [OLD]
    assert largest_gap(old_model, long, sample) <= 1e-5


def test_keep_carries_requests_over_a_swap_and_their_spans_say_which_weights_made_what(server, old_model, new_model):
    long = GenerateRequest("long", prompts(1)[0], n=2, max_tokens=400, seed=3, ignore_eos=True)
    with server.backend() as backend, concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(backend.generate, [long])
        wait_until_running(server, seconds=0.15)
        backend.pause("keep")
        queued = pool.submit(backend.generate, requests(1))
        backend.update_from_disk(NEW, NEW)
        assert not queued.done()
        backend.resume()
        samples = running.result()[0].samples
        late = queued.result()[0].samples[0]
    assert {span.version for span in late.version_spans} == {NEW}
    carried = next(sample for sample in samples if len(sample.version_spans) == 2)
    old, new = carried.version_spans
    assert (old.version, old.start, new.version, new.end) == (OLD, 0, NEW, 400) and 0 < old.end == new.start < 400
    made_by_old = type(carried)(
        carried.token_ids[: old.end], carried.logprobs[: old.end], "length", None, (), "processed"
    )
    assert largest_gap(old_model, long, made_by_old) <= 1e-5
    rest = GenerateRequest("rest", [*long.token_ids, *carried.token_ids[: new.start]])
    tail = carried.token_ids[new.start :], carried.logprobs[new.start :]
    assert largest_gap(new_model, rest, type(carried)(*tail, "length", None, (), "processed")) <= 1e-5


def test_abort_ends_requests_with_what_they_have(server, old_model):
    long = GenerateRequest("long", prompts(1)[0], n=2, max_tokens=900, ignore_eos=True)
    with server.backend() as backend, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(backend.generate, [long])
        wait_until_running(server, seconds=0.1)
        assert backend.abort(["nobody"]) == 0
        assert backend.abort(["generate-tokens-long"]) == 1
        samples = running.result()[0].samples
        assert backend.generate(requests(2))[1].samples[0].finish_reason == "length"
    assert {sample.finish_reason for sample in samples} == {"abort"}
    begun = [sample for sample in samples if sample.token_ids]
    assert begun and all(largest_gap(old_model, long, sample) <= 1e-5 for sample in begun)


def test_a_paused_server_refuses_new_requests_until_it_resumes(server):
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}
    with http(server) as client:
        for mode in ("wait", "abort"):
            assert client.post(f"/pause?mode={mode}").json() == {"status": "paused"}
            assert client.get("/is_paused").json() == {"is_paused": True}
            assert client.post("/inference/v1/generate", json=body).status_code == 503
            assert client.post("/resume").json() == {"status": "resumed"}
            assert client.post("/inference/v1/generate", json=body).status_code == 200
        assert client.post("/pause?mode=later").status_code == 400


def test_a_bad_update_is_refused_and_the_old_weights_go_on(exact, root):
    good = new_weights(root)
    some = next(iter(good))
    with exact.backend() as backend:
        answers, sums = backend.generate(requests(3)), backend.checksum()

        def refused(match: str, *pushed: dict) -> None:
            backend.begin_update("bad")
            with pytest.raises(ServerRefused, match=match):
                for bucket in pushed:
                    backend.push(bucket)
                backend.finish_update("bad")
            backend.abort_update()
            assert (backend.weight_version(), backend.checksum()) == (OLD, sums)

        refused("tensors are missing, first", {some: good[some]})
        refused("has shape", {some: good[some][:-1]})
        refused("is torch.bfloat16, expected torch.float32", {some: good[some].bfloat16()})
        refused("is no tensor of this model", {"model.layers.9.weight": good[some]})
        refused("in two buckets", good, {some: good[some]})
        with pytest.raises(UpdateLost, match="publish again"):
            backend.finish_update("bad")
        assert [r.samples for r in backend.generate(requests(3))] == [r.samples for r in answers]


def test_a_broken_body_is_refused_and_a_repeated_bucket_mends_it(exact, root, new_model):
    body = safetensors.torch.save(new_weights(root))
    digest = {"X-Content-SHA256": hashlib.sha256(body).hexdigest()}
    half = body[: len(body) // 2]
    with http(exact) as client:
        client.post("/start_weight_update")
        wrong = client.put("/weights/0", content=body, headers={"X-Content-SHA256": "0" * 64})
        cut = client.put("/weights/0", content=half, headers={"X-Content-SHA256": hashlib.sha256(half).hexdigest()})
        send_and_hang_up(exact.port, body, digest["X-Content-SHA256"])
        incomplete = client.post("/finish_weight_update", json={"weight_version": "bad"})
        assert [r.status_code for r in (wrong, cut, incomplete)] == [400, 400, 409]
        assert "sha256" in wrong.text and "not a whole safetensors file" in cut.text
        assert client.get("/weight_info").json() == {"weight_version": OLD}
        assert client.put("/weights/0", content=body, headers=digest).status_code == 200
        assert client.post("/finish_weight_update", json={"weight_version": NEW}).status_code == 200
    request = requests(1)[0]
    with exact.backend() as backend:
        assert largest_gap(new_model, request, backend.generate([request])[0].samples[0]) <= 1e-5


def test_disk_updates_stay_below_the_root(exact, root):
    (root.parent / "elsewhere").mkdir(exist_ok=True)
    (root / "link").symlink_to(root.parent / "elsewhere")
    with http(exact) as client:
        client.post("/start_weight_update")
        for path in ("../elsewhere", str(root.parent / "elsewhere"), "/etc", "link"):
            response = client.post("/update_weights", json={"update_info": {"path": path}})
            assert response.status_code == 403, path
        assert client.post("/update_weights", json={"update_info": {"path": "absent"}}).status_code == 400
        client.post("/abort_weight_update")
    (root / "link").unlink()


def send_and_hang_up(port: int, body: bytes, digest: str) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = (
            f"PUT /weights/0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"X-Content-SHA256: {digest}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body[: len(body) // 3])


def wait_until_running(server, seconds: float = 0.0) -> None:
    """Returns `seconds` after a request has entered the engine."""
    with http(server) as client:
        for _ in range(500):
            if "opsd_requests_running 1.0" in client.get("/metrics").text:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("no request reached the engine")
    time.sleep(seconds)
