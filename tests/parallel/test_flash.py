import pytest
import torch

from opsd_megatron.parallel.flash import flash_backward, flash_forward
from tests.parallel.forests import dense_attention

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
ON_CPU = [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
ON_GPU = [("cuda", torch.float32), ("cuda", torch.bfloat16)]
DEVICES = ON_CPU + [
    pytest.param(
        *pair, marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    )
    for pair in ON_GPU
]


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("device, dtype", DEVICES)
def test_parts_over_two_key_blocks_add_up_to_dense_attention(device, dtype, heads, kv_heads):
    """Keys [0, 21) seen by all queries and keys [21, 58) seen causally: merged by log-sum-exp, as a ring does."""
    queries, before = 37, 21
    generator = torch.Generator().manual_seed(2)
    query, key, value, grad = (
        torch.randn(2 * count, tokens, 16, generator=generator, dtype=torch.float64)[::2].transpose(0, 1).to(dtype)
        for count, tokens in ((heads, queries), (kv_heads, 58), (kv_heads, 58), (heads, queries))
    )  # strided views
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    mask = torch.ones(queries, 58, dtype=torch.bool).tril(before)
    expected = dense_attention(*exact, mask, SCALE)
    expected.backward(grad.double())

    query, key, value, grad = (tensor.to(device) for tensor in (query, key, value, grad))
    blocks = [(slice(0, before), False), (slice(before, 58), True)]
    parts = [flash_forward(query, key[keys], value[keys], is_causal, SCALE) for keys, is_causal in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])  # [queries, heads]
    out = sum(part.to(lse.dtype) * torch.exp(part_lse - lse)[..., None] for part, part_lse in parts).to(dtype)
    grads = [
        flash_backward(grad, query, key[keys], value[keys], out, lse, is_causal, SCALE) for keys, is_causal in blocks
    ]
    ours = (
        out,
        grads[0][0] + grads[1][0],
        torch.cat((grads[0][1], grads[1][1])),
        torch.cat((grads[0][2], grads[1][2])),
    )
    for found, reference in zip(ours, (expected.detach(), *(tensor.grad for tensor in exact)), strict=True):
        error = (found.cpu().double() - reference).abs().max() / reference.abs().max()
        assert error <= TOLERANCE[dtype]
