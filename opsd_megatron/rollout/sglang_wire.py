"""Requests and replies of SGLang's /generate: every sampling parameter out, checked dataclasses back."""

from collections.abc import Sequence
from typing import Any

from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, Sample, ServerUnreachable
from opsd_megatron.rollout.http import Refused
from opsd_megatron.rollout.replies import (
    LogprobKind,
    checked_logprob,
    checked_sample,
    get,
    one_span,
    parse_spans,
    require,
)


def as_wire(request: GenerateRequest, attempt: int = 0) -> dict:
    """Body for /generate. Several samples are a batch of equal prompts: SGLang's own `n` gives all of them one seed
    and ids that no client knows, so that none could be aborted. An id that may still be in use, as after a dropped
    connection, is refused: so each attempt has its own."""
    common = {
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "return_text_in_logprobs": False,
        "stream": False,
    }
    prompt = list(request.token_ids)
    if request.n == 1:
        rid = rid_of(request.request_id, attempt, 0)
        return common | {"rid": rid, "input_ids": prompt, "sampling_params": _sampling(request, 0)}
    return common | {
        "rid": [rid_of(request.request_id, attempt, number) for number in range(request.n)],
        "input_ids": [prompt] * request.n,
        "sampling_params": [_sampling(request, number) for number in range(request.n)],
    }


def rid_of(request_id: str, attempt: int, sample: int) -> str:
    """SGLang's id of a sample."""
    return f"{request_id}/{attempt}.{sample}"


def as_score(sequence: Sequence[int]) -> dict:
    """Body for /generate that asks for the log-probs of a prompt."""
    request = GenerateRequest("", sequence, max_tokens=1, ignore_eos=True)
    body = as_wire(request) | {"logprob_start_len": 0}
    return {name: value for name, value in body.items() if name != "rid"}


def parse_replies(body: Any, request: GenerateRequest, kind: LogprobKind, server_id: str) -> GenerateResult:
    """The samples of `request`; ServerUnreachable where the server was too busy, which it may say with status 200."""
    where = f"reply to {request.request_id}"
    replies = [body] if request.n == 1 else body
    require(isinstance(replies, list), f"{where} is a {type(body).__name__}, a list was expected")
    require(len(replies) == request.n, f"{where} has {len(replies)} samples, {request.n} were asked for")
    samples, cached = [], []
    for number, reply in enumerate(replies):
        here = f"{where}, sample {number}"
        meta = get(reply, "meta_info", dict, here)
        name, _, rest = str(meta.get("id")).rpartition("/")
        is_ours = name == request.request_id and rest.rpartition(".")[2] == str(number)
        require(is_ours, f"{here} is of request {meta.get('id')}")
        samples.append(_sample(reply, meta, request, kind, here))
        count = meta.get("prompt_tokens", len(request.token_ids))  # what never ran has none
        require(
            count == len(request.token_ids), f"{here} counts {count} prompt tokens, {len(request.token_ids)} were sent"
        )
        cached.append(meta.get("cached_tokens"))
    known = [count for count in cached if isinstance(count, int)]
    return GenerateResult(
        request.request_id, tuple(samples), len(request.token_ids), server_id, max(known) if known else None
    )


def parse_input_logprobs(body: Any, sequence: Sequence[int]) -> list[float]:
    """Log-probs of all tokens of `sequence` but the first."""
    where = "reply to a score"
    entries = get(get(body, "meta_info", dict, where), "input_token_logprobs", list, where)
    require(len(entries) == len(sequence), f"{where}: {len(entries)} log-probs for {len(sequence)} tokens")
    pairs = [_entry(entry, where) for entry in entries]
    for (_, token), wanted in zip(pairs, sequence, strict=True):
        require(token == wanted, f"{where}: the log-prob is of token {token}, not of {wanted}")
    return [checked_logprob(logprob, where) for logprob, _ in pairs[1:]]


def _sampling(request: GenerateRequest, number: int) -> dict:
    return {
        "n": 1,
        "max_new_tokens": request.max_tokens,
        "min_new_tokens": 0,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k if request.top_k > 0 else -1,
        "min_p": request.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "sampling_seed": None if request.seed is None else request.seed + number,
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }


def _sample(reply: dict, meta: dict, request: GenerateRequest, kind: LogprobKind, where: str) -> Sample:
    reason = get(meta, "finish_reason", dict, where)
    finish = get(reason, "type", str, where)
    status = reason.get("status_code")
    if finish == "abort" and isinstance(status, int) and status >= 400:
        text = f"{where}: status {status}: {reason.get('message')}"
        raise ServerUnreachable(text) if status >= 500 else Refused(text, status, "")
    token_ids = get(reply, "output_ids", list, where)
    entries = get(meta, "output_token_logprobs", list, where) if token_ids else []
    pairs = [(token, logprob) for logprob, token in (_entry(entry, where) for entry in entries)]
    listed = meta.get("weight_versions") or []
    version = meta.get("weight_version")
    spans = parse_spans(listed, where) if listed or version is None else one_span(str(version), len(token_ids))
    choice = {"token_ids": token_ids, "finish_reason": finish, "stop_reason": reason.get("matched")}
    return checked_sample(choice, request, pairs, spans, kind, 0, where)


def _entry(entry: Any, where: str) -> tuple[Any, int]:
    """(log-prob, token id) from [log-prob, token id, text]."""
    require(isinstance(entry, list) and len(entry) >= 2, f"{where}: {str(entry)[:80]} is no log-prob entry")
    return entry[0], entry[1]
