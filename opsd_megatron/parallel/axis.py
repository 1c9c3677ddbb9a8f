"""One axis of the mesh as an argument: a process group with this rank's place in it."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """tp, pp, cp or dp; `group` is None where the axis has one rank and no communication is needed."""

    name: str
    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """Global ranks of the members, in axis order."""

    @classmethod
    def of_group(cls, name: str, group: dist.ProcessGroup) -> "Axis":
        ranks = tuple(dist.get_process_group_ranks(group))
        return cls(name, dist.get_rank(group), len(ranks), group, ranks)

    @classmethod
    def single(cls, name: str) -> "Axis":
        """An axis of one rank: the layout of a teacher pass in which every cp rank scores other samples."""
        return cls(name, 0, 1, None, (dist.get_rank() if dist.is_initialized() else 0,))

    @property
    def next_rank(self) -> int:
        """Global rank after this one on the ring."""
        return self.ranks[(self.rank + 1) % self.size]

    @property
    def previous_rank(self) -> int:
        return self.ranks[(self.rank - 1) % self.size]
