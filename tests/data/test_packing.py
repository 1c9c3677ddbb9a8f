import random
from collections.abc import Sequence

import pytest

from opsd_megatron.data.balance import Group, Limits, place_evenly, place_tightly
from opsd_megatron.data.packing import Packing, filler_batch, measure_sharing, pack, response_table, sequence_of
from opsd_megatron.token_tree import NO_PARENT
from opsd_megatron.types import PromptPair, Rollout, TokenBatch, Turn, VersionSpan

VIEWS = ("student", "teacher")


def make_rollout(
    pair: PromptPair, sample: int, token_ids: Sequence[int], mask: Sequence[bool] | None = None
) -> Rollout:
    count = len(token_ids)
    return Rollout(
        pair=pair, sample=sample, token_ids=tuple(token_ids), logprobs=tuple(-0.5 - 0.25 * t for t in range(count)),
        logprob_kind="raw", loss_mask=tuple(mask or [True] * count), finish_reason="stop",
        version_spans=(VersionSpan("v0", 0, count),), turns=(Turn("model", 0, count),), server_id="s",
    )  # fmt: skip


def draw_rollouts(seed: int, contexts: int = 4, questions: int = 3, samples: int = 2) -> list[Rollout]:
    """Unequal contexts with several questions, 1 to 5 response tokens each, some responses equal, in random order."""
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(50, 90) for _ in range(rng.randint(low, high))]  # noqa: E731
    rollouts = []
    for context in range(contexts):
        long, short = [1, *draw(60, 200)], [1, *draw(3, 40)]
        for question in range(questions):
            asked = draw(2, 9)
            pair = PromptPair(f"{context}.{question}", tuple(long + asked), tuple(short + asked))
            rollouts += [make_rollout(pair, sample, draw(1, 5)) for sample in range(rng.randint(1, samples))]
    rng.shuffle(rollouts)
    return rollouts


def path_to(batch: TokenBatch, token: int) -> tuple[list[int], list[int]]:
    """Ids and positions that the token sees, itself last: its ancestors' nodes and its own node up to it."""
    tree = batch.tree
    node = next(i for i in range(len(tree.nodes)) if tree.offsets[i] <= token < tree.offsets[i + 1])
    seen = list(range(tree.offsets[node], token + 1))
    while (node := tree.nodes[node].parent) != NO_PARENT:
        seen = list(range(tree.offsets[node], tree.offsets[node + 1])) + seen
    positions = tree.position_ids()
    return [int(batch.token_ids[i]) for i in seen], [int(positions[i]) for i in seen]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("budget", [40, 300, 5000])
def test_every_row_sees_exactly_the_tokens_before_its_target(view, budget: int):
    for seed in range(4):
        rollouts = draw_rollouts(seed)
        table = response_table(rollouts)
        for batch in pack(rollouts, view, Limits(budget, 4)):
            for row, response in zip(batch.rows.tolist(), batch.response_index.tolist(), strict=True):
                rollout, at = rollouts[int(table.rollout[response])], int(table.position[response])
                prompt = rollout.pair.student_prompt if view == "student" else rollout.pair.teacher_prompt
                before = [*prompt, *rollout.token_ids[:at]]
                ids, positions = path_to(batch, row)
                assert ids == before
                assert positions == list(range(len(before)))
                assert int(table.token_ids[response]) == rollout.token_ids[at]


@pytest.mark.parametrize("budget", [40, 300, 5000])
def test_both_views_hold_every_response_token_exactly_once(budget: int):
    rollouts = draw_rollouts(1)
    everything = list(range(len(response_table(rollouts))))
    for view in VIEWS:
        batches = pack(rollouts, view, Limits(budget))
        assert sorted(index for batch in batches for index in batch.response_index.tolist()) == everything


def test_the_table_lists_tokens_weights_and_logprobs_in_the_order_of_the_rollouts():
    pair = PromptPair("r", (1, 2), (1, 3))
    table = response_table([make_rollout(pair, 0, [7, 8], [True, False]), make_rollout(pair, 1, [9])])
    assert table.token_ids.tolist() == [7, 8, 9]
    assert table.weights.tolist() == [1.0, 0.0, 1.0]
    assert table.behaviour_logprobs.tolist() == [-0.5, -0.75, -0.5]
    assert table.rollout.tolist() == [0, 0, 1]
    assert table.position.tolist() == [0, 1, 0]
    assert len(response_table([])) == 0


def test_three_questions_with_two_responses_compute_their_context_once():
    context = tuple(range(100, 180))
    rollouts = []
    for question in range(3):
        pair = PromptPair(f"q{question}", (*context, 200 + question, 210), (*context[:50], 200 + question, 210))
        rollouts += [make_rollout(pair, sample, [300 + 10 * question + sample, 2]) for sample in range(2)]
    (batch,) = pack(rollouts, "student", Limits(10_000, 32))
    roots = [node for node in batch.tree.nodes if node.parent == NO_PARENT]
    assert [node.length for node in roots] == [len(context)]
    ids = batch.token_ids.tolist()
    assert all(ids.count(token) == 1 for token in context)
    assert [len(pack(rollouts, view, Limits(10_000))) for view in VIEWS] == [1, 1]


def test_branches_of_one_prompt_are_predicted_by_one_row():
    pair = PromptPair("r", tuple(range(40)), tuple(range(40)))
    rollouts = [make_rollout(pair, sample, [60 + sample, 2]) for sample in range(3)]
    (batch,) = pack(rollouts, "student", Limits(1000))
    assert batch.rows.tolist().count(39) == 3


