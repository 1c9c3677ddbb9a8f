"""Which server gets which request: those that share a context go to one, the rest where the least is outstanding."""

from collections.abc import Collection, Sequence

from opsd_megatron.rollout.backend import GenerateRequest
from opsd_megatron.rollout.pool.member import Member

MIN_SHARED = 16
"""Tokens that two prompts must share to be sent to one server, besides half of the shorter one."""
SPILL = 2.0
"""A request leaves its home when that would hold so many times the tokens that another server would hold with it."""


class Router:
    """Remembers, for each group of prompts, the server that has their common tokens in its cache."""

    def __init__(self, requests: Sequence[GenerateRequest]):
        self._group, self._shared = group_by_prefix([request.token_ids for request in requests])
        self._homes: dict[int, Member] = {}

    def choose(self, number: int, tokens: int, ready: Sequence[Member], avoid: Collection[Member]) -> Member | None:
        """The server that should take request `number`, of `tokens` prompt and response tokens; None: wait for room."""
        members = [member for member in ready if member not in avoid] or list(ready)
        if not members:
            return None
        least = min(members, key=lambda member: member.outstanding_tokens)
        group = self._group[number]
        home = self._homes.get(group)
        if home in members:
            here = home.outstanding_tokens + self.cost(number, tokens, home)
            if here <= SPILL * (least.outstanding_tokens + tokens):
                return home if home.has_room(tokens) else None
        else:
            self._homes[group] = least
        return least if least.has_room(tokens) else None

    def cost(self, number: int, tokens: int, member: Member) -> int:
        """Tokens that this request adds there: at home, what it shares is in the cache and counted already."""
        is_follower = self._homes.get(self._group[number]) is member and member.running > 0
        return tokens - self._shared[number] if is_follower else tokens


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


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    reached = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        reached += 1
    return reached
