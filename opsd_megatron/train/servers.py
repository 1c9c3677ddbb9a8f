"""The inference servers that a run is told to use, as one pool."""

import os

from opsd_megatron.config import RolloutConfig, RunConfig
from opsd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from opsd_megatron.errors import ConfigError
from opsd_megatron.rollout.backend import RolloutBackend
from opsd_megatron.rollout.connect import BACKENDS, find_kind
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.servers import ServerPool

RETRY_S = 1.0
"""A failed call is repeated at the same server for so long; then it is the pool's turn."""


def connect(config: RunConfig, tokenizer: Tokenizer) -> ServerPool:
    """The configured servers, once they are healthy and known to serve the same vocabulary.

    ConfigError without a token in the environment; ServerError where none answers within `rollout.retry_s`.
    """
    rollout = config.rollout
    token = os.environ.get(rollout.token_variable)
    if not token:
        raise ConfigError(
            f"environment variable {rollout.token_variable} is empty; set it to the bearer token of the inference "
            f"server at {rollout.url} (rollout.token_variable names another variable)"
        )
    admin_token = os.environ.get(rollout.admin_token_variable) if rollout.admin_token_variable else None
    if rollout.admin_token_variable and not admin_token:
        raise ConfigError(
            f"environment variable {rollout.admin_token_variable} (rollout.admin_token_variable) is empty"
        )
    kind = find_kind(rollout.urls, token, rollout.server, rollout.retry_s)
    options = pool_options(rollout)
    prompt_tokens = max(config.data.student_tokens, config.data.teacher_tokens)
    longest_s = options.timeout_s(prompt_tokens, rollout.max_response_tokens)
    backends = {
        url: BACKENDS[kind](url, token, admin_token=admin_token, timeout_s=longest_s, retry_s=RETRY_S)
        for url in rollout.urls
    }

    def check_vocabulary(backend: RolloutBackend) -> None:
        if isinstance(backend, EmbeddedBackend):
            found = backend.tokenizer_info()["fingerprint"]
            check_same_vocabulary(tokenizer.fingerprint, found, f"the server at {backend.url}")

    pool = ServerPool(backends, options, inspect=check_vocabulary)
    pool.wait_until_healthy(rollout.retry_s)
    return pool


def pool_options(rollout: RolloutConfig) -> PoolOptions:
    return PoolOptions(
        request_s=rollout.request_timeout_s,
        prefill_tokens_per_s=rollout.prefill_tokens_per_s,
        decode_tokens_per_s=rollout.decode_tokens_per_s,
        retry_s=rollout.retry_s,
        max_outstanding_tokens=rollout.max_outstanding_tokens,
        on_abort=rollout.on_abort,
    )
