import asyncio
import ctypes
import gc
from pathlib import Path

import pytest

from opsd_megatron.server.refusal import Refusal
from tests.server.in_process import answers, in_process, job, model_of, publish, span_gap
from tests.server.serving import OLD, http, prompts, requests
from tests.tiny_models import tiny_model

PROMPT = prompts(1, 70, 70)[0]


@pytest.mark.parametrize("engine", ["fast", "exact"])
def test_a_server_that_slept_answers_as_before_and_after_level_2_only_once_it_has_weights_again(engine):
    async def scenario() -> None:
        async with in_process(model_of("old"), engine) as service:
            carried = job(service, PROMPT, max_tokens=120)
            running = asyncio.create_task(service.generate(carried, "carried"))
            while not await begun(service):
                await asyncio.sleep(0.005)
            await service.sleep.sleep(1, "keep")
            with pytest.raises(Refusal, match="the server sleeps"):
                await answers(service, [job(service, PROMPT)])
            with pytest.raises(Refusal, match="the weights sleep"):
                service.weights.begin()
            await service.sleep.wake(None)
            (sample,) = await running
            assert len(sample.token_ids) == 120 and span_gap(PROMPT, sample) <= 1e-5

            await service.sleep.sleep(2, "abort")
            await service.sleep.wake(["weights"])
            assert service.is_healthy  # still asleep
            await service.sleep.wake(["kv_cache"])
            assert not service.is_healthy and not service.sleep.asleep
            with pytest.raises(Refusal, match="the weights hold nothing"):
                await answers(service, [job(service, PROMPT)])
            await publish(service, "new")
            ((sample,),) = await answers(service, [job(service, PROMPT)])
            assert [span.version for span in sample.spans] == ["new"] and span_gap(PROMPT, sample) <= 1e-5

    asyncio.run(scenario())


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_a_request_in_flight_survives_a_colocated_turn_or_ends_with_what_it_has(mode):
    """Sleep at level 2, wake the weights, fill them, wake the cache: how trainer and server take turns."""

    async def scenario() -> None:
        async with in_process(model_of("old")) as service:
            running = asyncio.create_task(service.generate(job(service, PROMPT, 150, samples=2), "running"))
            while not await begun(service):
                await asyncio.sleep(0.005)
            await service.sleep.sleep(2, mode)
            await service.sleep.wake(["weights"])
            await publish(service, "new")
            assert service.sleep.asleep == {"kv_cache"}
            await service.sleep.wake(["kv_cache"])
            samples = await running
            assert max(span_gap(PROMPT, sample) for sample in samples) <= 1e-5
            versions = {"old", "new"} if mode == "keep" else {"old"}
            assert {span.version for sample in samples for span in sample.spans} == versions
            assert {sample.finish_reason for sample in samples} == {"length" if mode == "keep" else "abort"}

    asyncio.run(scenario())


def test_sleeping_gives_the_memory_of_weights_and_cache_back():
    wide = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 20_000}  # 100 MB with its embeddings

    async def scenario() -> None:
        model = tiny_model("qwen3", **wide)
        weights_mb = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
        async with in_process(model, cache_tokens=1 << 13) as service:
            cache = service.engine._scheduler.cache.cache_tensor  # type: ignore[attr-defined]
            cache.fill_(0)
            awake, cache_mb = resident_mb(), cache.nbytes / 1e6
            await service.sleep.sleep(1, "abort")
            level_1 = resident_mb()
            await service.sleep.sleep(2, "abort")
            level_2 = resident_mb()
            assert weights_mb > 90 and awake - level_1 > 0.9 * cache_mb and level_1 - level_2 > 0.9 * weights_mb

    asyncio.run(scenario())


def resident_mb() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS:"))


def test_a_sleeping_server_is_healthy_says_so_and_answers_503(fast):
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}
    with http(fast) as client, fast.backend() as backend:
        assert client.post("/sleep?level=2").json() == {"status": "sleeping", "level": 2}
        assert client.get("/health").status_code == 200 and client.get("/server_info").json()["sleeping"] is True
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}
        refused = client.post("/inference/v1/generate", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "sleeps" in refused.json()["error"]["message"]
        assert client.post("/wake_up?tags=weights").json() == {"status": "awake", "tags": ["weights"]}
        assert client.post("/wake_up?tags=coffee").status_code == 400
        assert client.post("/wake_up?tags=kv_cache").status_code == 200
        assert client.get("/health").status_code == 503 and client.get("/is_sleeping").json() == {"is_sleeping": False}
        backend.update_from_disk(OLD, OLD)
        assert client.get("/health").status_code == 200 and client.post("/inference/v1/generate", json=body).is_success
        assert client.post("/sleep?level=3").status_code == 400
        assert client.post("/reset_prefix_cache").json() == {"success": True}
        assert backend.capabilities().can_sleep
        backend.sleep()
        backend.wake(["weights"])
        backend.update_from_disk(OLD, OLD)
        backend.wake(["kv_cache"])
        backend.flush_cache()
        result = backend.generate(requests(2))[1]
        assert result.samples[0].finish_reason == "length" and result.cached_tokens == 0


async def begun(service) -> bool:
    async with service.frozen():
        return any(progress.token_ids for progress in service.engine.in_flight().values())
