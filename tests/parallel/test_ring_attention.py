import pytest
import torch
import torch.distributed as dist

from opsd_megatron.parallel import ring_attention as ring
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.traffic import count_traffic
from tests.parallel.forests import SHAPES, batch_of, dense_attention, forest, random_forest, random_inputs, visible
from tests.ranks import run_on_ranks

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 8, 0.31
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def whole_axis() -> Axis:
    return Axis.of_group("cp", dist.group.WORLD)


def local_tensors(shard, tensors, dtype, pad_with=1.0):
    """This rank's part of whole-tree tensors; padding tokens hold something, so that a leak shows."""
    index = shard.token_ids - 100  # forests.batch_of numbers its tokens
    local = [torch.where((index >= 0)[:, None, None], tensor[index.clamp(min=0)], pad_with) for tensor in tensors]
    return index, [tensor.to(dtype) for tensor in local]


def ring_result(name, dtype, multiple_of, strided=False):
    """(token index, output, three gradients) of this rank."""
    return ring_over(forest(name), dtype, multiple_of, strided)


def ring_over(tree, dtype, multiple_of, strided=False):
    shard = deal(batch_of(tree), whole_axis(), multiple_of)
    index, local = local_tensors(shard, random_inputs(tree, HEADS, KV_HEADS, HEAD_DIM), dtype)
    if strided:
        local = [tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1) for tensor in local]
    query, key, value = (tensor.requires_grad_() for tensor in local[:3])
    out = ring.ring_attention(query, key, value, shard, SCALE)
    out.backward(local[3])
    return index, out.detach(), query.grad, key.grad, value.grad


def dense_result(tree):
    query, key, value, grad = random_inputs(tree, HEADS, KV_HEADS, HEAD_DIM)
    query, key, value = (tensor.requires_grad_() for tensor in (query, key, value))
    out = dense_attention(query, key, value, visible(tree), SCALE)
    out.backward(grad)
    return out.detach(), query.grad, key.grad, value.grad


def worst_errors(name, results):
    """Largest error of output and gradients over all tokens, and that every token came back exactly once."""
    expected = dense_result(forest(name))
    found = torch.cat([result[0] for result in results])
    assert sorted(found[found >= 0].tolist()) == list(range(forest(name).num_tokens))
    errors = []
    for part, reference in enumerate(expected, start=1):
        ours = torch.cat([result[part] for result in results]).double()
        assert (ours[found < 0] == 0).all(), "padding must have output 0 and gradient 0"
        error = (ours[found >= 0] - reference[found[found >= 0]]).abs().max() / reference.abs().max()
        errors.append(error.item())
    return errors


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ring_equals_dense_attention_in_float64(world_size, name):
    results = run_on_ranks(world_size, ring_result, name, torch.float64, 1)
    assert max(worst_errors(name, results)) <= TOLERANCE[torch.float64]


def errors_over_random_trees(count):
    """Largest error of this rank's output and gradients for each of many forests, and how many nodes each has."""
    errors, sizes = [], []
    for seed in range(count):
        tree = random_forest(seed)
        index, *ours = ring_over(tree, torch.float64, 1 + seed % 3)
        held = index >= 0
        differences = [
            (found[held] - reference[index[held]]).abs().max().item() if held.any() else 0.0
            for found, reference in zip(ours, dense_result(tree), strict=True)
        ]
        errors.append(max(differences))
        sizes.append(len(tree.nodes))
    return errors, sizes


@pytest.mark.parametrize("world_size", [1, 2])
def test_ring_equals_dense_attention_over_200_random_forests(world_size):
    for errors, sizes in run_on_ranks(world_size, errors_over_random_trees, 200):
        assert len(errors) == 200 and len(set(sizes)) > 10
        assert max(errors) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["three_questions_two_responses", "unequal_trees", "long_branches"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ring_equals_dense_attention_within_the_precision_of_its_inputs(world_size, name, dtype):
    results = run_on_ranks(world_size, ring_result, name, dtype, 1)
    assert max(worst_errors(name, results)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_padding_and_strides_change_nothing(world_size):
    results = run_on_ranks(world_size, ring_result, "unequal_trees", torch.float64, 32, True)
    assert all(len(result[0]) % 32 == 0 for result in results)
    assert max(worst_errors("unequal_trees", results)) <= TOLERANCE[torch.float64]


def gradient_of_a_sum():
    """An output gradient that is one number, expanded: strides of 0."""
    tree = forest("long_branches")
    shard = deal(batch_of(tree), whole_axis())
    _, (query, key, value, _) = local_tensors(shard, random_inputs(tree, HEADS, KV_HEADS, HEAD_DIM), torch.float64)
    value.requires_grad_()
    ring.ring_attention(query, key, value, shard, SCALE).sum().backward()
    return value.grad.sum().item()


def test_expanded_output_gradients_are_accepted():
    total = sum(run_on_ranks(2, gradient_of_a_sum))
    # every query's probabilities sum to 1, so the value gradients of a plain sum add up to one per output number
    assert total == pytest.approx(forest("long_branches").num_tokens * HEADS * HEAD_DIM, rel=1e-12)


def traffic_of_one_pass(dtype):
    tree = forest("unequal_trees")
    axis = whole_axis()
    shard = deal(batch_of(tree), axis)
    _, local = local_tensors(shard, random_inputs(tree, HEADS, KV_HEADS, HEAD_DIM), dtype)
    query, key, value = (tensor.requires_grad_() for tensor in local[:3])
    with count_traffic({"ring": axis.group}) as forward:
        out = ring.ring_attention(query, key, value, shard, SCALE)
    with count_traffic({"ring": axis.group}) as backward:
        out.backward(local[3])
    return shard.local_tokens, forward["ring"], backward["ring"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ring_bytes_equal_the_formula(world_size, dtype):
    for local_tokens, forward, backward in run_on_ranks(world_size, traffic_of_one_pass, dtype):
        numbers = local_tokens * KV_HEADS * HEAD_DIM
        hops, element = world_size - 1, torch.tensor([], dtype=dtype).element_size()
        assert forward == 2 * hops * numbers * element
        assert backward == 2 * hops * numbers * element + 2 * hops * numbers * 4


def with_broken(part: str, name):
    """The ring with one of its steps left out."""
    saved = ring._merge, ring._pass_on

    def pass_on(message, axis, tag):
        transfer = saved[1](message, axis, tag)
        if part == "gradient return" and tag == ring._GRADIENT_TAG:
            for gradient in transfer.wait():
                gradient.zero_()
            transfer.works.clear()
        return transfer

    if part == "log-sum-exp merge":
        ring._merge = lambda out, lse, part_out, part_lse: out.add_(part_out)
    ring._pass_on = pass_on
    try:
        return ring_result(name, torch.float64, 1)
    finally:
        ring._merge, ring._pass_on = saved


@pytest.mark.parametrize("part", ["log-sum-exp merge", "gradient return"])
def test_a_ring_without_one_of_its_steps_is_caught(part):
    errors = worst_errors("unequal_trees", run_on_ranks(2, with_broken, part, "unequal_trees"))
    assert max(errors) > 1e-2


def test_a_shard_of_another_length_is_refused():
    tree = forest("one_sequence")
    shard = deal(batch_of(tree), Axis.single("cp"))
    query, key, value, _ = random_inputs(forest("long_branches"), HEADS, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="64 local tokens"):
        ring.ring_attention(query, key, value, shard, SCALE)
