"""Real servers for tests: each a process of its own, started once per session, over tiny random models."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opsd_megatron.rollout.backend import GenerateRequest, Sample
from opsd_megatron.rollout.process import ServerProcess
from tests.server.tiny_tokenizer import write_tiny_tokenizer
from tests.tiny_models import VOCAB, write_tiny_model

TOKEN = "token-of-the-tests"
OLD, NEW = "old", "new"
"""Directories below the served root: the weights at start, and others of the same model."""


@cache
def shared_root() -> Path:
    """The served root; gone when the tests end."""
    root = Path(tempfile.mkdtemp(prefix="opsd-served-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_tiny_model(root / OLD, "qwen3", seed=0, max_position_embeddings=1024)
    write_tiny_model(root / NEW, "qwen3", seed=1, max_position_embeddings=1024)
    write_tiny_tokenizer(root / OLD)
    return root


@cache
def shared_servers() -> dict[str, ServerProcess]:
    """One server per engine for all tests, started together at first use, stopped when the tests end."""
    servers = {engine: server_for(shared_root(), OLD, engine, shared_root()) for engine in ("fast", "exact")}
    for server in servers.values():
        server.launch()
        atexit.register(server.stop)
    for server in servers.values():
        server.wait_until_ready()
    return servers


def server_for(root: Path, name: str, engine: str, log_directory: Path, *arguments: str) -> ServerProcess:
    return ServerProcess(
        root / name,
        TOKEN,
        log_directory / f"server-{name}-{engine}.log",
        engine=engine,
        threads=1,
        arguments=["--weights-root", str(root), "--weight-version", name, "--max-bucket-mb", "2", *arguments],
    )


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def http(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False)


@torch.no_grad()
def full_forward_logits(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """float64 logits [response, vocab] that predict each response token, from one pass without any cache."""
    ids = torch.tensor([[*prompt, *response[:-1]]])
    logits = model.double()(ids).logits[0, len(prompt) - 1 :]
    return logits.double()


def prompts(count: int, shortest: int = 3, longest: int = 90, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def requests(count: int, seed: int = 0, **sampling) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"r{number}", prompt, seed=100 + number, **{"max_tokens": 7, "ignore_eos": True} | sampling)
        for number, prompt in enumerate(prompts(count, seed=seed))
    ]


def largest_gap(model: PreTrainedModel, request: GenerateRequest, sample: Sample) -> float:
    """max |log-prob of the server - log-prob of a full forward pass|, at temperature 1 without top-k or top-p."""
    logits = full_forward_logits(model, request.token_ids, sample.token_ids)
    wanted = logits.log_softmax(dim=-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    return float((wanted - torch.tensor(sample.logprobs, dtype=torch.float64)).abs().max())


@contextmanager
def served(server: ServerProcess, weights: str) -> Iterator[ServerProcess]:
    """`server` with the weights of that directory, whatever a test before did to it."""
    with server.backend() as backend:
        backend.resume()
        if backend.weight_version() != weights:
            backend.update_from_disk(weights, weights)
        yield server
        backend.resume()
