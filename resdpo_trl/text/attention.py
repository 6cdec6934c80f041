"""Causal attention in bfloat16 on the CPU, by matrix products.

    O = softmax(Q·Kᵀ·scale + mask)·V        (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Eq. 1)

PyTorch's SDPA runs a flash kernel on the CPU whose backward pass is slow where rows are a few hundred tokens long, as
here. Plain products of the whole (T, T) square do better, and in two blocks better still: the first half of the queries
sees the first half of the keys alone, so a quarter of the square is never touched. The probabilities are kept for the
backward pass: 1.5 bytes a square element in bfloat16. benchmarks/attention.py measures it.

Everything else goes to transformers' SDPA: float32 (where SDPA is as fast), CUDA, dropout, a key–value cache, masks
that are not boolean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

CPU_ATTENTION = "resdpo_cpu"  # the name under which transformers knows it


def cpu_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: (B, H, T, D) queries, (B, H or fewer, T, D) keys and values -> (B, T, H, D), None.

    A boolean mask is (B or 1, 1, T, T), True where a query sees a key; None is the causal one.
    """
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    length = query.shape[2]
    ours = (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and 1 < length == key.shape[2]
        and not dropout
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and all(option is None for option in (options.get("position_bias"), options.get("softcap")))
    )
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **options
        )
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(query, key, value, ~mask, scale)
    return out.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """(B, H, T, D) queries, (B, K, T, D) keys and values and (B or 1, 1, T, T) what is hidden -> (B, H, T, D).

    Query head h reads key head h // G, G = H / K (grouped queries, https://arxiv.org/abs/2305.13245). The G·T queries
    of a key head are the rows of one product, so that no key is copied per query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
        length, key_heads = query.shape[2], key.shape[1]
        half = length // 2
        # a mask may let a query see what comes after it; a compiled graph cannot depend on what a tensor holds
        causal = not torch.compiler.is_compiling() and bool(hidden[..., :half, half:].all())
        blocks = [(0, half), (half, length)] if causal else [(0, length)]
        outputs, kept = [], []
        for start, end in blocks:
            with torch.autocast("cpu", enabled=False):
                scores = (_grouped(query[:, :, start:end], key_heads) @ key[:, :, :end].transpose(2, 3)).mul_(scale)
                scores = scores.view(*query.shape[:2], end - start, end)
                # not −inf: a row that sees nothing, as padding on the left does, has no softmax then
                scores.masked_fill_(hidden[:, :, start:end, :end], torch.finfo(scores.dtype).min)
                kept.append(_grouped(scores.softmax(-1), key_heads))
                outputs.append((kept[-1] @ value[:, :, :end]).view(*query.shape[:2], end - start, -1))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), probabilities in zip(ctx.blocks, kept, strict=True):
            own = _grouped(gradient[:, :, start:end], key.shape[1])
            of_value[:, :, :end] += probabilities.transpose(2, 3) @ own
            of_probabilities = own @ value[:, :, :end].transpose(2, 3)
            # softmax: dS = P∘(dP − Σ dP∘P); nothing reaches what is hidden, whose probability is zero
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype).mul_(
                ctx.scale
            )
            of_query.append((of_scores @ key[:, :, :end]).view(*query.shape[:2], end - start, -1))
            of_key[:, :, :end] += of_scores.transpose(2, 3) @ _grouped(query[:, :, start:end], key.shape[1])
        return torch.cat(of_query, 2), of_key, of_value, None, None


def _grouped(rows: Tensor, key_heads: int) -> Tensor:
    """(B, H, T, D) -> (B, key_heads, H / key_heads · T, D)."""
    return rows.reshape(len(rows), key_heads, -1, rows.shape[-1])


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
