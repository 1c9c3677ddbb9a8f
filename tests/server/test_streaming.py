"""Events: the same tokens and text as without them, as they are made, and no client in the way of another."""

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from opsd_megatron.server.text import Text
from opsd_megatron.server.writing import Pieces, Writing
from tests.server.serving import OLD, TOKEN, http

GREEDY = {"temperature": 0, "ignore_eos": True}


def events(client: httpx.Client, path: str, **body) -> Iterator[dict]:
    """The parsed events; the stream must end with [DONE]."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_streamed_tokens_equal_the_whole_reply_and_come_one_by_one(server):
    whole_body = {"token_ids": [5, 6, 7], "sampling_params": GREEDY | {"max_tokens": 60}}
    with http(server) as client:
        whole = client.post("/inference/v1/generate", json=whole_body).json()["choices"][0]
        parts = [event["choices"][0] for event in events(client, "/inference/v1/generate", **whole_body)]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    assert [e for part in parts for e in part["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert len(parts) > 10
    assert {part["finish_reason"] for part in parts[:-1]} == {None}
    assert parts[-1]["finish_reason"] == "length"
    assert parts[-1]["weight_versions"] == [{"version": OLD, "start": 0, "end": 60}]


def test_streamed_text_of_several_prompts_and_chats_equals_the_whole_text(server):
    completion = {"prompt": ["the red key", "the old key"], "max_tokens": 50, "stream_options": {"include_usage": True}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30}
    with http(server) as client:
        whole = client.post("/v1/completions", json={**completion, **GREEDY, "stream_options": None}).json()
        *parts, last = events(client, "/v1/completions", **completion, **GREEDY)
        answer = client.post("/v1/chat/completions", json=chat | GREEDY).json()["choices"][0]
        pieces = [event["choices"][0] for event in events(client, "/v1/chat/completions", **chat, **GREEDY)]
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"] and len(own) > 5
        assert own[-1]["finish_reason"] == "length" and own[-1]["weight_versions"] == choice["weight_versions"]
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert "".join(piece["delta"]["content"] for piece in pieces) == answer["message"]["content"]
    assert pieces[0]["delta"]["role"] == "assistant" and "role" not in pieces[1]["delta"]


def test_a_streamed_text_never_shows_the_beginning_of_a_stop_string(server):
    body = {"prompt": "the red key", **GREEDY}
    with http(server) as client:
        text = client.post("/v1/completions", json=body | {"max_tokens": 40}).json()["choices"][0]["text"]
        stop = text[10:22]
        parts = [e["choices"][0] for e in events(client, "/v1/completions", **body, max_tokens=900, stop=[stop])]
    assert "".join(part["text"] for part in parts) == text[: text.index(stop)]
    assert (parts[-1]["finish_reason"], parts[-1]["stop_reason"]) == ("stop", stop)


def test_what_fails_before_the_first_event_has_its_own_status(server):
    body = {"prompt": "the", "stream": True}
    with http(server) as client:
        assert client.post("/v1/completions", json=body | {"max_tokens": 5000}).status_code == 400
        assert client.post("/v1/completions", json=body | {"logprobs": 2}).status_code == 400
        client.post("/pause?mode=wait")
        assert client.post("/v1/completions", json=body).status_code == 503


def test_an_abort_ends_a_stream_with_what_it_has(server):
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 900, "ignore_eos": True}, "request_id": "mine"}
    streamed = {"url": "/inference/v1/generate", "json": body | {"stream": True}}
    with http(server) as other, http(server) as client, client.stream("POST", **streamed) as response:
        lines = (line for line in response.iter_lines() if line)
        first = next(lines)
        assert other.post("/abort_requests", json={"request_ids": ["mine"]}).json()["aborted"] == 1
        *rest, done = lines
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in (first, *rest)]
    made = sum(len(choice["token_ids"]) for choice in choices)
    assert done == "data: [DONE]" and choices[-1]["finish_reason"] == "abort" and 0 < made < 900
    assert choices[-1]["weight_versions"] == [{"version": OLD, "start": 0, "end": made}]


def test_a_client_that_hangs_up_in_a_stream_frees_the_engine(server):
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 900, "ignore_eos": True}, "stream": True}
    with http(server) as client:
        with client.stream("POST", "/inference/v1/generate", json=body) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 5
        while "opsd_requests_running 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline, "the request is still running"
            time.sleep(0.02)
        assert 'samples_total{finish_reason="length"} 900' not in client.get("/metrics").text


def test_a_client_that_does_not_read_holds_up_nobody(fast):
    """Its response is generated to the end, and a weight update waits for the engine, not for the client."""
    params = {"max_tokens": 300, "n": 32, "ignore_eos": True}
    name = "r" * 256  # makes 4.5 MB of 9600 events, more than the kernel holds for a reader that does not read
    body = json.dumps({"token_ids": [5, 6], "sampling_params": params, "stream": True, "request_id": name}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", fast.port))
        slow.sendall(
            b"POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Authorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        with http(fast) as client, fast.backend() as backend:
            while "opsd_requests_running 1.0" not in client.get("/metrics").text:
                time.sleep(0.01)
            assert client.post("/v1/completions", json={"prompt": [1], "max_tokens": 2}).status_code == 200
            backend.pause("wait")
            assert "opsd_requests_running 0.0" in client.get("/metrics").text
        slow.settimeout(20)
        received = b""
        while b"[DONE]" not in received[-200:]:
            received += slow.recv(1 << 16)
    assert received.count(b'"finish_reason":"length"') == 32
    assert received.count(b"data: ") < 8000  # merged while nobody read


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory) -> Text:
    """Every byte a token: all characters beyond ASCII are split."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("bytewise")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({"<eos>": 0} | {letter: n for n, letter in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return Text(directory)


def test_pieces_hold_whole_characters_and_add_up_to_the_text(bytewise):
    written = "5 € für 日本 🦊!"
    tokens = bytewise.encode(written, False)
    pieces = Pieces(bytewise, skip_special=True)
    parts = [pieces.add(token) for token in tokens]
    assert "".join(parts) == written and pieces.rest() == ""
    assert [part for part in parts if part] == list(written)
    cut = Pieces(bytewise, skip_special=True)
    parts = [cut.add(token) for token in tokens[:-3]]
    assert "".join(parts) + cut.rest() == bytewise.decode(tokens[:-3], True) == written[:-2] + "\ufffd"


def test_bytes_that_are_no_text_come_through_in_bounded_time(bytewise):
    broken = bytewise.encode("é", False)[:1] * 3000
    pieces = Pieces(bytewise, skip_special=True)
    started = time.perf_counter()
    assert "".join(pieces.add(token) for token in broken) + pieces.rest() == "\ufffd" * 3000
    assert time.perf_counter() - started < 5


def test_a_stop_string_is_found_over_token_and_character_borders(bytewise):
    tokens = bytewise.encode("ab€cd€e", False)
    writing = Writing(bytewise, ["€c", "nothing"], frozenset(), True)
    shown = ""
    ends = []
    for count in range(1, len(tokens) + 1):
        ends.append(writing.extend(tokens[:count]))
        shown += writing.take(is_last=False)
        assert "€" not in shown
    assert (writing.written, writing.stop, shown) == ("ab", "€c", "ab")
    assert ends[:5] == [None] * 5 and set(ends[5:]) == {6}
