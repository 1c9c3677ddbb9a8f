"""A service over an engine inside of the test's process, where what goes through the model can be counted."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache

import safetensors.torch
import torch
from transformers import PreTrainedModel

from opsd_megatron.server.admission import QueueLimits
from opsd_megatron.server.engine import Job
from opsd_megatron.server.exact import ExactEngine
from opsd_megatron.server.fast import FastEngine
from opsd_megatron.server.requests import Sample
from opsd_megatron.server.service import Service
from opsd_megatron.server.weights import WeightStore
from tests.server.serving import full_forward_logits
from tests.tiny_models import VOCAB, tiny_model

PAGE = 16
UNLIMITED = QueueLimits()


def model_of(version: str) -> PreTrainedModel:
    """The weights that are served under that name."""
    return tiny_model("qwen3", seed=0 if version == "old" else 1, max_position_embeddings=4096)


@cache
def _reference(version: str) -> PreTrainedModel:
    model = model_of(version).double()
    model.set_attn_implementation("sdpa")
    return model


@asynccontextmanager
async def in_process(
    model: PreTrainedModel, engine: str = "fast", cache_tokens: int = 1 << 15, limits: QueueLimits = UNLIMITED
) -> AsyncIterator[Service]:
    made = FastEngine(model, cache_tokens, PAGE, 4096, 0) if engine == "fast" else ExactEngine(model)
    service = Service(made, WeightStore(model, None), "old", limits)
    await service.start(VOCAB)
    try:
        yield service
    finally:
        await service.stop()


def job(service: Service, prompt: Sequence[int], max_tokens: int = 4, samples: int = 1, salt: str | None = None) -> Job:
    return Job(service.next_job_id(salt), tuple(prompt), samples, max_tokens, 1.0, 1.0, 0, None, frozenset())


async def answers(service: Service, jobs: Sequence[Job]) -> list[list[Sample]]:
    return await asyncio.gather(*(service.generate(one, one.job_id) for one in jobs))


async def publish(service: Service, version: str) -> None:
    service.weights.begin()
    body = safetensors.torch.save(dict(model_of(version).state_dict()))
    room = service.weights.room_for("0", len(body))
    service.weights.stage("0", room.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8)))
    await service.publish_staged(version)


def span_gap(prompt: Sequence[int], sample: Sample) -> float:
    """max |log-prob of the server - that of a full forward pass of the weights that its span names|."""
    worst = 0.0
    for span in sample.spans:
        logits = full_forward_logits(_reference(span.version), prompt, sample.token_ids)
        wanted = logits.log_softmax(dim=-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        have = torch.tensor(sample.logprobs, dtype=torch.float64)
        worst = max(worst, float((wanted - have)[span.start : span.end].abs().max()))
    return worst


class CountedTokens:
    """Token ids that go through `model`."""

    def __init__(self, model: PreTrainedModel):
        self.count = 0
        model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, _, arguments, named) -> None:
        self.count += named["input_ids"].numel()

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count
