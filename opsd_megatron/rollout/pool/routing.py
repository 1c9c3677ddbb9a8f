"""Which server gets which request: those that share a context go to one, the rest where the least is outstanding."""

from collections.abc import Collection, Sequence

from opsd_megatron.rollout.backend import GenerateRequest
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.token_tree import common_prefix

MIN_SHARED = 16
"""Tokens that two prompts must share to be sent to one server, besides half of the shorter one."""
SPILL = 2.0
"""A request leaves its home when that would hold so many times the tokens that another server would hold with it."""


class Router:
    """Remembers, for each group of prompts, the servers that have their common tokens in their cache: its homes."""

    def __init__(self, requests: Sequence[GenerateRequest]):
        self._group, self._shared = group_by_prefix([request.token_ids for request in requests])
        self._homes: dict[int, set[Member]] = {}

    def choose(
        self, number: int, tokens: int, ready: Sequence[Member], avoid: Collection[Member]
    ) -> tuple[Member, int] | None:
        """(server for request `number` of `tokens` prompt and response tokens, tokens that it adds there).

        None: wait, no server has room, or the right one will. At home only the tokens that are not shared are added.
        `avoid` are servers that failed this request; they are taken when there is no other.
        """
        members = [member for member in ready if member not in avoid] or list(ready)
        if not members:
            return None
        homes = self._homes.setdefault(self._group[number], set())
        least = _least_busy(members)
        chosen, cost = least, tokens
        if homes & set(members):
            home = _least_busy([member for member in members if member in homes])
            added = tokens - self._shared[number]
            if least in homes or home.outstanding_tokens + added <= SPILL * (least.outstanding_tokens + tokens):
                chosen, cost = home, added
        if not chosen.has_room(cost):
            return None
        homes.add(chosen)
        return chosen, cost


def _least_busy(members: Sequence[Member]) -> Member:
    return min(members, key=lambda member: member.outstanding_tokens)


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """For each prompt the number of its group, and how many leading tokens it shares with a neighbour in it."""
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    groups, shared = [0] * len(prompts), [0] * len(prompts)
    for rank, number in enumerate(order):
        groups[number] = rank
        if rank == 0:
            continue
        before = order[rank - 1]
        common = common_prefix(prompts[before], prompts[number])
        if common >= max(MIN_SHARED, min(len(prompts[before]), len(prompts[number])) / 2):
            groups[number] = groups[before]
            shared[before], shared[number] = max(shared[before], common), common
    return groups, shared
