"""Server replies checked into dataclasses: what is not exactly as promised is a MalformedReply, never repaired."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, MalformedReply, Sample, ServerInfo
from opsd_megatron.types import VersionSpan

LOGPROB_SLACK = 1e-4
"""A log-probability above 0 by less is rounding."""
LogprobKind = Literal["raw", "processed"]


def parse_generate(
    body: Any, request: GenerateRequest, vocab_size: int, kind: LogprobKind, server_id: str
) -> GenerateResult:
    """The samples of `request` from the reply of /inference/v1/generate; `vocab_size` 0 is not known.

    `kind` and `server_id` hold where the reply itself does not say.
    """
    where = f"reply to {request.request_id}"
    name = str(get(body, "request_id", str, where)).removeprefix("generate-tokens-")
    require(name == request.request_id, f"{where} names request {name}")
    samples = []
    for number, choice in enumerate(_choices(body, request, where)):
        here = f"{where}, sample {number}"
        content = get(get(choice, "logprobs", dict, here), "content", list, here)
        pairs = [(get(item, "token_id", int, here), item.get("logprob")) for item in content]
        spans = parse_spans(get(choice, "weight_versions", list, here), here)
        stated = choice.get("logprob_kind", kind)
        require(stated in ("raw", "processed"), f"{here}: logprob_kind is {stated!r}")
        samples.append(checked_sample(choice, request, pairs, spans, stated, vocab_size, here))
    return _result(body, request, samples, str(body.get("server_id", server_id)), where)


def parse_completions(
    body: Any, request: GenerateRequest, kind: LogprobKind, server_id: str, version: str | None
) -> GenerateResult:
    """The samples of `request` from the reply of vLLM's /v1/completions; `version` sampled all where it has no spans.

    Token ids come from `token_ids` alone: pieces of text may be empty or invalid.
    """
    where = f"reply to {request.request_id}"
    samples = []
    for number, choice in enumerate(_choices(body, request, where)):
        here = f"{where}, sample {number}"
        token_ids = get(choice, "token_ids", list, here)
        logprobs = get(get(choice, "logprobs", dict, here), "token_logprobs", list, here)
        require(len(logprobs) == len(token_ids), f"{here}: {len(token_ids)} tokens but {len(logprobs)} log-probs")
        prompt = choice.get("prompt_token_ids")
        require(prompt is None or prompt == list(request.token_ids), f"{here} continues another prompt")
        entries = choice.get("weight_versions")
        if entries is not None or version is None:
            spans = parse_spans(get(choice, "weight_versions", list, here), here)
        else:
            spans = one_span(version, len(token_ids))
        pairs = list(zip(token_ids, logprobs, strict=True))
        samples.append(checked_sample(choice, request, pairs, spans, kind, 0, here))
    return _result(body, request, samples, server_id, where)


def parse_prompt_logprobs(entries: Any, sequence: Sequence[int], where: str) -> list[float]:
    """Log-probs of all tokens of `sequence` but the first, from vLLM's `prompt_logprobs`."""
    require(isinstance(entries, list) and len(entries) == len(sequence), f"{where}: not one entry per prompt token")
    result = []
    for position, (token, entry) in enumerate(zip(sequence[1:], entries[1:], strict=True), 1):
        here = f"{where}, token {position}"
        result.append(checked_logprob(get(get(entry, str(token), dict, here), "logprob", (int, float), here), here))
    return result


def parse_info(body: Any) -> ServerInfo:
    """From /server_info of the embedded server."""
    where = "reply of /server_info"
    return ServerInfo(
        server_id=get(body, "server_id", str, where),
        engine=get(body, "engine", str, where),
        seeded=get(body, "seeded", bool, where),
        dtype=get(body, "dtype", str, where),
        vocab_size=get(body, "vocab_size", int, where),
        max_model_len=get(body, "max_model_len", int, where),
        weight_version=get(body, "weight_version", str, where),
    )


