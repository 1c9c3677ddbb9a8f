"""Options of the server's command line; importing them is cheap."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServerOptions:
    """Serve a Hugging Face model over HTTP in a subset of vLLM's dialect, with weights that can be replaced.

    All routes but /health and /version want `Authorization: Bearer TOKEN`.
    """

    model: Path
    """Directory with config.json, safetensors and, for text prompts, a tokenizer."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no TLS: keep it private, or put a proxy in front."""
    port: int = 8199
    """Port to listen on; exit code 2 where it is taken."""
    engine: Literal["fast", "exact"] = "fast"
    """fast: many requests in one batch (transformers' continuous batching). exact: one at a time, honours seeds,
    bitwise repeatable, for tests."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; published tensors must have it too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    token_variable: str = "OPSD_SERVER_TOKEN"
    """Environment variable that holds the bearer token (never on the command line, where others could read it)."""
    admin_token_variable: str | None = None
    """Environment variable that holds another token. Then only that one opens what pauses, aborts, or replaces weights,
    and the first only what generates and informs. Left out, the one token opens all."""
    yarn_factor: float | None = None
    """Serve with YaRN at this factor over the model's original context, as the trainer's --model.yarn-factor."""
    yarn_original_positions: int | None = None
    """Context that YaRN stretches from; left out, max_position_embeddings (Qwen3 says 40960, but means 32768)."""
    max_model_len: int | None = None
    """Longest prompt with response, in tokens; the model's own limit if left out."""
    weights_root: Path | None = None
    """Directory below which POST /update_weights may read; left out, updates from disk are refused."""
    max_bucket_mb: int = 4096
    """Largest body of PUT /weights/..., in MiB; the largest tensor must fit (3.0 GiB for a 32B head in float32)."""
    max_body_mb: int = 32
    """Largest body of any other request, in MiB."""
    weight_version: str = "default"
    """Name of the weights that are loaded at start."""
    cache_tokens: int | None = None
    """fast: tokens in the key-value cache. Left out: what free GPU memory holds; on a CPU 1 GiB worth of them."""
    page_tokens: int = 64
    """fast: tokens per page of the cache."""
    batch_tokens: int | None = None
    """fast: most tokens in one forward pass. Left out: what free GPU memory holds; on a CPU 8192."""
    max_queued_requests: int | None = None
    """Requests that may wait for their turn; more are refused with 503. Left out, any number."""
    max_queued_tokens: int | None = None
    """Prompt tokens of the requests that may wait; once there are as many, more requests are refused with 503."""
    threads: int | None = None
    """CPU threads of a forward pass; left out, torch decides (OMP_NUM_THREADS)."""
    seed: int = 0
    """fast: seed of its sampling; results still depend on what else is in a batch."""
    stop_with_parent: bool = False
    """Stop when standard input is closed, that is, when the process that started this one is gone."""