@pytest.mark.parametrize("view", VIEWS)
def test_no_microbatch_exceeds_its_budget_unless_it_is_one_long_rollout(view):
    for seed in range(6):
        rollouts = draw_rollouts(seed)
        table = response_table(rollouts)
        for batch in pack(rollouts, view, Limits(150, 4)):
            members = {int(table.rollout[index]) for index in batch.response_index.tolist()}
            longest = max(len(sequence_of(rollouts[member], view)) for member in members)
            assert batch.num_tokens <= 150 or (len(members) == 1 and longest == batch.num_tokens)


def test_packing_is_deterministic_and_keeps_a_context_together_where_it_fits():
    rollouts = draw_rollouts(3)
    table = response_table(rollouts)
    one, again = pack(rollouts, "student", Limits(260, 4)), pack(rollouts, "student", Limits(260, 4))
    assert [batch.token_ids.tolist() for batch in one] == [batch.token_ids.tolist() for batch in again]
    home: dict[str, set[int]] = {}
    for number, batch in enumerate(one):
        for index in batch.response_index.tolist():
            context = rollouts[int(table.rollout[index])].pair.record_id.split(".")[0]
            home.setdefault(context, set()).add(number)
    assert all(len(numbers) == 1 for numbers in home.values())


def test_a_common_system_prompt_does_not_make_one_group_of_all():
    system = tuple(range(1000, 1040))
    pairs = [PromptPair(str(n), (*system, *range(100 * n, 100 * n + 90)), (1, n)) for n in range(6)]
    rollouts = [make_rollout(pair, sample, [5, 2]) for pair in pairs for sample in range(2)]
    batches = pack(rollouts, "student", Limits(150, 32))
    assert [len(batch.response_index) for batch in batches] == [4] * 6


def test_chosen_rollouts_are_packed_with_indices_of_the_whole_table():
    rollouts = draw_rollouts(2)
    chosen = [5, 0, 3]
    table = response_table(rollouts)
    packing = Packing(rollouts, "teacher", Limits(200), chosen)
    indices = [i for batch in packing.microbatches(packing.needed) for i in batch.response_index.tolist()]
    assert {int(table.rollout[index]) for index in indices} == set(chosen)
    assert len(indices) == sum(len(rollouts[number].token_ids) for number in chosen)
    assert Packing(rollouts, "teacher", Limits(200), chosen=[]).microbatches(0) == []


def test_a_filler_batch_has_a_token_and_no_rows():
    batch = filler_batch()
    assert batch.token_ids.tolist() == [0]
    assert len(batch.rows) == len(batch.response_index) == 0
    assert batch.tree.num_tokens == 1


def test_the_sharing_report_counts_tokens_and_pairs():
    pair = PromptPair("r", tuple(range(100)), tuple(range(10)))
    rollouts = [make_rollout(pair, sample, [200 + sample, 201 + sample, 2]) for sample in range(4)]
    sharing = measure_sharing(rollouts, "student", pack(rollouts, "student", Limits(1000)))
    assert sharing.separate_tokens == 4 * 102
    assert sharing.packed_tokens == 100 + 4 * 2
    assert sharing.separate_pairs == 4 * 102 * 103 // 2
    assert sharing.packed_pairs == 100 * 101 // 2 + 4 * (101 + 102)
    assert "(3.78x fewer)" in str(sharing)


def test_more_microbatches_than_needed_share_the_work_before_there_are_fillers():
    rollouts = draw_rollouts(5, contexts=6)
    packing = Packing(rollouts, "student", Limits(600, 4, pair_cost=0.01))
    batches = packing.microbatches(8)
    assert packing.needed < 6 < len(batches) == 8
    assert [len(batch.rows) > 0 for batch in batches] == [True] * 6 + [False] * 2
    everything = list(range(len(response_table(rollouts))))
    assert sorted(index for batch in batches for index in batch.response_index.tolist()) == everything
    with pytest.raises(ValueError, match="microbatches where"):
        packing.microbatches(packing.needed - 1)


def test_microbatches_are_even_in_cost_and_keep_both_limits():
    draw = random.Random(0)
    for _ in range(50):
        limits = Limits(1000, pair_cost=0.002, cost=1600.0)
        lengths = [draw.randint(20, 900) for _ in range(draw.randint(1, 60))]
        groups = [Group((n,), tokens, tokens + 0.002 * tokens**2 / 2) for n, tokens in enumerate(lengths)]
        needed = len(place_tightly(groups, limits))
        assert all(
            len(own) == 1 or (sum(group.tokens for group in own) <= 1000 and sum(group.cost for group in own) <= 1600)
            for own in place_tightly(groups, limits)
        )
        bins = place_evenly(groups, limits, 2 * needed)
        assert bins is not None
        costs = [sum(group.cost for group in own) for own in bins]
        assert sorted(group.members for own in bins for group in own) == sorted(group.members for group in groups)
        dearest = max(group.cost for group in groups)
        assert max(costs) <= sum(costs) / len(bins) + dearest  # what this order of placing promises
        assert costs == sorted(costs, reverse=True)


def test_the_cost_of_a_group_is_counted_from_its_tree():
    pair = PromptPair("r", tuple(range(100)), tuple(range(10)))
    rollouts = [make_rollout(pair, sample, [200 + sample, 201 + sample, 2]) for sample in range(4)]
    (batch,) = pack(rollouts, "student", Limits(1000))
    pairs = batch.tree.attention_pairs()
    cost = batch.num_tokens + 0.5 * pairs
    assert Packing(rollouts, "student", Limits(1000, pair_cost=0.5, cost=cost)).needed == 1
    assert Packing(rollouts, "student", Limits(1000, pair_cost=0.5, cost=cost - 1)).needed > 1
