"""The fast engine's prefix cache: blocks of keys and values that several requests read, and that no swap survives.

Sharing itself is transformers' (checked against 5.23): it knows a block by a hash of its tokens and of all before them.
Added here:
  - requests that would compute the same block in the same batch do not: one does, the others wait for it;
  - caches of different salts are apart: a salt changes the tokens that are hashed, not those that are computed;
  - everything can be forgotten at once, with the requests in flight computing their keys again;
  - counts of what was looked for, found, computed and evicted.
"""

from array import array
from collections import Counter, deque
from hashlib import blake2b
from itertools import takewhile

from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching import scheduler as scheduling
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

NAME = "fifo_shared_prefixes"
SALT_MARK = "~"
CHILD = "__child#"


def register() -> None:
    """Makes the scheduler selectable as `NAME`; RuntimeError where transformers has moved what it builds on."""
    for ours, names in OVERRIDDEN.items():
        base = ours.__mro__[1]
        gone = [name for name in names if not hasattr(base, name)]
        if gone:
            raise RuntimeError(
                f"this version of transformers has no {base.__name__}.{gone[0]}, on which the prefix cache builds "
                "(transformers 5.23 has); install that version or start with --engine exact"
            )
    scheduling.SCHEDULER_MAPPING[NAME] = PrefixScheduler
    paged.ATTN_TYPE_TO_ALLOCATOR[paged.FULL_ATTENTION] = SaltedAllocator


def salt_suffix(salt: str | None) -> str:
    """What, at the end of a request's name, keeps its blocks apart from those of other salts."""
    return SALT_MARK + blake2b(salt.encode(), digest_size=16).hexdigest() if salt else ""


class CountingLedger(cache_allocator.BlockLedger):
    evicted_blocks = 0

    def evict_cached_blocks(self) -> list[int]:
        blocks = super().evict_cached_blocks()
        self.evicted_blocks += len(blocks)
        return blocks


