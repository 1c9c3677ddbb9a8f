"""Whether trainer and inference server are the same model: fixed tokens compared after updates, and when to stop."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from opsd_megatron.config import MismatchConfig
from opsd_megatron.data.packing import filler_batch
from opsd_megatron.errors import ServerError, UserError
from opsd_megatron.losses.head import logprob_head
from opsd_megatron.models.build import head_weight
from opsd_megatron.models.forward import microbatch_multiple
from opsd_megatron.models.teacher import score
from opsd_megatron.objectives.metrics import MetricSums, max_of, mean_of
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object
from opsd_megatron.rollout.backend import RolloutBackend
from opsd_megatron.token_tree import NO_PARENT, Node, TokenTree
from opsd_megatron.train.layout import token_multiple
from opsd_megatron.train.weight_sync import version_name
from opsd_megatron.types import Rollout, TokenBatch

CHUNK_TOKENS = 256
VERSION_PREFIX = version_name(0).removesuffix("0")


class ServerDisagrees(ServerError):
    """The server gives the published weights other log-probs than the trainer does."""


class MismatchGuard:
    """Asks the questions and counts the answers; the same on every rank."""

    def __init__(self, config: MismatchConfig, tokens: Sequence[int], vocab_size: int, mesh: Mesh):
        """`tokens` are the probe; `vocab_size` is without padding."""
        self._config, self._vocab_size, self._mesh = config, vocab_size, mesh
        self._tokens = list(tokens[: config.probe_tokens])
        self._publications = self._steps_above = 0

    def probe(self, chunks: Sequence[nn.Module], backend: RolloutBackend | None, version: str) -> dict[str, float]:
        """Metrics of the probe, when it is due and the server can score; call it on all ranks, after a publication.

        Raises:
            ServerDisagrees: above the limit; nothing has been trained on such rollouts yet.
        """
        self._publications += 1
        every = self._config.probe_every_publications
        if not every or (self._publications - 1) % every or len(self._tokens) < 2:
            return {}
        scored, failure = None, None
        if backend is not None and self._mesh.world.rank == 0:
            try:
                scored = self._ask(backend, version)
            except Exception as error:
                failure = error
        scored, failure = broadcast_object((scored, failure), self._mesh.world)
        if failure is not None:
            raise failure
        if scored is None:
            return {}
        own = logprobs_of(chunks, self._tokens, self._vocab_size, self._mesh)
        gaps = [abs(mine - theirs) for mine, theirs in zip(own, scored, strict=True)]
        mean, largest = sum(gaps) / len(gaps), max(gaps)
        if not mean <= self._config.probe_limit_nats:
            raise ServerDisagrees(self._disagreement(version, mean, largest))
        return {"mismatch/probe_abs_mean_nats": mean, "mismatch/probe_abs_max_nats": largest}

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """UserError after `k3_steps` steps running above the limit."""
        k3, limit = values.get("mismatch/k3_kl_nats"), self._config.k3_limit_nats
        self._steps_above = 0 if k3 is None or k3 <= limit else self._steps_above + 1
        if self._steps_above >= self._config.k3_steps:
            raise UserError(
                f"step {step}: rollouts were sampled with other log-probs than the trainer's, mismatch/k3_kl_nats "
                f"{k3:.3f}, for {self._steps_above} steps running (limit mismatch.k3_limit_nats={limit}). {_CHECK} "
                "Or the rollouts are stale and the steps large: lower optimizer.lr, or set rollout.overlap=none. These "
                "steps may have done harm: resume from a checkpoint before them"
            )

    def _ask(self, backend: RolloutBackend, version: str) -> list[float] | None:
        """None where the server cannot score, or has restarted and has other weights: sampling will notice that."""
        if not backend.capabilities().can_score:
            return None
        (scored,) = backend.score([self._tokens])
        return scored if backend.weight_version() == version else None

    def _disagreement(self, version: str, mean: float, largest: float) -> str:
        return (
            f"the inference server, serving {version}, gives {len(self._tokens) - 1} fixed tokens log-probs that are "
            f"{mean:.3f} nats from the trainer's on average and {largest:.3f} at most "
            f"(limit mismatch.probe_limit_nats={self._config.probe_limit_nats}). {_CHECK}"
        )


_CHECK = (
    "Weights, RoPE settings or tokenizer disagree. Check that the server was started from the same architecture and "
    "quantizes nothing (compare its weight checksums), with the RoPE settings of model.yarn_factor and "
    "model.yarn_original_positions, with the same tokenizer files, and that it returns log-probs after temperature "
    "(vLLM: --logprobs-mode processed_logprobs)."
)


def logprobs_of(chunks: Sequence[nn.Module], tokens: Sequence[int], vocab_size: int, mesh: Mesh) -> list[float]:
    """Log-probs at temperature 1 of all tokens but the first, by the weights in `chunks`; collective over a replica."""
    ids, rows = torch.tensor(tokens), torch.arange(len(tokens) - 1)
    batch = TokenBatch(TokenTree((Node(NO_PARENT, len(tokens), 0),)), ids, rows=rows, response_index=rows)
    fillers = [filler_batch()] * (microbatch_multiple(mesh) - 1)
    alone = Axis.single("cp")
    shards = [deal(one, alone, token_multiple(mesh)).to(mesh.device) for one in (batch, *fillers)]
    hidden = score(chunks, shards, mesh)
    logprobs: list[float] = []
    if hidden is not None:
        head: Tensor = head_weight(chunks[-1]).detach()
        found, _ = logprob_head(
            hidden,
            head,
            ids[1:].to(mesh.device),
            temperature=1.0,
            tp=mesh.tp,
            vocab_size=vocab_size,
            chunk_tokens=CHUNK_TOKENS,
        )
        logprobs = found.tolist()
    return broadcast_object(logprobs, mesh.pp, mesh.pp.size - 1)


def staleness_metrics(rollouts: Sequence[Rollout], step: int) -> MetricSums:
    """Optimizer steps between the weights that sampled a token and those that learn from it, over all tokens.

    Versions that are not named by a step (a teacher's, another run's) are left out. Reduce over dp only.
    """
    ages, counts = [], []
    for span in (span for rollout in rollouts for span in rollout.version_spans):
        number = span.version.removeprefix(VERSION_PREFIX)
        if span.version.startswith(VERSION_PREFIX) and number.isdecimal():
            ages.append(step - int(number))
            counts.append(span.end - span.start)
    tokens = torch.repeat_interleave(torch.tensor(ages, dtype=torch.float64), torch.tensor(counts, dtype=torch.long))
    among = torch.ones_like(tokens, dtype=torch.bool)
    return {
        **mean_of("rollout/staleness_steps_mean", tokens, among),
        **max_of("rollout/staleness_steps_max", tokens, among),
    }


def require_comparable(rollouts: Sequence[Rollout], temperature: float) -> None:
    """ServerError where behaviour log-probs were taken before the temperature: ratios with them mean nothing."""
    raw = sum(rollout.logprob_kind == "raw" for rollout in rollouts)
    if raw and temperature != 1:
        raise ServerError(
            f"{raw} of {len(rollouts)} rollouts at rollout.temperature={temperature} have raw log-probs, from before "
            "the temperature; start vLLM with --logprobs-mode processed_logprobs, or set rollout.temperature=1"
        )
