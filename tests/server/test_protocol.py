import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from opsd_megatron.rollout.backend import ServerUnauthorized
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.vllm_wire import as_wire
from tests.server.serving import OLD, http, requests
from tests.tiny_models import VOCAB

WIRE = Path(__file__).parents[1] / "fixtures" / "wire" / "vllm-0.32.0"
ROUTES = [
    ("POST", "/inference/v1/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/server_info"),
    ("GET", "/tokenizer_info"),
    ("GET", "/weight_info"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("GET", "/is_paused"),
    ("POST", "/abort_requests"),
    ("POST", "/start_weight_update"),
    ("PUT", "/weights/0"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/abort_weight_update"),
    ("POST", "/weight_checker"),
    ("GET", "/get_world_size"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/shutdown_weight_transfer_engine"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing-here"),
]


@cache
def fixture(name: str) -> Any:
    return json.loads((WIRE / f"vllm-0.32.0-{name}.json").read_text())


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": fixture("openapi")["components"]}
    )


def validate(body: Any, name: str) -> None:
    """`body` against a component of vLLM's OpenAPI."""
    validator(name).validate(body)


def recorded(path: str, status: int) -> dict:
    return next(entry for entry in fixture("transcript") if (entry["path"], entry["status"]) == (path, status))


def shape(value):
    """Types by key; of a list, the shape of its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__


def test_requests_are_valid_for_vllm_field_by_field():
    for request in requests(2, seed=0, stop_token_ids=[3], n=2):
        validate(as_wire(request), "GenerateRequest")


def test_a_request_recorded_from_vllm_is_answered_in_vllms_shape(server):
    exchange = recorded("/inference/v1/generate", 200)
    with http(server) as client:
        reply = client.post("/inference/v1/generate", json=exchange["request"]).json()
    validate(reply, "GenerateTokensResponse")
    theirs, ours = exchange["response"], reply
    assert ours["request_id"] == theirs["request_id"]
    for name in ("index", "finish_reason", "stop_reason", "weight_versions"):
        assert shape(ours["choices"][1][name]) == shape(theirs["choices"][1][name])
    counts = {k: v for k, v in theirs["usage"].items() if v is not None}
    assert counts | {"prompt_tokens_details": {"cached_tokens": 0}} == ours["usage"]


def test_all_that_is_generated_validates_against_vllms_schemas(server):
    base = {"token_ids": [5, 6, 7, 8, 9, 10], "sampling_params": {"max_tokens": 3}}
    own = [
        base | {"sampling_params": {"n": 3, "max_tokens": 3, "prompt_logprobs": 2}, "return_token_ids": True},
        base | {"sampling_params": {"max_tokens": 3, "temperature": 0, "stop_token_ids": list(range(VOCAB))}},
    ]
    theirs = [entry["request"] for entry in fixture("transcript") if entry["path"] == "/inference/v1/generate"]
    fit = [body for body in theirs if max(body["token_ids"]) < VOCAB and body["sampling_params"].get("logprobs") != 2]
    assert len(fit) >= 4
    with http(server) as client:
        for body in own + fit:
            validate(body, "GenerateRequest")
            reply = client.post("/inference/v1/generate", json=body)
            assert reply.status_code == 200, reply.text
            validate(reply.json(), "GenerateTokensResponse")
            if "prompt_logprobs" in body["sampling_params"]:
                continue
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            validate(streamed, "GenerateRequest")
            for event in client.post("/inference/v1/generate", json=streamed).text.split("\n\n")[:-2]:
                validate(json.loads(event.removeprefix("data: ")), "GenerateTokensStreamResponse")
        for path, name, body in [
            ("/v1/completions", "CompletionRequest", {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 1}),
            ("/v1/chat/completions", "ChatCompletionRequest", {"messages": [{"role": "user", "content": "x"}], "n": 2}),
            ("/tokenize", "TokenizeCompletionRequest", {"prompt": "x", "add_special_tokens": False}),
            ("/detokenize", "DetokenizeRequest", {"tokens": [5, 6]}),
        ]:
            validate(body, name)
            assert client.post(path, json=body).status_code == 200
        card = shape(client.get("/v1/models").json()["data"][0])
        assert card.items() < shape(recorded("/v1/models", 200)["response"]["data"][0]).items()


def test_errors_have_vllms_body(exact):
    refused = [entry for entry in fixture("transcript") if entry["status"] == 400]
    exchange = next(entry for entry in refused if "vocabulary" in entry["response"]["error"]["message"])
    with http(exact) as client:
        reply = client.post("/inference/v1/generate", json=exchange["request"])
        missing = client.get("/nothing-here")
    assert reply.status_code == 400 and shape(reply.json()) == shape(exchange["response"])
    assert exchange["response"]["error"]["message"] in reply.json()["error"]["message"]
    for response in (reply, missing):
        validate(response.json(), "ErrorResponse")
    assert missing.status_code == missing.json()["error"]["code"] == 404


def test_small_control_replies_equal_the_recorded_ones(exact):
    with http(exact) as client:
        assert client.post("/resume").json() == recorded("/resume", 200)["response"]
        assert shape(client.get("/is_paused").json()) == shape(recorded("/is_paused", 200)["response"])
        assert shape(client.get("/weight_info").json()) == shape(recorded("/weight_info", 200)["response"])
        sums = client.post("/weight_checker", json={"action": "checksum"}).json()["checksums"]
    embedding = "dp0:pp0:pcp0:tp0:model.embed_tokens.weight"
    assert embedding in sums and embedding in recorded("/weight_checker", 200)["response"]["checksums"]


def test_every_route_but_health_and_version_wants_the_token(exact):
    with http(exact) as client:
        for method, path in ROUTES:
            for value in (None, "", "Bearer", "Bearer wrong", "Basic token-of-the-tests", "Bearer token-of-the-test"):
                headers = {"Authorization": value or ""}
                response = client.request(method, path, headers=headers)
                assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"}), (path, value)
        for path in ("/health", "/version"):
            assert client.get(path, headers={"Authorization": "no"}).status_code == 200
        assert client.get("/weight_info").json() == {"weight_version": OLD}


def test_a_wrong_token_is_said_to_be_one_and_is_not_tried_again(exact):
    backend = EmbeddedBackend(exact.url, "not-the-token", retry_s=60)
    with backend, pytest.raises(ServerUnauthorized, match=r"rollout\.token_variable"):
        backend.weight_version()


def test_the_list_of_routes_above_is_complete(exact):
    with http(exact) as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {p.replace("/weights/0", "/weights/{bucket}") for _, p in ROUTES} - {
        "/openapi.json",
        "/nothing-here",
    } | {"/health", "/version"}


def test_a_body_over_its_limit_is_refused(exact):
    size = (2 << 20) + 1
    with http(exact) as client:
        declared = client.put("/weights/0", content=b"0" * size)
        undeclared = client.put("/weights/0", content=iter([b"0" * size]))
        text = client.post("/inference/v1/generate", content=b" " * (33 << 20))
    for response in (declared, text):
        assert response.status_code == 413 and "limit" in response.json()["error"]["message"]
    assert undeclared.status_code == 411 and "Content-Length" in undeclared.json()["error"]["message"]


def test_metrics_count_what_was_done(exact):
    def counts(client):
        lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    with http(exact) as client, exact.backend() as backend:
        before = counts(client)
        asked = requests(3, max_tokens=4, n=2)
        backend.generate(asked)
        after = counts(client)
    assert after["opsd_generation_tokens_total"] - before["opsd_generation_tokens_total"] == 24
    prompt_tokens = sum(len(request.token_ids) for request in asked)
    assert after["opsd_prompt_tokens_total"] - before["opsd_prompt_tokens_total"] == prompt_tokens
    assert after["opsd_requests_running"] == 0


def test_a_client_that_hangs_up_frees_the_engine(server):
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1000, "ignore_eos": True}}
    with http(server) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/inference/v1/generate", json=body, timeout=0.2)
        started = time.monotonic()
        client.post("/inference/v1/generate", json={"token_ids": [1], "sampling_params": {"max_tokens": 1}})
        running = client.get("/metrics").text
    assert "opsd_requests_running 0.0" in running and 'outcome="failed"' in running
    assert time.monotonic() - started < 10


def test_completions_take_ids_and_batches_of_ids(exact):
    body = {"max_tokens": 3, "temperature": 1.0, "logprobs": 0, "return_token_ids": True, "seed": 4, "ignore_eos": True}
    exchange = recorded("/v1/completions", 200)
    with http(exact) as client:
        single = client.post("/v1/completions", json={"prompt": [5, 6], **body}).json()
        batch = client.post("/v1/completions", json={"prompt": [[7, 8, 9], [5, 6]], **body}).json()
        recorded_reply = client.post("/v1/completions", json=exchange["request"]).json()
    choice = single["choices"][0]
    assert choice["token_ids"] == batch["choices"][1]["token_ids"] and choice["prompt_token_ids"] == [5, 6]
    assert choice["logprobs"]["token_logprobs"] == batch["choices"][1]["logprobs"]["token_logprobs"]
    counts = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert single["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    theirs = exchange["response"]["choices"][0]
    ours = recorded_reply["choices"][0]
    assert shape(theirs["token_ids"]) == shape(ours["token_ids"])
    assert len(theirs["logprobs"]["token_logprobs"]) == len(ours["logprobs"]["token_logprobs"])
