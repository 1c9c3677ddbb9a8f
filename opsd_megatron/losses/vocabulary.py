"""The vocabulary cut over tp, and how a token is found in it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opsd_megatron.parallel.axis import Axis


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, start + width) of the vocabulary on this tp rank, padding left out; width may be 0."""

    start: int
    width: int
    vocab_size: int
    """Real tokens of all ranks."""
    tp: Axis

    @classmethod
    def of(cls, held: int, vocab_size: int, tp: Axis) -> "VocabShard":
        """Of a rank that holds `held` rows of the LM head, when the first `vocab_size` of all are real.

        Raises ValueError when the ranks together hold fewer than `vocab_size`.
        """
        if held * tp.size < vocab_size:
            raise ValueError(
                f"the LM head holds {held} rows on each of {tp.size} tp ranks, fewer than vocab_size {vocab_size}; "
                f"give this rank's shard of the head and the vocabulary size of the same model"
            )
        start = tp.rank * held
        return cls(start, max(0, min(held, vocab_size - start)), vocab_size, tp)

    def find(self, tokens: Int[Tensor, "*shape"]) -> tuple[Int[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
        """Each token's column on this rank, and whether it is there; where not, the column is some other valid one."""
        column = tokens - self.start
        return column.clamp(0, max(self.width - 1, 0)), (column >= 0) & (column < self.width)

    def pick(
        self, values: Float[Tensor, "rows vocab_shard"], tokens: Int[Tensor, "rows chosen"]
    ) -> Float[Tensor, "rows chosen"]:
        """The values in each row's columns of `tokens`, 0 where another tp rank has the column: sum over tp."""
        if not self.width:
            return values.new_zeros(tokens.shape)
        column, here = self.find(tokens)
        return torch.where(here, values.gather(1, column), 0)

    def add_(
        self,
        values: Float[Tensor, "rows vocab_shard"],
        tokens: Int[Tensor, "rows chosen"],
        summands: Float[Tensor, "rows chosen"],
    ) -> None:
        """Adds to each row's columns of `tokens` where this rank has them."""
        if self.width:
            column, here = self.find(tokens)
            values.scatter_add_(1, column, torch.where(here, summands, 0))
