"""The fast engine: transformers' continuous batching (checked against 5.23) behind our small interface.

Everything that leans on its private side is in this file and in prefix_cache.py:
  - the log-probs it returns are those after temperature, top-k and top-p;
  - per-request sampling exists only where the settings at creation are not neutral;
  - blocks that requests share would hold keys of older weights after a swap, so all are dropped then (prefix_cache.py);
  - a batch that is computed ahead would blur which weights made a token, so that is off too;
  - n samples of a prompt are forked after its prefill, through a number that is read when a request is added.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cb_logits_processors as warpers
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.utils import is_flash_attn_2_available

from opsd_megatron.errors import ConfigError
from opsd_megatron.server import prefix_cache, varlen_attention
from opsd_megatron.server.engine import Continuation, Deliver, Job, SampleKey
from opsd_megatron.server.prefix_cache import CHILD, PrefixScheduler


class FastEngine:
    """Many requests in one batch, tokens of all in every forward pass; paged key-value cache."""

    seeded = False

    def __init__(
        self, model: PreTrainedModel, cache_tokens: int | None, page_tokens: int, batch_tokens: int | None, seed: int
    ):
        """`cache_tokens` None: as the accelerator's free memory allows."""
        config = model.config.get_text_config()
        self.vocab_size = config.vocab_size
        if getattr(config, "sliding_window", None) is not None:
            raise ConfigError(
                f"--engine fast: this model attends within windows of {config.sliding_window} tokens, which it "
                "does not know; use --engine exact"
            )
        if model.device.type == "cuda" and model.dtype == torch.bfloat16 and is_flash_attn_2_available():
            model.set_attn_implementation("flash_attention_2")
        else:
            varlen_attention.register()
            model.config._attn_implementation = varlen_attention.NAME
        prefix_cache.register()
        settings = ContinuousBatchingConfig(
            page_size=page_tokens,
            num_blocks=None if cache_tokens is None else -(-cache_tokens // page_tokens),
            max_batch_tokens=batch_tokens,
            allow_block_sharing=True,
            scheduler_type=prefix_cache.NAME,
            use_async_batching=False,
            use_cuda_graph=False,
            return_logprobs=True,
            per_request_processors=True,
            auto_switch_to_flash=False,
            seed=seed,
        )
        neutral_but_present = GenerationConfig(
            do_sample=True, temperature=0.5, top_k=self.vocab_size - 1, top_p=0.5, max_new_tokens=16, eos_token_id=-1
        )
        self.manager: Any = ContinuousBatchingManager(model, neutral_but_present, settings)  # type: ignore[arg-type]
        _skip_what_is_off(self.manager.logit_processor)
        self._freezes: list[contextlib.ExitStack] = []

    def start(self, deliver: Deliver) -> None:
        self.manager.output_router = _Router(asyncio.get_running_loop(), deliver, lambda: self._scheduler)
        self.manager.start()

    def submit(self, job: Job) -> None:
        can_fork = len(job.prompt) > 1  # the fork happens before the last prompt token
        self.manager.num_return_sequences = job.samples if can_fork else 1
        for key in job.keys[:1] if can_fork else job.keys:
            accepted = self.manager.add_request(
                list(job.prompt),
                request_id=_name(key),
                max_new_tokens=job.max_tokens,
                streaming=job.is_streamed,
                eos_token_id=sorted(job.stop_token_ids),
                temperature=float(job.temperature or 1.0),
                top_k=1 if job.temperature == 0 else (job.top_k or self.vocab_size),
                top_p=float(job.top_p),
            )
            if accepted is None:
                raise RuntimeError("the engine has stopped and takes no requests; restart the server")

    def cancel(self, keys: list[SampleKey]) -> None:
        for key in keys:
            self.manager.cancel_request(_name(key))

    def freeze(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self.manager.pause())
        self._freezes.append(stack)

    def thaw(self) -> None:
        self._freezes.pop().close()

    def in_flight(self) -> dict[SampleKey, Continuation]:
        scheduler = self._scheduler
        states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        return {_key(state.request_id): _continuation(state.to_generation_output()) for state in states}

    def waiting(self) -> set[str]:
        states = [*self.manager.input_queue.queue, *self._scheduler.waiting_requests.values()]
        return {_key(state.request_id)[0] for state in states}

    def figures(self) -> dict[str, float]:
        scheduler = self._scheduler
        return {
            "cache_usage_ratio": scheduler.usage,
            "prefix_cache_queries_total": scheduler.counts["queried_tokens"],
            "prefix_cache_hits_total": scheduler.counts["found_tokens"],
            "prefill_tokens_total": scheduler.counts["prefilled_tokens"],
            "cache_evictions_total": scheduler.allocator.ledger.evicted_blocks,
            "preemptions_total": scheduler.counts["preemptions"],
        }

    def drop_cache(self) -> None:
        self._scheduler.restart_all()

    def release_cache(self) -> None:
        self.drop_cache()
        storage = self._scheduler.cache.cache_tensor.untyped_storage()
        self._cache_bytes = storage.nbytes()
        storage.resize_(0)

    def restore_cache(self) -> None:
        cache = self._scheduler.cache
        cache.cache_tensor.untyped_storage().resize_(self._cache_bytes)
        cache.cache_tensor[
            : 2 * cache.bytes_per_sector
        ].zero_()  # read by padding; the rest is written before it is read

    @property
    def _scheduler(self) -> PrefixScheduler:
        """Of the engine's thread: counts may be read at any time, the rest while frozen."""
        return self.manager.batch_processor.scheduler

    def is_alive(self) -> bool:
        return self.manager.is_running()

    def stop(self) -> None:
        while self._freezes:
            self.thaw()
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=10, hard_stop=True)


