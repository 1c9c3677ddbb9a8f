"""Flash attention on one pair of blocks with its log-sum-exp: the only file that knows torch's attention kernels.

Tensors are [tokens, heads, head_dim] with fewer key and value heads than query heads where the model has them (GQA):
no kernel gets expanded copies. The log-sum-exp is [queries, heads] in float32 (float64 for float64 inputs).
A causal pair has equally many queries and keys.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

_aten = torch.ops.aten
_LSE_MULTIPLE = 32  # the memory-efficient backward reads log-sum-exp rows padded to this (kAlignLSE in its kernels)


def flash_forward(
    query: Float[Tensor, "queries heads head_dim"],
    key: Float[Tensor, "keys kv_heads head_dim"],
    value: Float[Tensor, "keys kv_heads head_dim"],
    is_causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "queries heads head_dim"], Float[Tensor, "queries heads"]]:
    """softmax(scale * query key^T) value, and the log of the softmax's denominator."""
    kernel = choose_kernel(query, key, is_causal)
    if kernel == "efficient":
        return _efficient_forward(query, key, value, is_causal, scale)
    inputs = [_heads_first(tensor) for tensor in (query, key, value)]
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, is_causal, scale=scale)
    elif kernel == "cudnn":
        out, lse = _aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, is_causal, scale=scale)[:2]
        lse = lse.flatten(2)  # [1, heads, queries, 1]
    else:
        out, lse = _aten._scaled_dot_product_flash_attention(*inputs, 0.0, is_causal, False, scale=scale)[:2]
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def flash_backward(
    grad_out: Float[Tensor, "queries heads head_dim"],
    query: Float[Tensor, "queries heads head_dim"],
    key: Float[Tensor, "keys kv_heads head_dim"],
    value: Float[Tensor, "keys kv_heads head_dim"],
    out: Float[Tensor, "queries heads head_dim"],
    lse: Float[Tensor, "queries heads"],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This pair's part of the gradients of query, key and value, where `out` and `lse` are those over ALL keys.

    With the softmax's denominator and output of the whole row, the parts of all pairs add up to the exact gradient
    (FlashAttention-2, Dao 2023, section 3.1: dS = P * (dP - rowsum(dO * O)), P = exp(S - lse)).
    """
    kernel = choose_kernel(query, key, is_causal)
    if kernel == "efficient":
        return _efficient_backward(grad_out, query, key, value, out, lse, is_causal, scale)
    inputs = [_heads_first(tensor) for tensor in (grad_out, query, key, value, out)]
    lse = lse.transpose(0, 1)[None]  # [1, heads, queries]
    no_random = torch.empty(2, dtype=torch.uint64, device=query.device)  # read only under dropout
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, lse, 0.0, is_causal, scale=scale)
    elif kernel == "cudnn":
        lse, lengths = lse[..., None].contiguous(), (query.shape[0], key.shape[0])
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, lse, no_random, no_random, None, None, None, *lengths, 0.0, is_causal, scale=scale
        )
    else:
        lse, lengths = lse.contiguous(), (query.shape[0], key.shape[0])
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *inputs, lse, None, None, *lengths, 0.0, is_causal, no_random, no_random, scale=scale
        )
    return grads[0][0].transpose(0, 1), grads[1][0].transpose(0, 1), grads[2][0].transpose(0, 1)


def choose_kernel(query: Tensor, key: Tensor, is_causal: bool) -> Literal["cpu", "cudnn", "flash", "efficient"]:
    """The fastest of torch's kernels that gives the log-sum-exp: on Hopper and later cuDNN's, where it takes the pair.

    Raises:
        TypeError: no kernel of this device takes the dtype.
    """
    if not query.is_cuda:
        return "cpu"
    if query.dtype == torch.float32:
        return "efficient"
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"attention on {query.device} in {query.dtype}; use bfloat16, float16 or float32, or the CPU")
    inputs = [_heads_first(tensor) for tensor in (query, key, key)]
    is_grouped = query.shape[1] != key.shape[1]
    call = torch.backends.cuda.SDPAParams(*inputs, None, 0.0, is_causal, is_grouped)  # type: ignore[call-arg]
    hopper = torch.cuda.get_device_capability(query.device) >= (9, 0)
    return "cudnn" if hopper and torch.backends.cuda.can_use_cudnn_attention(call) else "flash"


def _efficient_forward(query, key, value, is_causal: bool, scale: float):
    inputs = _grouped(query, key, value)
    out, lse = _aten._scaled_dot_product_efficient_attention(*inputs, None, True, 0.0, is_causal, scale=scale)[:2]
    lse = lse[:, :, : query.shape[0]]  # [kv_heads, group, queries]
    return out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1)


def _efficient_backward(grad_out, query, key, value, out, lse, is_causal: bool, scale: float):
    kv_heads = key.shape[1]
    no_random = torch.zeros((), dtype=torch.int64, device=query.device)  # read only under dropout
    rows = -(-query.shape[0] // _LSE_MULTIPLE) * _LSE_MULTIPLE
    padded = lse.new_full((query.shape[1], rows), torch.inf)  # exp(score - inf) = 0
    padded[:, : query.shape[0]] = lse.transpose(0, 1)
    inputs = _grouped(query, key, value)
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        _per_kv_head(grad_out, kv_heads),
        *inputs,
        None,
        _per_kv_head(out, kv_heads),
        padded.unflatten(0, (kv_heads, -1)),
        no_random,
        no_random,
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )[:3]
    grad_query, grad_key, grad_value = grads  # [kv_heads, group, tokens, head_dim]
    return grad_query.flatten(0, 1).transpose(0, 1), grad_key.sum(1).transpose(0, 1), grad_value.sum(1).transpose(0, 1)


def _heads_first(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, tokens, head_dim] without a copy where the kernels allow."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(0, 1)[None]


def _per_kv_head(tensor: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [kv_heads, heads / kv_heads, tokens, head_dim]: each group is one batch entry."""
    return tensor.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel without GQA gets kv heads as its batch and reads each key head `group` times through stride 0."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (_per_kv_head(tensor, kv_heads).expand(-1, group, -1, -1) for tensor in (key, value))
    return _per_kv_head(query, kv_heads), key, value
