import asyncio

import pytest

from opsd_megatron.server.admission import QueueLimits
from opsd_megatron.server.refusal import Refusal
from tests.server.in_process import answers, in_process, job, model_of
from tests.server.serving import http, prompts

PROMPT = prompts(1, 40, 40)[0]


@pytest.mark.parametrize("limits", [QueueLimits(requests=3), QueueLimits(tokens=120)], ids=["requests", "tokens"])
def test_what_would_wait_beyond_the_limit_is_refused_and_the_rest_is_answered(limits):
    async def scenario() -> None:
        async with in_process(model_of("old"), "exact", limits=limits) as service:
            first = asyncio.create_task(service.generate(job(service, PROMPT, 60), "first"))
            while service.engine.waiting() or not service.requests:
                await asyncio.sleep(0.002)
            waiting = [asyncio.create_task(service.generate(job(service, PROMPT), str(n))) for n in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(Refusal, match="3 requests with 120 prompt tokens wait already") as refused:
                await answers(service, [job(service, PROMPT)])
            assert refused.value.status == 503
            assert "opsd_admission_rejections_total 1.0" in service.metrics.text()
            assert "opsd_requests_waiting 3.0" in service.metrics.text()
            finished = await asyncio.gather(first, *waiting)
            assert [len(samples[0].token_ids) for samples in finished] == [60, 4, 4, 4]
            assert await answers(service, [job(service, PROMPT)])

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_fails_its_requests_and_those_that_come_later():
    async def scenario() -> None:
        model = model_of("old")
        async with in_process(model) as service:
            running = asyncio.create_task(service.generate(job(service, PROMPT, 1000, samples=2), "running"))
            await asyncio.sleep(0.2)

            def break_down(*_):
                raise RuntimeError("the device is gone")

            model.register_forward_pre_hook(break_down)
            with pytest.raises(RuntimeError, match="the device is gone"):
                await asyncio.wait_for(running, 10)
            while service.engine.is_alive():
                await asyncio.sleep(0.01)
            with pytest.raises(Refusal, match="the engine has stopped"):
                await asyncio.wait_for(service.generate(job(service, PROMPT), "late"), 10)
            assert not service.is_healthy

    asyncio.run(scenario())


def test_stopping_lets_short_requests_finish_and_ends_long_ones_with_what_they_have():
    async def scenario() -> None:
        async with in_process(model_of("old")) as service:
            jobs = [job(service, PROMPT, 3), job(service, PROMPT, 4000)]
            running = [asyncio.create_task(service.generate(one, one.job_id)) for one in jobs]
            await asyncio.sleep(0.3)
            await service.finish_or_abort(patience_s=1.0)
            short, long = await asyncio.wait_for(asyncio.gather(*running), 10)
            assert (short[0].finish_reason, long[0].finish_reason) == ("length", "abort") and long[0].token_ids
            with pytest.raises(Refusal, match="is stopping"):
                await answers(service, [job(service, PROMPT)])
            while service.engine.figures()["cache_usage_ratio"] > 1e-9:  # the blocks of both are free again
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_metrics_are_valid_prometheus_text(server):
    with http(server) as client:
        lines = client.get("/metrics").text.splitlines()
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert len(types) == sum(line.startswith("# TYPE") for line in lines)
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            assert types[name] in ("counter", "gauge") and float(value) >= 0
            assert name.endswith("_total") == (types[name] == "counter")
    needed = {"requests_running", "requests_waiting", "prefill_tokens_total"}
    if "fast" in server.log_path.name:
        needed |= {"cache_usage_ratio", "prefix_cache_hits_total", "cache_evictions_total", "preemptions_total"}
    assert needed <= {line.split()[0].removeprefix("opsd_") for line in lines}
