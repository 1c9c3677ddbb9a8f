"""Buffers of the LM head and the divergence: `losses/chunked.py`, tensor by tensor."""

from opsd_megatron.config import Distill, SelfSft
from opsd_megatron.launch.plan.activations import SINGLE, Tensors, Widths
from opsd_megatron.losses.chunked import BLOCK_ELEMENTS, PART_ELEMENTS, pieces

_EAGER_TENSORS = 8
"""As large as the logits of a block and alive at once when `losses/block.py` is not compiled."""


def head_bytes(objective: Distill | SelfSft, rows: int, w: Widths) -> Tensors:
    """At the last chunk of `rows` response rows on one rank; the head's gradient is made in `main_grad`."""
    block_elements = BLOCK_ELEMENTS["cuda" if w.is_cuda else "cpu"]
    most_part, most_block = (max(1, elements // w.vocab) for elements in (PART_ELEMENTS, block_elements))
    chunk = _largest_piece(rows, objective.chunk_tokens)
    part = _largest_piece(chunk, most_part)
    block = _largest_piece(part, most_block)
    is_distillation = isinstance(objective, Distill)
    is_compiled = objective.is_compiled(w.is_cuda) if is_distillation else w.is_cuda
    stored = 0 if is_compiled else _EAGER_TENSORS
    buffers = {
        "rows of the student": rows * w.hidden * w.value,
        "gradient of the rows": rows * w.hidden * SINGLE,
        "gradient of a chunk's logits": chunk * w.vocab * w.value,
        "logits of the teacher": is_distillation * part * w.vocab * SINGLE,
        "logits on the way": stored * block * w.vocab * SINGLE,
    }
    if w.value != SINGLE:
        buffers["logits of the student"] = part * w.vocab * SINGLE
    if w.value != SINGLE and not w.is_cuda:  # a CPU multiplies bfloat16 into float32 by way of a copy
        buffers["gradient of a chunk's logits in float32"] = chunk * w.vocab * SINGLE
    return buffers


def _largest_piece(rows: int, most: int) -> int:
    return max((one.stop - one.start for one in pieces(slice(0, rows), most)), default=0)
