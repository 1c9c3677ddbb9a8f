"""Buffers of the LM head and the divergence: `losses/chunked.py`, tensor by tensor."""

from opsd_megatron.config import Distill, SelfSft
from opsd_megatron.launch.plan.activations import SINGLE, Tensors, Widths
from opsd_megatron.losses.chunked import BLOCK_ELEMENTS, PART_ELEMENTS
from opsd_megatron.losses.divergence import SPARE_BUFFERS


def head_bytes(objective: Distill | SelfSft, rows: int, w: Widths) -> Tensors:
    """At the last chunk of `rows` response rows on one rank; the head's gradient is made in `main_grad`."""
    kind = "cuda" if w.is_cuda else "cpu"
    part, block = (max(1, elements[kind] // w.vocab) for elements in (PART_ELEMENTS, BLOCK_ELEMENTS))
    chunk = min(objective.chunk_tokens, rows)
    part, block = min(part, chunk), min(block, chunk)
    teachers, spares = (1, SPARE_BUFFERS) if isinstance(objective, Distill) else (0, 2)
    buffers = {
        "rows of the student": rows * w.hidden * w.value,
        "gradient of the rows": rows * w.hidden * SINGLE,
        "gradient of a chunk's logits": chunk * w.vocab * w.value,
        "logits of the teacher": teachers * part * w.vocab * SINGLE,
        "spare logits": spares * block * w.vocab * SINGLE,
    }
    if w.value != SINGLE:
        buffers["logits of the student"] = part * w.vocab * SINGLE
    if w.value != SINGLE and not w.is_cuda:  # a CPU multiplies bfloat16 into float32 by way of a copy
        buffers["gradient of a chunk's logits in float32"] = chunk * w.vocab * SINGLE
    return buffers
