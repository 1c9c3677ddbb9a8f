"""What a step's heads computed of single tokens, brought together for people to look at."""

from collections.abc import Mapping

import torch
from torch import Tensor

from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object, sum_over


class TokenValues:
    """Filled microbatch by microbatch on the ranks whose heads take the tokens."""

    def __init__(self):
        self._parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    def add(self, responses: Tensor, values: Mapping[str, Tensor]) -> None:
        """`values` of the response tokens with these indices into the step's ResponseTable."""
        self._parts.append((responses, values))

    def whole(self, tokens: int, mesh: Mesh) -> dict[str, list[float]]:
        """One number per response token of this replica under each name, on all its ranks; collective over them."""
        columns: dict[str, list[float]] = {}
        if mesh.is_last_stage:
            names = sorted(self._parts[0][1])
            table = torch.zeros(len(names), tokens, dtype=torch.float64, device=mesh.device)
            for responses, values in self._parts:
                table[:, responses] = torch.stack([values[name].double() for name in names])
            columns = dict(zip(names, sum_over(table, mesh.cp).tolist(), strict=True))
        return broadcast_object(columns, mesh.pp, mesh.pp.size - 1)
