"""Trees of unequal sizes through Megatron's schedules: hidden states and gradients do not depend on the layout."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.checkpoint.model_weights import export_weights, load_weights
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model, full_hidden, head_weight
from opsd_megatron.models.forward import microbatch_multiple, run_schedule
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.mesh import build_mesh
from opsd_megatron.token_tree import Node, TokenTree
from opsd_megatron.types import TokenBatch
from tests.models.batches import layout_name, microbatches
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model

FAMILIES = (("qwen3", {}), ("qwen2", {"tie_word_embeddings": True}))
RESPONSES = sum(len(batch.rows) for batch in microbatches())


def train_microbatches(
    directory: Path, layout: ParallelConfig, dtype: torch.dtype, recompute="none"
) -> tuple[dict[int, Tensor], float, dict[str, Tensor]]:
    """Of this rank: its rows' hidden states by response token, its share of the loss, and all summed gradients."""
    # here, because a megatron module may only be imported after one of ours
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, dtype, recompute)
    load_weights(chunks, architecture, directory, mesh)
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=dtype == torch.bfloat16)
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, pg_collection=mesh.collection, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if mesh.vpp else wrapped[0].no_sync
    probe = torch.randn(RESPONSES, architecture.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    share = microbatches()[mesh.dp.rank :: mesh.dp.size]
    shards = [deal(batch, mesh.cp, multiple_of=mesh.tp.size) for batch in share]
    seen: dict[int, Tensor] = {}
    losses: list[Tensor] = []

    def loss_of(index: int, hidden: Tensor):
        rows, responses = hidden[shards[index].rows], shards[index].response_index
        seen.update(zip(responses.tolist(), rows.detach(), strict=True))
        loss = (rows * probe[responses]).pow(2).sum() + 0 * hidden.sum()
        losses.append(loss)
        return loss, len(responses), {"loss": loss, "responses": torch.tensor(len(responses))}

    metrics = run_schedule(wrapped, shards, mesh, loss_of, forward_only=False)
    assert [m["responses"] for m in metrics] == ([len(s.rows) for s in shards] if mesh.is_last_stage else [])
    for kept, loss in zip(metrics, losses, strict=True):  # schedules scale some losses in place
        assert kept["loss"].data_ptr() != loss.data_ptr()
    total = sum(float(m["loss"]) for m in metrics)
    gradients = dict(export_weights(wrapped, architecture, mesh, value_of=lambda parameter: parameter.main_grad))
    return seen, total, gradients if mesh.world.rank == 0 else {}


@cache
def reference(directory: Path) -> tuple[dict[int, Tensor], float, dict[str, Tensor]]:
    return run_on_ranks(1, train_microbatches, directory, ParallelConfig(), torch.float64)[0]


@pytest.fixture(scope="module", params=FAMILIES, ids=[family for family, _ in FAMILIES])
def directory(request, tmp_path_factory) -> Path:
    family, changes = request.param
    return write_tiny_model(tmp_path_factory.mktemp(family), family, **changes)


def assert_equals_reference(results: list, directory: Path, layout: ParallelConfig) -> None:
    hidden, loss, gradients = reference(directory)
    found: dict[int, Tensor] = {}
    for seen, _, _ in results:
        for response, row in seen.items():
            assert response not in found or torch.equal(found[response], row)  # tp ranks agree bitwise
            found[response] = row
    assert found.keys() == hidden.keys()
    assert max((found[key].double() - hidden[key]).abs().max().item() for key in hidden) <= 5e-6
    assert sum(part for _, part, _ in results) / layout.tp == pytest.approx(loss, rel=1e-6)
    largest = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        error = (results[0][2][name].double() - gradient).norm()
        assert error <= 1e-5 * max(gradient.norm(), 1e-3 * largest), name


LAYOUTS = {
    1: [ParallelConfig()],
    2: [
        ParallelConfig(tp=2),
        ParallelConfig(tp=2, sequence_parallel=True),
        ParallelConfig(pp=2),
        ParallelConfig(pp=2, vpp=2),
        ParallelConfig(cp=2),
        ParallelConfig(),
    ],
    4: [
        ParallelConfig(tp=2, pp=2, sequence_parallel=True),
        ParallelConfig(tp=2, cp=2, sequence_parallel=True),
        ParallelConfig(pp=2, vpp=2, cp=2),
        ParallelConfig(pp=2),
    ],
}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts],
    ids=layout_name,
)
def test_hidden_states_and_gradients_equal_one_rank_in_float64(directory, world_size, layout):
    results = run_on_ranks(world_size, train_microbatches, directory, layout, torch.float32)
    assert_equals_reference(results, directory, layout)