class SaltedAllocator(paged.FullAttentionCacheAllocator):
    """Knows blocks by their tokens and by the salt in the name of the request that computed them."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.ledger = CountingLedger()
        self.wanted: list[int] = []
        """Hashes of the blocks of the request that is looked up next."""

    def match_prefix_blocks(self, prompt_ids: list[int]) -> list[int]:
        blocks = map(self.ledger.hash_to_block.get, self.wanted)
        return list(takewhile(lambda block: block is not None, blocks))  # type: ignore[arg-type]

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        super().mark_complete_blocks(request_id, _salted(request_id, token_ids), new_new_blocks)


class PrefixScheduler(scheduling.FIFOScheduler):
    """First come, first served, but no block is computed by two requests of one batch."""

    def __init__(self, cache: paged.PagedAttentionCache, safety_margin: float | None, max_requests_per_batch: int):
        super().__init__(cache, safety_margin, max_requests_per_batch)
        (allocator,) = cache.cache_allocators.values()
        if not isinstance(allocator, SaltedAllocator) or not cache.use_prefix_sharing:
            raise RuntimeError(
                f"transformers built its cache with {type(allocator).__name__}; start with --engine exact"
            )
        self.allocator = allocator
        self.counts: Counter[str] = Counter()
        self.cached_tokens: dict[str, int] = {}
        """Of each request that has not been delivered, the prompt tokens that it did not need to compute."""
        self._hashes: dict[str, list[int]] = {}

    @property
    def usage(self) -> float:
        """Share of the cache that requests hold; what is only kept for later ones counts as free."""
        kept = len(self.allocator.ledger.cached_blocks) / self.allocator.num_blocks
        return max(0.0, 1.0 - self.cache.compute_free_capacity() - kept)

    def add_waiting_request(self, state: RequestState) -> None:
        self.counts["queried_tokens"] += len(state.initial_tokens)
        self.counts["preemptions"] += bool(state._true_initial_tokens)  # it comes back with what it had
        super().add_waiting_request(state)

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        batch = super().schedule_batch(token_budget, cache_budget)
        for future in batch[0] or ():
            prompt_left = len(future.state.initial_tokens) - future.state.position_offset
            self.counts["prefilled_tokens"] += min(future.query_length, max(prompt_left, 0))
        return batch

    def finish_request(self, request_id: str) -> None:
        super().finish_request(request_id)
        self._hashes.pop(request_id, None)

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            self._hashes.pop(state.request_id, None)
            self.cached_tokens.pop(state.request_id, None)
        if cancelled:
            self.block_new_requests = False  # only a request that finishes would lift it, and none may be left
        return cancelled

    def restart_all(self) -> None:
        """Forgets every block. Requests that had some go first in the queue and keep the tokens that they have."""
        active = list(self.active_requests.values())
        restarted = [state.create_equivalent_initial_request() for state in active]
        for state in active:
            self.finish_request(state.request_id)
        order = [*(state.request_id for state in restarted), *self.waiting_requests_order]
        self.waiting_requests.update({state.request_id: state for state in restarted})
        self.waiting_requests_order = deque(order)
        self.block_new_requests, self.starved_requests = False, []
        self.cache.evict_cached_blocks()
        self.cache.pool.try_to_free_sectors()
        ledger = self.allocator.ledger
        if ledger.hash_to_block or ledger.block_to_hash or self.allocator.block_table or self.usage:
            raise RuntimeError("blocks of the cache outlived their requests; keys of older weights could be read")

    def _get_waiting_candidates(self) -> list[RequestState]:
        """Not those whose next block another request is about to compute; as many as one batch can hold."""
        being_computed: set[int] = set()
        for state in self.active_requests.values():
            if state.status == RequestStatus.PREFILLING:
                being_computed.update(self._missing(state))
        candidates, tokens = [], 0
        for state in super()._get_waiting_candidates():
            missing = self._missing(state)
            if missing and missing[0] in being_computed:
                continue
            being_computed.update(missing)
            candidates.append(state)
            tokens += 1 + len(missing) * self.allocator.tokens_per_page
            if tokens > self.cache.max_batch_tokens:
                break
        return candidates

    def _infer_request_tokens(self, state: RequestState, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        computed = state.position_offset
        if state.status == RequestStatus.PENDING:
            self.allocator.wanted = self._block_hashes(state)
        tokens = super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)
        found = state.position_offset - computed
        if found:
            self.counts["found_tokens"] += found
            if not state._true_initial_tokens:  # what a restarted request finds is not news of its prompt
                self.cached_tokens[state.request_id] = found
        return tokens

    def _missing(self, state: RequestState) -> list[int]:
        hashes, known = self._block_hashes(state), self.allocator.ledger.hash_to_block
        first = next((number for number, block in enumerate(hashes) if block not in known), len(hashes))
        return hashes[first:]

    def _block_hashes(self, state: RequestState) -> list[int]:
        """Of the blocks that the request may share. The last token is always computed, and so, for a request that will
        be forked, is the one before it: the fork happens after a forward pass."""
        if state.request_id not in self._hashes:
            size, parent, hashes = self.allocator.tokens_per_page, None, []
            tokens = _salted(state.request_id, state.initial_tokens)
            for start in range(0, len(tokens) - size - (state.num_children > 0), size):
                parent = cache_allocator.compute_block_hash(parent, tokens[start : start + size])
                hashes.append(parent)
            self._hashes[state.request_id] = hashes
        return self._hashes[state.request_id]


OVERRIDDEN = {
    CountingLedger: ("evict_cached_blocks",),
    SaltedAllocator: ("match_prefix_blocks", "mark_complete_blocks"),
    PrefixScheduler: (
        "add_waiting_request", "schedule_batch", "finish_request", "clear_cancelled_requests",
        "_get_waiting_candidates", "_infer_request_tokens",
    ),
}  # fmt: skip
"""What transformers calls, and what would be silently left out if it called something else."""


def _salted(request_id: str, token_ids: list[int]) -> list[int]:
    """`token_ids` with other, negative numbers for the first four: one to one for each salt."""
    salt = request_id.partition(SALT_MARK)[2].partition(CHILD)[0]
    if not salt:
        return token_ids
    keys = array("I", bytes.fromhex(salt))
    return [~(token ^ (key >> 1)) for token, key in zip(token_ids[:4], keys, strict=False)] + token_ids[4:]