class _Router(OutputRouter):
    """Finished requests of one batch, to the event loop in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Deliver, scheduler: Callable[[], PrefixScheduler]):
        super().__init__()
        self._loop, self._deliver, self._scheduler = loop, deliver, scheduler

    def deliver(self, output) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list) -> None:
        results = [(_key(output.request_id), _continuation(output, self._cached(output))) for output in outputs]
        self._loop.call_soon_threadsafe(lambda: [self._deliver(*result) for result in results])

    def _cached(self, output) -> int:
        return 0 if output.error else self._scheduler().cached_tokens.pop(output.request_id, 0)


def _name(key: SampleKey) -> str:
    """The first sample is the request itself, the others are its forks, counted from 0."""
    job_id, sample = key
    return job_id if sample == 0 else f"{job_id}{CHILD}{sample - 1}"


def _key(request_id: str) -> SampleKey:
    job_id, is_fork, number = request_id.partition(CHILD)
    return (job_id, int(number) + 1) if is_fork else (job_id, 0)


def _continuation(output, cached_tokens: int = 0) -> Continuation:
    return Continuation(
        output.generated_tokens, output.logprobs, None, output.error, output.is_finished(), cached_tokens
    )


class _TopK(warpers.ContinuousBatchingTopKLogitsWarper):
    """Leaves rows alone that keep everything; top_k = 1 keeps one token even where several are equally likely."""

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        top_k = tensor_arg[: scores.size(0)]
        is_greedy = top_k == 1
        if bool((~is_greedy & (top_k < scores.size(1))).any()):
            scores = super().__call__(scores, tensor_arg)
        if bool(is_greedy.any()):
            best = scores.argmax(dim=-1, keepdim=True)
            only_best = torch.full_like(scores, self.filter_value).scatter_(1, best, scores.gather(1, best))
            scores = torch.where(is_greedy[:, None], only_best, scores)
        return scores


class _TopP(warpers.ContinuousBatchingTopPLogitsWarper):
    """Leaves the batch alone where no row cuts anything."""

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        top_p = tensor_arg[: scores.size(0)].view(dtype=torch.float32)
        return scores if bool((top_p >= 1).all()) else super().__call__(scores, tensor_arg)


def _skip_what_is_off(processors) -> None:
    """Sorting the vocabulary twice per token is most of the sampling time; rollouts at temperature 1 need neither."""
    present = [type(processor) for processor in processors.logits_processor]
    expected = [
        warpers.ContinuousBatchingTemperatureLogitsWarper,
        warpers.ContinuousBatchingTopKLogitsWarper,
        warpers.ContinuousBatchingTopPLogitsWarper,
    ]
    if present != expected:
        raise RuntimeError(
            f"this version of transformers processes logits with {[p.__name__ for p in present]}; opsd_megatron.server "
            "knows temperature, top-k, top-p (transformers 5.23): install that version or start with --engine exact"
        )
    temperature, top_k, top_p = processors.logits_processor
    processors.logits_processor[:] = [temperature, _TopK(top_k), _TopP(top_p)]
