"""Server replies checked into dataclasses: what is not exactly as promised is a MalformedReply, never repaired."""

import math
from typing import Any

from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, MalformedReply, Sample, ServerInfo
from opsd_megatron.types import VersionSpan

LOGPROB_SLACK = 1e-4
"""A log-probability above 0 by less is rounding."""


def parse_generate(body: Any, request: GenerateRequest, vocab_size: int) -> GenerateResult:
    """The samples of `request` from the reply of /inference/v1/generate."""
    where = f"reply to {request.request_id}"
    name = str(_get(body, "request_id", str, where)).removeprefix("generate-tokens-")
    _require(name == request.request_id, f"{where} names request {name}")
    choices = _get(body, "choices", list, where)
    _require(len(choices) == request.n, f"{where} has {len(choices)} samples, {request.n} were asked for")
    samples = []
    for number, choice in enumerate(choices):
        _require(_get(choice, "index", int, where) == number, f"{where}: sample {number} is out of order")
        samples.append(_sample(choice, request, vocab_size, f"{where}, sample {number}"))
    usage = _get(body, "usage", dict, where)
    prompt_tokens = _get(usage, "prompt_tokens", int, where)
    _require(
        prompt_tokens == len(request.token_ids),
        f"{where} counts {prompt_tokens} prompt tokens, {len(request.token_ids)} were sent",
    )
    details = usage.get("prompt_tokens_details") or {}
    cached = _get(details, "cached_tokens", int, where) if "cached_tokens" in details else None
    return GenerateResult(request.request_id, tuple(samples), prompt_tokens, str(body.get("server_id", "")), cached)


def parse_info(body: Any) -> ServerInfo:
    where = "reply of /server_info"
    return ServerInfo(
        server_id=_get(body, "server_id", str, where),
        engine=_get(body, "engine", str, where),
        seeded=_get(body, "seeded", bool, where),
        dtype=_get(body, "dtype", str, where),
        vocab_size=_get(body, "vocab_size", int, where),
        max_model_len=_get(body, "max_model_len", int, where),
        weight_version=_get(body, "weight_version", str, where),
    )


def _sample(choice: Any, request: GenerateRequest, vocab_size: int, where: str) -> Sample:
    token_ids = _get(choice, "token_ids", list, where)
    content = _get(_get(choice, "logprobs", dict, where), "content", list, where)
    finish = _get(choice, "finish_reason", str, where)
    _require(finish in ("stop", "length", "abort"), f"{where}: finish_reason is {finish!r}")
    _require(len(content) == len(token_ids), f"{where}: {len(token_ids)} tokens but {len(content)} log-probs")
    _require(len(token_ids) <= request.max_tokens, f"{where}: {len(token_ids)} tokens, at most {request.max_tokens}")
    _require(bool(token_ids) or finish == "abort", f"{where} is empty with finish_reason {finish!r}")
    _require(finish != "length" or len(token_ids) == request.max_tokens, f"{where}: cut off before max_tokens")
    logprobs = []
    for position, (token, entry) in enumerate(zip(token_ids, content, strict=True)):
        here = f"{where}, token {position}"
        _require(type(token) is int and 0 <= token < vocab_size, f"{here}: id {token!r} is not below {vocab_size}")
        _require(_get(entry, "token_id", int, here) == token, f"{here}: the log-prob is of token {entry['token_id']}")
        logprob = _get(entry, "logprob", (int, float), here)
        _require(math.isfinite(logprob) and logprob <= LOGPROB_SLACK, f"{here}: log-prob {logprob}")
        logprobs.append(float(logprob))
    return Sample(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=finish,
        stop_token=choice.get("stop_reason"),
        version_spans=_spans(_get(choice, "weight_versions", list, where), len(token_ids), where),
        logprob_kind=_kind(choice.get("logprob_kind", "processed"), where),
    )


def _spans(entries: list, length: int, where: str) -> tuple[VersionSpan, ...]:
    spans, reached = [], 0
    for entry in entries:
        span = VersionSpan(
            _get(entry, "version", str, where), _get(entry, "start", int, where), _get(entry, "end", int, where)
        )
        _require(span.start == reached < span.end, f"{where}: weight-version spans are not contiguous at {reached}")
        spans.append(span)
        reached = span.end
    _require(reached == length, f"{where}: weight-version spans cover {reached} of {length} tokens")
    return tuple(spans)


def _kind(kind: Any, where: str) -> Any:
    _require(kind in ("raw", "processed"), f"{where}: logprob_kind is {kind!r}")
    return kind


def _get(body: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = body.get(name) if isinstance(body, dict) else None
    is_number_from_bool = isinstance(value, bool) and kind is not bool
    _require(isinstance(value, kind) and not is_number_from_bool, f"{where}: {name} is {str(value)[:80]!r}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MalformedReply(f"{message}; is this an opsd_megatron server of the same version?")
