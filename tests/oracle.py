"""The float64 oracle: one dense decoder on one rank, one sequence at a time, no trees, no chunks, no parallelism.

It reads a Hugging Face directory and knows RMSNorm, rotary attention with grouped heads, SwiGLU and nothing else.
Rotary angles are float32, as in transformers and Megatron; everything after them is float64.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from opsd_megatron.config import Distill


class DenseModel:
    """Parameters by their Hugging Face names, in float64, ready for autograd."""

    def __init__(self, directory: Path):
        self.config = AutoConfig.from_pretrained(directory)
        self.parameters = {
            name: tensor.double().requires_grad_()
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        rotary = AutoModelForCausalLM.from_config(self.config).model.rotary_emb
        self._inv_freq, self._rotary_scale = rotary.inv_freq.float(), rotary.attention_scaling

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocab] of one sequence."""
        weight = self.parameters
        hidden = weight["model.embed_tokens.weight"][torch.tensor(token_ids)]
        angles = torch.arange(len(token_ids)).float()[:, None] * self._inv_freq
        rotation = tuple((f(angles) * self._rotary_scale).double() for f in (torch.cos, torch.sin))
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            attended = self._attention(self._norm(hidden, prefix + "input_layernorm.weight"), prefix, rotation)
            hidden = hidden + attended
            hidden = hidden + self._mlp(self._norm(hidden, prefix + "post_attention_layernorm.weight"), prefix)
        hidden = self._norm(hidden, "model.norm.weight")
        head = weight.get("lm_head.weight", weight["model.embed_tokens.weight"])
        return hidden @ head.T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.parameters[name]

    def _attention(self, x: torch.Tensor, prefix: str, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        config, weight = self.config, self.parameters
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

        def project(kind: str, heads: int) -> torch.Tensor:
            name = f"{prefix}self_attn.{kind}_proj"
            out = x @ weight[name + ".weight"].T + weight.get(name + ".bias", 0.0)
            return out.view(-1, heads, head_dim)

        q, k = project("q", config.num_attention_heads), project("k", config.num_key_value_heads)
        v = project("v", config.num_key_value_heads)
        if prefix + "self_attn.q_norm.weight" in weight:
            q, k = self._norm(q, prefix + "self_attn.q_norm.weight"), self._norm(k, prefix + "self_attn.k_norm.weight")
        q, k = (_rotate(t, *rotation) for t in (q, k))
        repeat = config.num_attention_heads // config.num_key_value_heads
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)
        return out.flatten(1) @ weight[prefix + "self_attn.o_proj.weight"].T

    def _mlp(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up, down = (self.parameters[f"{prefix}mlp.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def response_logits(model: DenseModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """[len(response), vocab]: the rows that predict the response tokens."""
    return model.logits([*prompt, *response[:-1]])[len(prompt) - 1 :]


def distill_loss(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, objective: Distill
) -> torch.Tensor:
    """Per-token losses from dense logits [tokens, vocab]; importance weights are not part of it."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if objective.estimator == "sampled":
        logp, logq = (t.gather(-1, targets[:, None])[:, 0] for t in (p, q))
        return -(logq - logp).detach() * logp
    if objective.direction == "reverse":
        return (p.exp() * (p - q)).sum(-1)
    if objective.direction == "forward":
        return (q.exp() * (q - p)).sum(-1)
    beta = objective.jsd_beta
    mixture = torch.logaddexp(q + torch.tensor(beta).log(), p + torch.tensor(1 - beta).log())
    return beta * (q.exp() * (q - mixture)).sum(-1) + (1 - beta) * (p.exp() * (p - mixture)).sum(-1)


def dense_step(
    directory: Path, rollouts, objective: Distill, teacher_directory: Path | None = None
) -> tuple[float, int, dict[str, torch.Tensor]]:
    """(loss sum, token count, gradient of sum / count by Hugging Face name) with the live teacher or another model.

    Of two vocabularies the ids that both have are compared.
    """
    model = DenseModel(directory)
    other = model if teacher_directory is None else DenseModel(teacher_directory)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        targets, mask = torch.tensor(rollout.token_ids), torch.tensor(rollout.loss_mask)
        with torch.no_grad():
            teacher = response_logits(other, rollout.pair.teacher_prompt, rollout.token_ids)
        student = response_logits(model, rollout.pair.student_prompt, rollout.token_ids)
        common = min(student.shape[1], teacher.shape[1])
        student, teacher = student[:, :common], teacher[:, :common]
        total = total + distill_loss(student, teacher, targets, objective)[mask].sum()
        count += int(mask.sum())
    (total / count).backward()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.parameters.items()}
    return total.item(), count, gradients
