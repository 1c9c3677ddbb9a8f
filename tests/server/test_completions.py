"""Log-probs of prompts and responses, stop strings, chat and tokenizing."""

import concurrent.futures

import pytest
import torch

from opsd_megatron.server import scoring
from opsd_megatron.server.scoring import score_tokens
from tests.server.serving import NEW, OLD, full_forward_logits, http, prompts

TOLERANCE = 1e-5


def ask(server, path: str, status: int = 200, **body) -> dict:
    with http(server) as client:
        response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def wanted_logprobs(model, token_ids: list[int]) -> torch.Tensor:
    """[tokens - 1, vocab] of every token but the first."""
    return full_forward_logits(model, token_ids[:1], token_ids[1:]).log_softmax(dim=-1)


def test_echo_scores_prompt_and_response_like_a_full_forward_pass(server, old_model):
    prompt = prompts(1, 60, 60)[0]
    body = {"prompt": prompt, "echo": True, "logprobs": 3, "max_tokens": 4, "temperature": 0.7, "n": 2}
    for choice in ask(server, "/v1/completions", **body, return_token_ids=True, ignore_eos=True)["choices"]:
        tokens = [*prompt, *choice["token_ids"]]
        logprobs = wanted_logprobs(old_model, tokens)
        given = choice["logprobs"]
        assert [len(column) for column in given.values()] == [64] * 4
        assert given["token_logprobs"][0] is None and given["top_logprobs"][0] is None
        ours = torch.tensor(given["token_logprobs"][1:], dtype=torch.float64)
        chosen = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert float((ours - chosen).abs().max()) <= TOLERANCE
        best = logprobs.topk(3).values
        for position, top in enumerate(given["top_logprobs"][1:]):
            wanted = {round(float(value), 3) for value in (*best[position], chosen[position])}
            assert {round(value, 3) for value in top.values()} <= wanted and 2 <= len(top) <= 4
        assert given["text_offset"] == [len("".join(given["tokens"][:count])) for count in range(64)]


def test_max_tokens_0_scores_the_prompt_alone_and_nothing_is_sampled(server, old_model):
    prompt = prompts(1, 30, 30, seed=2)[0]
    reply = ask(server, "/v1/completions", prompt=[prompt, [7]], echo=True, logprobs=0, max_tokens=0)
    given, single = (choice["logprobs"] for choice in reply["choices"])
    chosen = wanted_logprobs(old_model, prompt).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert float((torch.tensor(given["token_logprobs"][1:], dtype=torch.float64) - chosen).abs().max()) <= TOLERANCE
    assert single["token_logprobs"] == [None]
    counts = {"prompt_tokens": 31, "completion_tokens": 0, "total_tokens": 31}
    assert reply["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    nothing = ask(server, "/v1/completions", 400, prompt=prompt, max_tokens=0)
    assert "echo=true" in nothing["error"]["message"]


def test_prompt_logprobs_follow_the_weights_that_are_served(server, old_model, new_model):
    prompt = prompts(1, 40, 40, seed=4)[0]
    params = {"max_tokens": 1, "prompt_logprobs": 0}
    for model, name in ((old_model, OLD), (new_model, NEW)):
        with server.backend() as backend:
            if name == NEW:
                backend.update_from_disk(NEW, NEW)
        entries = ask(server, "/inference/v1/generate", token_ids=prompt, sampling_params=params)["prompt_logprobs"]
        logprobs = wanted_logprobs(model, prompt)
        assert entries[0] is None and len(entries) == 40
        for token, entry, row in zip(prompt[1:], entries[1:], logprobs, strict=True):
            assert list(entry) == [str(token)]
            assert abs(entry[str(token)]["logprob"] - float(row[token])) <= TOLERANCE
            assert entry[str(token)]["rank"] == 1 + int((row > row[token]).sum())


def test_scores_and_generation_run_side_by_side_through_a_weight_swap(server, old_model, new_model):
    """Every score comes wholly from one version, whatever is generated, scored or swapped meanwhile."""
    prompt = prompts(1, 50, 50, seed=5)[0]
    index = torch.tensor(prompt[1:])[:, None]
    sums = [float(wanted_logprobs(model, prompt).gather(1, index).sum()) for model in (old_model, new_model)]
    score = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    write = {"prompt": prompt, "max_tokens": 20, "ignore_eos": True}
    with server.backend() as backend, concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, server, "/v1/completions", **(write if n % 3 == 0 else score)) for n in range(24)]
        backend.update_from_disk(NEW, NEW)
        replies = [future.result()["choices"][0] for future in running]
    scores = [sum(reply["logprobs"]["token_logprobs"][1:]) for reply in replies if reply["logprobs"]]
    assert len(scores) == 16
    assert all(min(abs(value - wanted) for wanted in sums) < 1e-3 for value in scores)
    assert abs(sums[0] - sums[1]) > 1


