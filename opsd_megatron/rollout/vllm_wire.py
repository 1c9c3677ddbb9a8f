"""Request bodies of vLLM, with every sampling parameter, so that no default of the server leaks in."""

from collections.abc import Sequence
from typing import Any

from opsd_megatron.rollout.backend import GenerateRequest


def as_wire(request: GenerateRequest) -> dict:
    """Body for /inference/v1/generate."""
    sampling = _sampling(request) | {"detokenize": False}
    return {"request_id": request.request_id, "token_ids": list(request.token_ids), "sampling_params": sampling}


def as_completion(request: GenerateRequest, model: str, with_spans: bool) -> dict:
    """Body for /v1/completions."""
    more = {"return_weight_versions": True} if with_spans else {}
    return _sampling(request) | {
        "request_id": request.request_id,
        "model": model,
        "prompt": list(request.token_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "echo": False,
        "stream": False,
        **more,
    }


def as_score(sequence: Sequence[int]) -> dict:
    """Body for /inference/v1/generate that asks for the log-probs of a prompt."""
    request = GenerateRequest("", sequence, max_tokens=1, ignore_eos=True)
    sampling = _sampling(request) | {"logprobs": None, "prompt_logprobs": 0}
    return {"token_ids": list(sequence), "sampling_params": sampling}


def _sampling(request: GenerateRequest) -> dict[str, Any]:
    return {
        "n": request.n,
        "max_tokens": request.max_tokens,
        "min_tokens": 0,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": request.seed,
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": False,
        "logprobs": 0,
    }