def test_bfloat16_keeps_the_hidden_states_and_the_global_gradient_norm(directory):
    hidden, _, gradients = reference(directory)
    layout = ParallelConfig(tp=2, pp=2, sequence_parallel=True)
    results = run_on_ranks(4, train_microbatches, directory, layout, torch.bfloat16)
    found = {response: row for seen, _, _ in results for response, row in seen.items()}
    assert all(row.dtype == torch.bfloat16 for row in found.values())
    errors = torch.cat([(found[key].double() - hidden[key]).abs() for key in hidden])
    assert errors.mean() <= 0.02 and errors.max() <= 0.2  # final norms have entries of about 1
    ours, exact = (
        torch.cat([g.double().flatten() for g in all_.values()]).norm() for all_ in (results[0][2], gradients)
    )
    assert ours.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize("recompute", ["norms", "mlp", "mlp+norms", "full"])
def test_recomputed_activations_change_nothing(directory, recompute):
    layout = ParallelConfig(cp=2)
    plain = run_on_ranks(2, train_microbatches, directory, layout, torch.float32)
    again = run_on_ranks(2, train_microbatches, directory, layout, torch.float32, recompute)
    assert all(torch.equal(plain[0][2][name], gradient) for name, gradient in again[0][2].items())


def bytes_kept_by_forward(directory: Path, recompute) -> int:
    """What is still allocated after a forward pass through 4 layers of width 64."""
    mesh = build_mesh(ParallelConfig())
    (model,) = build_model(read_architecture(directory), mesh, torch.float32, recompute)
    shard = deal(microbatches()[1], mesh.cp)
    shard.calls  # noqa: B018  # planned once, not part of a pass
    with torch.profiler.profile(profile_memory=True) as profile:
        output = model(shard)
    assert output.requires_grad
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(("plain", "with_norms"), [("none", "norms"), ("mlp", "mlp+norms")])
def test_recomputed_norms_keep_only_their_input(directory, plain, with_norms):
    kept, less = (run_on_ranks(1, bytes_kept_by_forward, directory, how)[0] for how in (plain, with_norms))
    tokens = deal(microbatches()[1], Axis.single("cp")).local_tokens
    assert kept - less >= 2 * 2 * 4 * tokens * 64 * 4  # two norms x (output, scaled input) of each of four layers


