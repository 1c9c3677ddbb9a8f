import asyncio
import random

import pytest

from tests.server.in_process import PAGE, CountedTokens, answers, in_process, job, model_of, publish, span_gap
from tests.server.serving import prompts


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return prompts(1, length, length, seed=seed)[0]


def test_a_shared_prefix_of_2048_tokens_is_prefilled_once():
    shared, made = prompt_of(2048), 3
    tails = prompts(8, 5, 5, seed=7)

    async def scenario() -> None:
        model = model_of("old")
        tokens = CountedTokens(model)
        async with in_process(model) as service:
            tokens.taken()
            cold = await answers(service, [job(service, shared, made, samples=8)])
            assert tokens.taken() == 2047 + 8 * made  # the last prompt token is computed by each sample
            assert cold[0][0].cached_tokens == 0

            assert await service.reset_prefix_cache(restart_running=False)
            apart = await answers(service, [job(service, shared + tail, made) for tail in tails])
            assert tokens.taken() == 2048 + 8 * 5 + 8 * (made - 1)
            assert sorted(samples[0].cached_tokens for samples in apart) == [0] + [2048] * 7

            again = await answers(service, [job(service, shared, made, samples=8)])
            assert again[0][0].cached_tokens == 2048 - PAGE  # one token at least has to be computed
            assert tokens.taken() == PAGE - 1 + 8 * made
            figures = service.engine.figures()
            assert figures["prefix_cache_hits_total"] == 7 * 2048 + 2048 - PAGE
            assert figures["cache_usage_ratio"] == pytest.approx(0, abs=1e-9)
        checked = [(shared, cold[0][7]), (shared, again[0][0]), (shared, again[0][7]), (shared + tails[7], apart[7][0])]
        assert max(span_gap(prompt, sample) for prompt, sample in checked) <= 1e-5

    asyncio.run(scenario())


@pytest.mark.parametrize("drops", [True, False])
def test_no_stale_block_is_read_after_a_swap(drops, monkeypatch):
    """And without the drop, this test would see it."""
    asked = prompts(4, 3 * PAGE, 5 * PAGE, seed=2)

    async def scenario() -> list[float]:
        async with in_process(model_of("old")) as service:
            await answers(service, [job(service, prompt) for prompt in asked])
            carried = job(service, prompt_of(4 * PAGE, seed=3), max_tokens=200, samples=2)
            running = asyncio.create_task(service.generate(carried, "carried"))
            while not any(progress.token_ids for progress in await progress_of(service)):
                await asyncio.sleep(0.005)
            await service.pause("keep")
            if not drops:
                monkeypatch.setattr(service.engine, "drop_cache", lambda: None)
            await publish(service, "new")
            await service.resume()
            over = await running
            again = await answers(service, [job(service, prompt) for prompt in asked])
            assert all(len(sample.spans) == 2 for sample in over)
            assert drops == all(samples[0].cached_tokens == 0 for samples in again)
        gaps = [span_gap(prompt, samples[0]) for prompt, samples in zip(asked, again, strict=True)]
        return gaps + [span_gap(carried.prompt, sample) for sample in over]

    gaps = asyncio.run(scenario())
    assert max(gaps) <= 1e-5 if drops else min(gaps) > 1e-2


async def progress_of(service) -> list:
    async with service.frozen():
        return list(service.engine.in_flight().values())


def test_salts_keep_caches_apart():
    prompt = prompt_of(4 * PAGE + 1)

    async def scenario() -> None:
        async with in_process(model_of("old")) as service:
            found = []
            for salt in (None, "a", None, "a", "b"):
                ((sample,),) = await answers(service, [job(service, prompt, salt=salt)])
                found.append(sample.cached_tokens)
                assert span_gap(prompt, sample) <= 1e-5
            assert found == [0, 0, 4 * PAGE, 4 * PAGE, 0]

    asyncio.run(scenario())


def test_a_crowded_cache_with_cancellations_and_swaps_loses_and_mixes_nothing():
    """The cache holds less than two requests of the forty: blocks are evicted and requests are preempted throughout."""
    draw = random.Random(0)
    stems = prompts(3, 2 * PAGE, 6 * PAGE, seed=4)
    asked = [stems[i % 3][: draw.randrange(PAGE, 6 * PAGE)] + tail for i, tail in enumerate(prompts(40, 1, 9, seed=5))]

    async def scenario() -> None:
        async with in_process(model_of("old"), cache_tokens=20 * PAGE) as service:
            jobs = [job(service, prompt, 30, samples=1 + i % 3) for i, prompt in enumerate(asked)]
            running = [asyncio.create_task(service.generate(one, one.job_id)) for one in jobs]
            await asyncio.sleep(0.3)
            for task in running[::5]:
                task.cancel()
            await service.pause("keep")
            await publish(service, "new")
            assert not await service.reset_prefix_cache(restart_running=False)
            await service.resume()
            results = await asyncio.gather(*running, return_exceptions=True)
            figures = service.engine.figures()
            assert figures["cache_evictions_total"] > 0 and figures["preemptions_total"] > 0
            assert figures["cache_usage_ratio"] == pytest.approx(0, abs=1e-9) and not service.engine.waiting()
        finished = [(prompt, r) for prompt, r in zip(asked, results, strict=True) if not isinstance(r, BaseException)]
        assert len(finished) >= 32 and {span.version for _, r in finished for s in r for span in s.spans} == {
            "old",
            "new",
        }
        assert all(len(sample.token_ids) == 30 for _, samples in finished for sample in samples)
        assert max(span_gap(prompt, samples[0]) for prompt, samples in finished[::3]) <= 1e-5

    asyncio.run(scenario())
