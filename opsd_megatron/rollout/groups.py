"""Which ranks of a transfer group belong to which server."""

from collections.abc import Sequence
from dataclasses import replace

from opsd_megatron.rollout.backend import TransferGroup


def divide_group(group: TransferGroup, world_sizes: Sequence[int]) -> list[TransferGroup]:
    """`group` as each of several servers must join it, given their numbers of ranks: rank 0 is the sender, then the
    servers' ranks follow in this order.

    ValueError where the sizes do not add up to the group's.
    """
    held = group.world_size - group.rank_offset
    if sum(world_sizes) != held or any(size < 1 for size in world_sizes):
        raise ValueError(f"servers of {list(world_sizes)} ranks cannot share a group with room for {held}")
    offsets = [group.rank_offset + sum(world_sizes[:number]) for number in range(len(world_sizes))]
    return [replace(group, rank_offset=offset) for offset in offsets]