def hidden_in_one_pass_each(directory: Path, layout: ParallelConfig) -> list[bool]:
    """Whether forward-only passes collect what training saw, in order, without gradient, only on the last stage."""
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32)
    load_weights(chunks, architecture, directory, mesh)
    shards = [deal(batch, mesh.cp, multiple_of=mesh.tp.size) for batch in microbatches()]
    collected = run_schedule(chunks, shards, mesh, lambda index, hidden: (index, hidden), forward_only=True)
    if not mesh.is_last_stage:
        return [collected == []]
    return [
        [index for index, _ in collected] == [0, 1, 2, 3],
        all(hidden.shape == (shards[index].local_tokens, 64) for index, hidden in collected),
        not any(hidden.requires_grad for _, hidden in collected),
        head_weight(chunks[-1]).shape == (125 * 2 // layout.tp, 64),
    ]


@pytest.mark.parametrize(
    "layout", [ParallelConfig(pp=2, vpp=2), ParallelConfig(tp=2, sequence_parallel=True)], ids=layout_name
)
def test_a_forward_only_pass_collects_in_order_on_the_last_stage(layout, directory):
    for claims in run_on_ranks(2, hidden_in_one_pass_each, directory, layout):
        assert all(claims), claims


def reported_loss_and_gradient_of_gather(directory: Path) -> tuple[float, float, Tensor]:
    mesh = build_mesh(ParallelConfig(tp=2, sequence_parallel=True))
    half = torch.arange(4.0).reshape(2, 1, 2) + 4 * mesh.tp.rank
    half.requires_grad_()
    whole = full_hidden(half, mesh)
    (whole * torch.arange(8.0).reshape(4, 2)).sum().backward()
    assert half.grad is not None
    return whole.sum().item(), whole[2, 1].item(), half.grad


def test_gathered_hidden_states_give_each_rank_the_gradient_of_its_own_tokens(directory):
    for rank, (total, last, gradient) in enumerate(run_on_ranks(2, reported_loss_and_gradient_of_gather, directory)):
        assert (total, last) == (28, 5)
        assert torch.equal(gradient, torch.arange(4.0).reshape(2, 1, 2) + 4 * rank)  # once, not once per tp rank


def refused_counts(directory: Path) -> tuple[int, list[str]]:
    mesh = build_mesh(ParallelConfig(pp=2, vpp=2))
    chunks = build_model(read_architecture(directory), mesh, torch.float32)
    shards = [deal(batch, mesh.cp) for batch in microbatches()]
    messages = []
    for count in (0, 3):
        with pytest.raises(ValueError) as caught:
            run_schedule(chunks, shards[:count], mesh, lambda _, hidden: hidden, forward_only=True)
        messages.append(str(caught.value))
    return microbatch_multiple(mesh), messages


def refused_length(directory: Path) -> str:
    mesh = build_mesh(ParallelConfig(tp=2, sequence_parallel=True))
    chunks = build_model(read_architecture(directory), mesh, torch.float32)
    shards = [deal(batch, mesh.cp) for batch in microbatches()]
    with pytest.raises(ValueError) as caught:
        run_schedule(chunks, shards, mesh, lambda _, hidden: hidden, forward_only=True)
    return str(caught.value)


def test_a_length_that_tp_cannot_cut_is_refused(directory):
    lengths = [deal(batch, Axis.single("cp")).local_tokens for batch in microbatches()]
    odd = next(length for length in lengths if length % 2)
    for message in run_on_ranks(2, refused_length, directory):
        assert message.startswith(f"{odd} local tokens cannot be cut over tp=2") and "multiple_of=2" in message


def test_microbatches_that_the_interleaved_schedule_cannot_take_are_refused(directory):
    for multiple, messages in run_on_ranks(2, refused_counts, directory):
        assert multiple == 2
        for count, message in zip((0, 3), messages, strict=True):
            assert message.startswith(f"{count} microbatches; expected a positive multiple of 2 (pp=2, vpp=2)")


def test_transformer_engine_is_asked_for_by_name_where_it_is_missing(tmp_path):
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("it is here")
    architecture = read_architecture(write_tiny_model(tmp_path, "qwen3"))
    with pytest.raises(ConfigError, match=r"pip install .*\[te\]"):
        build_model(architecture, build_mesh(ParallelConfig()), torch.float32, attention="te")


def hidden_of_one_sequence(directory: Path, attention: str) -> tuple[Tensor, Tensor]:
    """Final hidden states, and the gradient of the first layer's queries, keys and values."""
    mesh = build_mesh(ParallelConfig())
    architecture = read_architecture(directory)
    (model,) = build_model(architecture, mesh, torch.bfloat16, attention=attention)
    load_weights([model], architecture, directory, mesh)
    empty = torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(TokenTree((Node(-1, 512, 0),)), torch.arange(512) % 250, empty, empty)
    hidden = model(deal(batch, mesh.cp).to(mesh.device))
    hidden.float().square().sum().backward()
    gradient = model.decoder.layers[0].self_attention.linear_qkv.weight.grad
    return hidden.detach().float().cpu(), gradient.float().cpu()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device and Transformer Engine",
)
def test_transformer_engines_attention_gives_what_the_ring_gives(tmp_path):
    directory = write_tiny_model(tmp_path, "qwen3", max_position_embeddings=1024, head_dim=64)
    for ours, theirs in zip(*(hidden_of_one_sequence(directory, name) for name in ("ring", "te")), strict=True):
        assert (ours - theirs).norm() <= 2e-2 * ours.norm()
