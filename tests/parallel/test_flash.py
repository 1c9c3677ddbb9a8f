import pytest
import torch

from opsd_megatron.parallel import flash
from opsd_megatron.parallel.flash import flash_backward, flash_forward
from tests.parallel.forests import dense_attention

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
ON_CPU = [("cpu", "cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
ON_GPU = [("efficient", torch.float32), ("flash", torch.bfloat16), ("cudnn", torch.bfloat16)]
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KERNELS = ON_CPU + [pytest.param(kernel, "cuda", dtype, marks=NEEDS_GPU) for kernel, dtype in ON_GPU]


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("kernel, device, dtype", KERNELS)
def test_parts_over_two_key_blocks_add_up_to_dense_attention(monkeypatch, kernel, device, dtype, heads, kv_heads):
    """Keys [0, 21) seen by all queries and keys [21, 58) seen causally: merged by log-sum-exp, as a ring does."""
    monkeypatch.setattr(flash, "choose_kernel", lambda *_: kernel)
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


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_cuda_kernel_is_called_with_what_its_schema_takes(monkeypatch, kernel, is_causal):
    """Without a device: torch's own shape functions stand for the kernels."""
    monkeypatch.setattr(flash, "choose_kernel", lambda *_: kernel)
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    queries, keys = (96, 96) if is_causal else (96, 70)
    query, grad = (torch.empty(queries, 8, 64, dtype=dtype, device="meta") for _ in range(2))
    key, value = (torch.empty(keys, 2, 64, dtype=dtype, device="meta") for _ in range(2))
    out, lse = flash.flash_forward(query, key, value, is_causal, 0.125)
    grads = flash.flash_backward(grad, query, key, value, out, lse, is_causal, 0.125)
    assert out.shape == query.shape and out.dtype == dtype
    assert lse.shape == (queries, 8) and lse.dtype == torch.float32
    assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]
