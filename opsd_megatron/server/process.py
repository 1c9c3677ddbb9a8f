"""The process behind the command: model, engine, HTTP, and how it ends."""

import asyncio
import importlib.metadata
import logging
import os
import signal
import socket
import threading
import uuid
from contextlib import contextmanager

import torch
import uvicorn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from opsd_megatron.errors import ConfigError
from opsd_megatron.server.admission import QueueLimits
from opsd_megatron.server.engine import Engine
from opsd_megatron.server.exact import ExactEngine
from opsd_megatron.server.fast import FastEngine
from opsd_megatron.server.guard import Guard
from opsd_megatron.server.jobs import Identity
from opsd_megatron.server.options import ServerOptions
from opsd_megatron.server.routes import build_app
from opsd_megatron.server.service import Service
from opsd_megatron.server.text import find_text
from opsd_megatron.server.weights import WeightStore

log = logging.getLogger(__name__)
CPU_CACHE_BYTES = 1 << 30
STDIN = 0
FINISH_S = 5.0


def serve(options: ServerOptions, token: str, admin_token: str | None, listener: socket.socket) -> int:
    """Loads, warms up, and answers on `listener` until told to stop; 0 after a graceful stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(options)
    limit = options.max_model_len or model.config.get_text_config().max_position_embeddings
    cache_tokens = _cache_tokens(options, model, limit)
    limits = QueueLimits(options.max_queued_requests, options.max_queued_tokens)
    weights = WeightStore(model, options.weights_root)
    service = Service(_engine(options, model, cache_tokens), weights, options.weight_version, limits)
    app = build_app(service, _identity(options, model, limit), find_text(options.model))
    guarded = Guard(app, token, admin_token, options.max_body_mb << 20, options.max_bucket_mb << 20)
    config = uvicorn.Config(
        guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=10, timeout_keep_alive=75
    )
    server = _Server(config, service)
    if options.stop_with_parent:
        threading.Thread(target=_stop_at_end_of_input, args=(server,), daemon=True).start()
    log.info("loaded %s as %s; warming up for http://%s:%d", options.model, options.dtype, *listener.getsockname()[:2])
    asyncio.run(server.serve(sockets=[listener]))
    return 0 if server.started else 1


def load_model(options: ServerOptions) -> PreTrainedModel:
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has none; use --device cpu")
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    if options.yarn_factor is not None:
        _stretch(config.get_text_config(), options.yarn_factor, options.yarn_original_positions)
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        config=config,
        dtype=getattr(torch, options.dtype),
        attn_implementation="sdpa",
        local_files_only=True,
    )
    torch.nn.Module.to(model, torch.device(device)).requires_grad_(False)
    return model.eval()


def _stretch(config: PreTrainedConfig, factor: float, original: int | None) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") != "default":
        raise ConfigError(f"--yarn-factor {factor} needs plain rotary positions, but config.json has "
                          f"rope_type={rope.get('rope_type')}; leave --yarn-factor out")  # fmt: skip
    if factor < 1:
        raise ConfigError(f"--yarn-factor {factor}: 1 or more")
    positions: int = config.max_position_embeddings or 0
    original = original or positions
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config.rope_parameters = {**scaling, "rope_theta": rope["rope_theta"]}
    config.max_position_embeddings = max(positions, int(factor * original))


def _engine(options: ServerOptions, model: PreTrainedModel, cache_tokens: int | None) -> Engine:
    if options.engine == "exact":
        return ExactEngine(model)
    batch_tokens = options.batch_tokens or (8192 if model.device.type == "cpu" else None)
    return FastEngine(model, cache_tokens, options.page_tokens, batch_tokens, options.seed)


def _cache_tokens(options: ServerOptions, model: PreTrainedModel, limit: int) -> int | None:
    if options.cache_tokens is not None and options.cache_tokens < limit:
        raise ConfigError(f"--cache-tokens {options.cache_tokens} holds less than one request of {limit} tokens; "
                          "raise it or lower --max-model-len")  # fmt: skip
    if options.cache_tokens is not None or model.device.type != "cpu":
        return options.cache_tokens
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return max(limit, min(CPU_CACHE_BYTES // token_bytes, 1 << 17))


def _identity(options: ServerOptions, model: PreTrainedModel, limit: int) -> Identity:
    ends: set[int] = set()
    for source in (model.generation_config or GenerationConfig(), model.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    return Identity(
        server_id=uuid.uuid4().hex,
        model=options.model.resolve().name,
        engine=options.engine,
        dtype=options.dtype,
        package_version=importlib.metadata.version("opsd-megatron"),
        vocab_size=model.config.get_text_config().vocab_size,
        max_model_len=limit,
        end_token_ids=frozenset(token for token in ends if token >= 0),
    )


class _Server(uvicorn.Server):
    """uvicorn that ends with exit code 0 on SIGTERM and SIGINT, after every open request has had its reply."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._service.finish_or_abort(FINISH_S))
        await super().shutdown(sockets)
        ending.cancel()

    @contextmanager
    def capture_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield


def _stop_at_end_of_input(server: uvicorn.Server) -> None:
    while os.read(STDIN, 4096):  # sys.stdin's buffer would abort the interpreter's exit with its lock held
        pass
    server.should_exit = True
