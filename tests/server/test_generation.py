import torch

from opsd_megatron.rollout.backend import GenerateRequest
from tests.server.serving import full_forward_logits, http, largest_gap, prompts, requests
from tests.tiny_models import VOCAB


def test_logprobs_equal_a_full_forward_pass(server, old_model):
    asked = requests(12)
    with server.backend() as backend:
        results = backend.generate(asked)
    gaps = [largest_gap(old_model, a, r.samples[0]) for a, r in zip(asked, results, strict=True)]
    assert max(gaps) <= 1e-5


def test_many_concurrent_requests_are_each_answered_with_their_own_continuation(fast, old_model):
    asked = requests(64, seed=5, max_tokens=3)
    with fast.backend() as backend:
        results = backend.generate(asked)
    assert [result.request_id for result in results] == [request.request_id for request in asked]
    assert max(largest_gap(old_model, a, r.samples[0]) for a, r in zip(asked, results, strict=True)) <= 1e-5


def test_temperature_zero_takes_the_likeliest_token(server, old_model):
    asked = requests(6, temperature=0.0)
    with server.backend() as backend:
        for request, result in zip(asked, backend.generate(asked), strict=True):
            tokens = result.samples[0].token_ids
            logits = full_forward_logits(old_model, request.token_ids, tokens)
            assert tuple(logits.argmax(dim=-1).tolist()) == tokens
            assert set(result.samples[0].logprobs) == {0.0}


def test_samples_of_one_prompt_differ_and_are_each_scored_exactly(server, old_model):
    request = GenerateRequest("many", prompts(1, 40, 40)[0], n=6, max_tokens=5, seed=1, ignore_eos=True)
    with server.backend() as backend:
        (result,) = backend.generate([request])
    assert len({sample.token_ids for sample in result.samples}) == 6
    assert max(largest_gap(old_model, request, sample) for sample in result.samples) <= 1e-5


def test_a_prompt_of_one_token_can_have_several_samples(server, old_model):
    request = GenerateRequest("short", [9], n=3, max_tokens=4, ignore_eos=True)
    with server.backend() as backend:
        (result,) = backend.generate([request])
    assert max(largest_gap(old_model, request, sample) for sample in result.samples) <= 1e-5


def test_first_tokens_are_drawn_from_the_models_distribution(server, old_model):
    prompt, count = prompts(1, 8, 8, seed=3)[0], 200
    request = [GenerateRequest(f"d{i}", prompt, n=count, max_tokens=1, seed=1000 * i) for i in range(5)]
    with server.backend() as backend:
        drawn = [s.token_ids[0] for result in backend.generate(request) for s in result.samples]
    wanted = full_forward_logits(old_model, prompt, [0]).softmax(dim=-1)[0]
    seen = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / len(drawn)
    expected_distance = float((2 * wanted * (1 - wanted) / (torch.pi * len(drawn))).sqrt().sum())
    assert float((seen - wanted).abs().sum()) < 1.25 * expected_distance  # total variation of a fair sample, + 25 %


def test_restricted_sampling_returns_the_restricted_logprob(server, old_model):
    asked = requests(4, temperature=0.7, top_k=5, top_p=0.8)
    with server.backend() as backend:
        results = backend.generate(asked)
    for request, result in zip(asked, results, strict=True):
        sample = result.samples[0]
        for token, logprob, logits in zip(
            sample.token_ids,
            sample.logprobs,
            full_forward_logits(old_model, request.token_ids, sample.token_ids),
            strict=True,
        ):
            ordered, order = (logits / 0.7).sort(descending=True)
            top = ordered[:5].softmax(dim=0)
            kept = int(((top.cumsum(0) - top) < 0.8).sum())
            support = order[:kept].tolist()
            assert token in support
            wanted = ordered[:kept].log_softmax(dim=0)[support.index(token)]
            assert abs(float(wanted) - logprob) <= 1e-5


def test_a_stop_token_ends_the_response_and_stays_in_it(server, old_model):
    request = requests(1, temperature=0.0, max_tokens=6)[0]
    with server.backend() as backend:
        free = backend.generate([request])[0].samples[0]
        stop = free.token_ids[2]
        stopped = GenerateRequest("stop", request.token_ids, max_tokens=6, temperature=0.0, stop_token_ids=[stop, 3])
        sample = backend.generate([stopped])[0].samples[0]
    first = free.token_ids.index(stop)
    assert sample.token_ids == free.token_ids[: first + 1]
    assert (sample.finish_reason, sample.stop_token) == ("stop", stop)
    assert (free.finish_reason, free.stop_token) == ("length", None)


def test_the_exact_engine_repeats_itself_bit_for_bit_whatever_else_runs(exact):
    asked = requests(8, max_tokens=12)
    with exact.backend() as backend:
        together = backend.generate(asked)
        alone = [backend.generate([request])[0] for request in reversed(asked)][::-1]
        one = backend.generate(
            [GenerateRequest("n3", asked[0].token_ids, n=3, max_tokens=12, seed=100, ignore_eos=True)]
        )
    assert [r.samples for r in together] == [r.samples for r in alone]
    assert one[0].samples[0] == together[0].samples[0]
    assert one[0].samples[1] != one[0].samples[0]


def test_what_cannot_be_honoured_is_refused_by_name(exact):
    prompt = {"token_ids": [1, 2, 3]}
    cases = [
        ({**prompt, "sampling_params": {"min_p": 0.1}}, "min_p"),
        ({**prompt, "sampling_params": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({**prompt, "sampling_params": {"logprobs": 5}}, "logprobs"),
        ({**prompt, "sampling_params": {"temprature": 1}}, "temprature"),
        ({**prompt, "sampling_params": {"temperature": 0, "n": 2}}, "n must be 1"),
        ({**prompt, "sampling_params": {"stop": ["."]}}, "stop_token_ids"),
        ({**prompt, "sampling_params": {"prompt_logprobs": 0}, "stream": True}, "stream"),
        ({**prompt, "sampling_params": {"temperature": 1e-6}}, "temperature must be 0"),
        ({"token_ids": [VOCAB], "sampling_params": {}}, f"Token id {VOCAB} is out of vocabulary"),
        ({"token_ids": [], "sampling_params": {}}, "token_ids"),
        ({"token_ids": [1] * 1020, "sampling_params": {"max_tokens": 5}}, "maximum model length"),
    ]
    with http(exact) as client:
        for body, word in cases:
            response = client.post("/inference/v1/generate", json=body)
            assert response.status_code == 400 and word in response.json()["error"]["message"], body


def test_neutral_values_of_unsupported_parameters_pass(exact):
    params = {"min_p": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "stop": None, "detokenize": False}
    with http(exact) as client:
        response = client.post("/inference/v1/generate", json={"token_ids": [1], "sampling_params": params})
    assert response.status_code == 200
