"""Clients that others wrote, unchanged, against the running server."""

from pathlib import Path

import pytest
import torch

from tests.server.serving import TOKEN, full_forward_logits

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as ready:
        yield ready


def test_the_openai_client_completes_scores_chats_and_streams(client):
    model = client.models.list().data[0].id
    asked = {"model": model, "prompt": "the red key", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    text, logprobs = whole.choices[0].text, whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == text and whole.usage.completion_tokens == len(logprobs.tokens)
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    echoed = client.completions.create(**asked, echo=True).choices[0]
    assert echoed.text == "the red key" + text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == text
    cut = client.completions.create(**asked, stop=[text[4:6]]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(text[4:6])], "stop")

    talk = {"model": model, "messages": [{"role": "user", "content": "the red key"}], "max_tokens": 12}
    answer = client.chat.completions.create(**talk, temperature=0, logprobs=True, top_logprobs=1).choices[0]
    content = answer.logprobs.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    assert len(client.chat.completions.create(**talk, n=3, seed=1).choices) == 3
    chunks = list(
        client.chat.completions.create(**talk, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == answer.message.content
    assert chunks[-1].usage.completion_tokens == len(content) and chunks[-2].choices[0].finish_reason


def test_the_openai_client_raises_its_own_errors(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="longer than the maximum model length"):
        client.completions.create(model="any", prompt="x", max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_lm_evaluation_harness_scores_and_generates_like_transformers(fast, old_model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    model = LocalCompletionsAPI(
        model="old", base_url=f"{fast.url}/v1/completions", auth_token=TOKEN, max_length=1000, num_concurrent=4
    )
    manager = TaskManager(include_path=str(ROOT / "tests/fixtures/lm_eval"), include_defaults=False)
    result = simple_evaluate(
        model, tasks=["keys_choice", "keys_write"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    tokenizer = model.tokenizer
    for sample in result["samples"]["keys_choice"]:
        for choice, ((loglikelihood, is_greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            prompt = tokenizer.encode(sample["doc"]["question"])
            response = tokenizer.encode(sample["doc"]["question"] + choice)[len(prompt) :]
            rows = full_forward_logits(old_model, prompt, response).log_softmax(dim=-1)
            wanted = rows.gather(1, torch.tensor(response)[:, None]).sum()
            assert abs(loglikelihood - float(wanted)) <= 1e-4
            assert is_greedy == (rows.argmax(dim=-1).tolist() == response)
    for sample in result["samples"]["keys_write"]:
        wanted = greedy_text(old_model, tokenizer, sample["doc"]["question"], 24)
        ends = [wanted.find(stop) for stop in ("e", "the", "<eos>") if stop in wanted]
        assert sample["resps"][0][0] == wanted[: min(ends, default=None)]


def greedy_text(model, tokenizer, prompt: str, count: int) -> str:
    prompt_ids = tokenizer.encode(prompt)
    tokens: list[int] = []
    while len(tokens) < count and (not tokens or tokens[-1] != 1):
        tokens.append(int(full_forward_logits(model, [*prompt_ids, *tokens], [0]).argmax()))
    return tokenizer.decode(tokens)