def test_scoring_in_chunks_of_any_size_is_the_same(old_model, monkeypatch):
    tokens = prompts(1, 70, 70, seed=6)[0]
    logprobs = wanted_logprobs(old_model, tokens)
    for rows in (1, 17, 69, 70, 500):
        monkeypatch.setattr(scoring, "LOGITS_BYTES", rows * 4 * logprobs.shape[1])
        scores = score_tokens(old_model, tokens, 2)
        for token, score, row in zip(tokens[1:], scores, logprobs, strict=True):
            assert abs(score.logprob - float(row[token])) <= TOLERANCE
            assert [token for token, _ in score.top] == row.topk(2).indices.tolist()


def test_a_stop_string_ends_the_text_before_it_and_stops_the_engine(server):
    body = {"prompt": "the red key of", "temperature": 0, "ignore_eos": True}
    free = ask(server, "/v1/completions", **body, max_tokens=40)["choices"][0]
    text = free["text"]
    assert len(text) > 20
    stop = text[12:15]
    stopped = ask(server, "/v1/completions", **body, max_tokens=900, stop=["never seen", stop], return_token_ids=True)
    choice = stopped["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert len(choice["token_ids"]) == stopped["usage"]["completion_tokens"] <= 16


def test_chat_speaks_the_models_template(server):
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    written = "[system] be short\n[user] hi\n[assistant]! "
    greedy = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    options = {"chat_template_kwargs": {"shout": True}}
    answer = ask(server, "/v1/chat/completions", messages=messages, **greedy, **options, return_token_ids=True)
    plain = ask(server, "/v1/completions", prompt=written, **greedy)
    tokens = ask(server, "/tokenize", messages=messages, **options)["tokens"]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    assert answer["prompt_token_ids"] == tokens == ask(server, "/tokenize", prompt=written)["tokens"]
    assert ask(server, "/detokenize", tokens=tokens) == {"prompt": written}
    bad = ask(server, "/v1/chat/completions", 400, messages=[{"role": "robot", "content": "hi"}])
    assert "unknown role" in bad["error"]["message"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "refusal": None}
    bad = ask(server, "/v1/chat/completions", 400, messages=[called])
    assert "tool_calls is not known" in bad["error"]["message"]
    bad = ask(server, "/v1/chat/completions", 400, messages=messages, chat_template_kwargs={"tokenize": True})
    assert "cannot set tokenize" in bad["error"]["message"]


def test_chat_logprobs_are_the_models_own(server, old_model):
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, "temperature": 0}
    reply = ask(server, "/v1/chat/completions", **body, max_tokens=5, ignore_eos=True, return_token_ids=True)
    choice = reply["choices"][0]
    logprobs = full_forward_logits(old_model, reply["prompt_token_ids"], choice["token_ids"]).log_softmax(dim=-1)
    for token, entry, row in zip(choice["token_ids"], choice["logprobs"]["content"], logprobs, strict=True):
        assert abs(entry["logprob"] - float(row[token])) <= TOLERANCE
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(float(row.max()), abs=TOLERANCE)