def checked_sample(
    choice: dict,
    request: GenerateRequest,
    pairs: Sequence[tuple[int, Any]],
    spans: tuple[VersionSpan, ...],
    kind: LogprobKind,
    vocab_size: int,
    where: str,
) -> Sample:
    """`choice` with its `token_ids`, `finish_reason` and `stop_reason`; `pairs` are its (token id, log-prob)."""
    token_ids = get(choice, "token_ids", list, where)
    finish = get(choice, "finish_reason", str, where)
    require(finish in ("stop", "length", "abort"), f"{where}: finish_reason is {finish!r}")
    require(len(pairs) == len(token_ids), f"{where}: {len(token_ids)} tokens but {len(pairs)} log-probs")
    require(len(token_ids) <= request.max_tokens, f"{where}: {len(token_ids)} tokens, at most {request.max_tokens}")
    require(bool(token_ids) or finish == "abort", f"{where} is empty with finish_reason {finish!r}")
    require(finish != "length" or len(token_ids) == request.max_tokens, f"{where}: cut off before max_tokens")
    logprobs = []
    for position, (token, (named, logprob)) in enumerate(zip(token_ids, pairs, strict=True)):
        here = f"{where}, token {position}"
        is_id = type(token) is int and token >= 0 and (not vocab_size or token < vocab_size)
        require(is_id, f"{here}: id {token!r} is not in [0, {vocab_size or 'vocabulary'})")
        require(named == token, f"{here}: the log-prob is of token {named}")
        logprobs.append(checked_logprob(logprob, here))
    reached = spans[-1].end if spans else 0
    require(reached == len(token_ids), f"{where}: weight-version spans cover {reached} of {len(token_ids)} tokens")
    reason = choice.get("stop_reason")
    ended_by = reason if type(reason) is int else token_ids[-1] if finish == "stop" else None
    return Sample(tuple(token_ids), tuple(logprobs), finish, ended_by, spans, kind)


def parse_spans(entries: list, where: str) -> tuple[VersionSpan, ...]:
    spans, reached = [], 0
    for entry in entries:
        span = VersionSpan(
            get(entry, "version", str, where), get(entry, "start", int, where), get(entry, "end", int, where)
        )
        require(span.start == reached < span.end, f"{where}: weight-version spans are not contiguous at {reached}")
        spans.append(span)
        reached = span.end
    return tuple(spans)


def one_span(version: str, length: int) -> tuple[VersionSpan, ...]:
    """`length` tokens of one version."""
    return (VersionSpan(version, 0, length),) if length else ()


def checked_logprob(value: Any, where: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number and math.isfinite(value) and value <= LOGPROB_SLACK, f"{where}: log-prob {value!r}")
    return float(value)


def get(body: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = body.get(name) if isinstance(body, dict) else None
    is_number_from_bool = isinstance(value, bool) and kind is not bool
    require(isinstance(value, kind) and not is_number_from_bool, f"{where}: {name} is {str(value)[:80]!r}")
    return value


def require(condition: bool, message: str) -> None:
    if not condition:
        raise MalformedReply(f"{message}; is this a server, of a version, that docs/rollouts.md lists?")


def _choices(body: Any, request: GenerateRequest, where: str) -> list:
    choices = get(body, "choices", list, where)
    require(len(choices) == request.n, f"{where} has {len(choices)} samples, {request.n} were asked for")
    for number, choice in enumerate(choices):
        require(get(choice, "index", int, where) == number, f"{where}: sample {number} is out of order")
    return choices


def _result(body: dict, request: GenerateRequest, samples: list[Sample], server_id: str, where: str) -> GenerateResult:
    usage = get(body, "usage", dict, where)
    prompt_tokens = get(usage, "prompt_tokens", int, where)
    require(
        prompt_tokens == len(request.token_ids),
        f"{where} counts {prompt_tokens} prompt tokens, {len(request.token_ids)} were sent",
    )
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return GenerateResult(request.request_id, tuple(samples), prompt_tokens, server_id, cached)
