"""The probe of trainer against server, and the rules that stop a run."""

from dataclasses import replace

import pytest
import torch

from opsd_megatron.config import MismatchConfig, ParallelConfig
from opsd_megatron.errors import ServerError, UserError
from opsd_megatron.objectives.metrics import finish_metrics
from opsd_megatron.rollout.backend import Capabilities, RolloutBackend
from opsd_megatron.train.mismatch import MismatchGuard, ServerDisagrees, require_comparable, staleness_metrics
from opsd_megatron.types import VersionSpan
from tests.ranks import run_on_ranks
from tests.tiny_models import VOCAB, write_tiny_model
from tests.train.parallel_step import make_rollouts

TOKENS = tuple(torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(5)).tolist())


class Served(RolloutBackend):
    """transformers' model of a directory, in this process."""

    def __init__(self, directory, can_score: bool = True, version: str = "step-4", **overrides):
        self.directory, self.can_score, self.version, self.overrides = directory, can_score, version, overrides

    def capabilities(self) -> Capabilities:
        nothing = frozenset()
        return Capabilities("processed", True, True, nothing, nothing, True, False, self.can_score, False)

    def weight_version(self) -> str:
        return self.version

    def score(self, sequences):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.directory)
        for name, value in self.overrides.items():
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_pretrained(self.directory, config=config, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = [model(torch.tensor([list(one)])).logits[0, :-1].log_softmax(-1) for one in sequences]
        return [
            row.gather(1, torch.tensor(one[1:])[:, None])[:, 0].tolist()
            for row, one in zip(logits, sequences, strict=True)
        ]


def probes(old, new) -> dict[str, dict[str, float] | str]:
    """What a guard with the old weights in the trainer says to each server, on this rank."""
    from opsd_megatron.checkpoint.model_weights import load_weights
    from opsd_megatron.models.architecture import read_architecture
    from opsd_megatron.models.build import build_model
    from opsd_megatron.parallel.mesh import build_mesh

    mesh, architecture = build_mesh(ParallelConfig(pp=2)), read_architecture(old)
    chunks = build_model(architecture, mesh, torch.float32)
    load_weights(chunks, architecture, old, mesh)
    rope = {"rope_type": "default", "rope_theta": 300.0}
    servers = {
        "same": Served(old),
        "other weights": Served(new),
        "other rope": Served(old, rope_parameters=rope),
        "cannot score": Served(old, can_score=False),
        "restarted": Served(new, version="old"),
    }
    said: dict[str, dict[str, float] | str] = {}
    for name, server in servers.items():
        guard = MismatchGuard(MismatchConfig(probe_every_publications=2), TOKENS, architecture.vocab_size, mesh)
        try:
            said[name] = guard.probe(chunks, server if mesh.world.rank == 0 else None, "step-4")
            assert guard.probe(chunks, server if mesh.world.rank == 0 else None, "step-4") == {}, "every second only"
        except ServerDisagrees as error:
            said[name] = str(error)
    return said


def test_a_probe_tells_the_same_model_from_other_weights_and_other_rope_settings(tmp_path):
    old, new = (write_tiny_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (0, 1))
    for said in run_on_ranks(2, probes, old, new):
        assert said["same"]["mismatch/probe_abs_max_nats"] < 1e-4
        for name in ("other weights", "other rope"):
            assert "255 fixed tokens" in said[name] and "RoPE settings" in said[name], said[name]
        assert said["cannot score"] == said["restarted"] == {}


def test_a_run_stops_after_k_steps_of_mismatch_running():
    guard = MismatchGuard(MismatchConfig(k3_limit_nats=0.1, k3_steps=2), (), 1, None)  # type: ignore[arg-type]
    for step, k3 in enumerate((0.5, 0.05, 0.2, 0.0)):
        guard.watch(step, {"mismatch/k3_kl_nats": k3})
    guard.watch(5, {"mismatch/k3_kl_nats": 0.2})
    with pytest.raises(UserError, match=r"step 6: .* 0\.300, for 2 steps running"):
        guard.watch(6, {"mismatch/k3_kl_nats": 0.3})


def test_staleness_is_counted_by_token():
    first, second, third = make_rollouts()[:3]
    spans = (VersionSpan("step-3", 0, 1), VersionSpan("step-5", 1, 4))
    rollouts = [
        replace(first, version_spans=spans),
        replace(second, version_spans=(VersionSpan("step-4", 0, 4),)),
        replace(third, version_spans=(VersionSpan("teacher-1", 0, 9),)),
    ]
    assert finish_metrics(staleness_metrics(rollouts, 5)) == {
        "rollout/staleness_steps_mean": (2 * 1 + 0 * 3 + 1 * 4) / 8,
        "rollout/staleness_steps_max": 2.0,
    }
    assert finish_metrics(staleness_metrics(rollouts[2:], 5)) == {}


def test_raw_log_probs_are_refused_at_another_temperature_than_1():
    rollouts = make_rollouts()
    require_comparable(rollouts, 0.7)
    rollouts[2] = replace(rollouts[2], logprob_kind="raw")
    require_comparable(rollouts, 1.0)
    with pytest.raises(ServerError, match="processed_logprobs"):
        require_comparable(rollouts, 0.7)
