"""What HTTP costs: the embedded server beside the same continuous-batching engine called in its own process.

    python -W ignore tools/bench/server.py

32 concurrent requests of random prompts, the same tiny model and batch settings, one thread for the model each. The
server runs in its own process and is asked from another. Below the table: the server's throughput over the bare
engine's, what HTTP adds per token, and how many prompt tokens go through the model for 8 samples of one prompt of 2,048
tokens: at once, and as 8 requests that share it.
"""

import argparse
import asyncio
import os
import random
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

import httpx
import torch
from model import add_model_arguments, qwen3_config
from side_by_side import Run, measure, report
from transformers import AutoModelForCausalLM, PreTrainedModel

from opsd_megatron.rollout.process import ServerProcess

Settings = argparse.Namespace
TOKEN = "token-of-the-bench"
PAGE, BATCH, CACHE = 64, 8192, 1 << 16


def prompts_of(settings: Settings, run: int) -> list[list[int]]:
    """Others in every run, so that nothing of them is in a cache."""
    draw = random.Random(run)
    return [draw.choices(range(settings.vocab), k=settings.prompt) for _ in range(settings.concurrent)]


def model_of(settings: Settings) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(qwen3_config(settings), dtype=torch.float32).eval().requires_grad_(False)


def engine(settings: Settings) -> Run:
    """transformers' manager as the server sets it up, called directly."""
    from opsd_megatron.server.fast import FastEngine

    manager = FastEngine(model_of(settings), CACHE, PAGE, BATCH, 0).manager
    manager.start()
    Finalize(None, lambda: manager.stop(block=True, hard_stop=True), exitpriority=1)
    runs = iter(range(1 << 30))

    def run() -> dict[str, float]:
        for prompt in prompts_of(settings, next(runs)):
            limits = {"max_new_tokens": settings.response, "eos_token_id": -1}
            manager.add_request(prompt, **limits, temperature=1.0, top_k=settings.vocab, top_p=1.0)
        made = 0
        for _ in range(settings.concurrent):
            result = manager.get_result(timeout=300)
            made += len(result.logprobs)
        return {"tokens": made}

    return run


def body_of(settings: Settings, prompt: list[int], tokens: int, samples: int = 1) -> dict:
    sampling = {"max_tokens": tokens, "n": samples, "ignore_eos": True, "logprobs": 0}
    return {"token_ids": prompt, "sampling_params": sampling}


def start_server(settings: Settings, directory: Path, *arguments: str) -> ServerProcess:
    model_of(settings).save_pretrained(directory / "model")
    flags = ["--page-tokens", str(PAGE), "--batch-tokens", str(BATCH), "--cache-tokens", str(CACHE)]
    flags += ["--max-model-len", "8192", *arguments]
    server = ServerProcess(directory / "model", TOKEN, directory / "server.log", threads=1, arguments=flags)
    server.start()
    return server


def client_of(server: ServerProcess) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300, trust_env=False)


async def ask(client: httpx.AsyncClient, bodies: list[dict]) -> list[dict]:
    replies = await asyncio.gather(*(client.post("/inference/v1/generate", json=body) for body in bodies))
    return [reply.raise_for_status().json() for reply in replies]


def server(settings: Settings) -> Run:
    directory = tempfile.TemporaryDirectory()
    process = start_server(settings, Path(directory.name))
    runs = iter(range(1 << 30))
    loop = asyncio.new_event_loop()
    client = client_of(process)

    def run() -> dict[str, float]:
        bodies = [body_of(settings, prompt, settings.response) for prompt in prompts_of(settings, next(runs))]
        replies = loop.run_until_complete(ask(client, bodies))
        tokens = sum(len(choice["logprobs"]["content"]) for reply in replies for choice in reply["choices"])
        return {"tokens": tokens}

    Finalize(None, process.stop, exitpriority=2)
    Finalize(None, directory.cleanup, exitpriority=1)
    return run


async def prefilled(settings: Settings, process: ServerProcess) -> dict[str, float]:
    """Prompt tokens through the model: 8 samples of one prompt; 8 requests that share one; what they would be apart."""
    shared = random.Random(-1).choices(range(settings.vocab), k=2048)
    async with client_of(process) as client:

        async def counted(bodies: list[dict]) -> float:
            await client.post("/reset_prefix_cache")
            before = await metric(client, "opsd_prefill_tokens_total")
            await ask(client, bodies)
            return await metric(client, "opsd_prefill_tokens_total") - before

        return {
            "8 samples of one request": await counted([body_of(settings, shared, 4, samples=8)]),
            "8 requests": await counted([body_of(settings, [*shared, i], 4) for i in range(8)]),
            "without sharing": 8 * 2049.0,
        }


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    add_model_arguments(parser)
    settings = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    figures = measure({"server": server, "engine": engine}, settings, settings.repeats)
    title = f"{settings.concurrent} requests of {settings.prompt} + {settings.response} tokens"
    report(title, settings, figures, settings.output)
    http, bare = figures
    tokens = bare.values["tokens"]
    print(f"throughput: {tokens / http.median_s:.0f} and {tokens / bare.median_s:.0f} tokens/s, "
          f"ratio {bare.median_s / http.median_s:.3f}")  # fmt: skip
    print(f"HTTP adds {1e6 * (http.median_s - bare.median_s) / tokens:.1f} us per token")
    with tempfile.TemporaryDirectory() as directory:
        process = start_server(settings, Path(directory))
        try:
            for name, count in asyncio.run(prefilled(settings, process)).items():
                print(f"prompt tokens through the model, 2,048 shared, {name}: {count:.0f}")
        finally:
            process.stop()


if __name__ == "__main__":
    main()
