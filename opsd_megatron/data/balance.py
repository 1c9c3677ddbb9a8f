"""Groups of sequences put into microbatches: as few as the limits allow, then of even cost."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one microbatch may hold."""

    tokens: int
    """Tokens; shared ones count once."""
    min_shared_tokens: int = 32
    """Shortest common prefix that is worth a tree node of its own."""
    pair_cost: float = 0.0
    """Cost of one attention pair (query, key), in tokens: its FLOPs over those of a token's matrix products."""
    cost: float | None = None
    """Cost in tokens, attention included; None: only `tokens` limits."""


@dataclass(frozen=True)
class Group:
    """Sequences that share a context and stay together."""

    members: tuple[int, ...]
    tokens: int
    cost: float
    """tokens + pair_cost * attention pairs of their tree."""

    def fits(self, limits: Limits, tokens: int = 0, cost: float = 0.0) -> bool:
        """Whether there is room for the group beside `tokens` of `cost`."""
        within = limits.cost is None or cost + self.cost <= limits.cost
        return within and tokens + self.tokens <= limits.tokens


def place_tightly(groups: Sequence[Group], limits: Limits) -> list[list[Group]]:
    """First-fit, largest group first. Other contexts share nothing worth counting: tokens and costs add up."""
    bins: list[list[Group]] = []
    for group in sorted(groups, key=lambda group: (-group.tokens, group.members)):
        fitting = (own for own in bins if group.fits(limits, *_load(own)))
        place = next(fitting, None)
        if place is None:
            bins.append([group])
        else:
            place.append(group)
    return bins


def place_evenly(groups: Sequence[Group], limits: Limits, count: int) -> list[list[Group]] | None:
    """`count` bins of even cost, dearest first: each group, the dearest first, goes to the cheapest bin with room.

    A group too large for the limits has a bin to itself. None where this order leaves a group without a place.
    """
    bins: list[list[Group]] = [[] for _ in range(count)]
    for group in sorted(groups, key=lambda group: (-group.cost, group.members)):
        open_bins = [own for own in bins if not own or group.fits(limits, *_load(own))]
        if not open_bins:
            return None
        min(open_bins, key=lambda own: _load(own)[1]).append(group)
    return sorted(bins, key=lambda own: -_load(own)[1])


def _load(groups: Sequence[Group]) -> tuple[int, float]:
    return sum(group.tokens for group in groups), sum((group.cost for group in groups), 0.0)
