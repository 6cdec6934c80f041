"""Attention functions that are registered in transformers, so that they work with every model family.

`ATTENTION` is the default. On the CPU in bfloat16 it consists of plain matrix products,

    O = softmax(Q·Kᵀ·scale + mask)·V        (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Eq. 1),

in two blocks. The first half of the queries sees only the first half of the keys, so a quarter of the T×T scores is not
computed. The backward pass of PyTorch's flash kernel for the CPU is slower if rows have a few hundred tokens
(benchmarks/attention.py). The probabilities are stored for the backward pass: T×T×1.5 bytes per row and head.

SDPA handles all other cases: float32, CUDA, dropout, a key–value cache, and masks that are not boolean. SDPA's kernels
support either a mask or `enable_gqa`, so with a mask transformers copies the keys and values of grouped queries for
each query head. This module repeats the mask instead if that moves fewer bytes.

`FLEX` (--attn_implementation flex_attention) is FlexAttention (https://arxiv.org/abs/2412.05496) if the batch has a
block mask. Otherwise it is `ATTENTION`: in generation, SFT and reward models.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from resdpo_trl.errors import UserError

ATTENTION, FLEX = "resdpo", "resdpo_flex"  # names in transformers' registry
BLOCK = 128  # tokens per block of FlexAttention's mask


def attention(
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

    A boolean mask is (B or 1, 1, T, T), and True where a query sees a key. None is the causal mask.
    """
    query, key, value = _cast(query, key, value) if query.device.type == "cpu" else (query, key, value)
    length = query.shape[2]
    plain = length > 1 and all(options.get(name) is None for name in ("position_bias", "softcap"))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if plain and on_cpu and length == key.shape[2] and not dropout and boolean and causal:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _Attention.apply(query, key, value, ~mask, scale).transpose(1, 2).contiguous(), None
    masked = attention_mask is not None and attention_mask.shape[1:3] == (1, length)
    if plain and masked and _pays(key, query.shape[1]):
        # as in `_Attention`, one product has all queries of a key head: this repeats the mask instead of the keys
        mask = attention_mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)  # type: ignore[union-attr]
        rows = _grouped(query, key.shape[1])
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return out.reshape(*query.shape[:3], value.shape[-1]).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **options
    )


def _cast(*values: Tensor) -> tuple[Tensor, ...]:
    """Cast values to autocast's data type if autocast is enabled."""
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return values
    return tuple(value.to(torch.get_autocast_dtype(device)) for value in values)


class _Attention(torch.autograd.Function):
    """(B, H, T, D) queries, (B, K, T, D) keys and values, and a (B or 1, 1, T, T) mask of hidden keys -> (B, H, T, D).

    Query head h uses key head h // G with G = H / K (grouped queries, https://arxiv.org/abs/2305.13245). The G·T
    queries of a key head are the rows of one product, so that keys are not copied for each query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
        length, key_heads = query.shape[2], key.shape[1]
        half = length // 2
        # a mask may not be causal, and a compiled graph can't depend on the values of a tensor
        causal = not torch.compiler.is_compiling() and bool(hidden[..., :half, half:].all())
        blocks = [(0, half), (half, length)] if causal else [(0, length)]
        outputs, kept = [], []
        for start, end in blocks:
            with torch.autocast("cpu", enabled=False):
                scores = (_grouped(query[:, :, start:end], key_heads) @ key[:, :, :end].transpose(2, 3)).mul_(scale)
                scores = scores.view(*query.shape[:2], end - start, end)
                # not −inf: the softmax of a row without visible keys, as in left padding, would be nan
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
            # softmax: dS = P∘(dP − Σ dP∘P). Hidden keys have zero probability and thus get no gradient
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype).mul_(
                ctx.scale
            )
            of_query.append((of_scores @ key[:, :, :end]).view(*query.shape[:2], end - start, -1))
            of_key[:, :, :end] += of_scores.transpose(2, 3) @ _grouped(query[:, :, start:end], key.shape[1])
        return torch.cat(of_query, 2), of_key, of_value, None, None


def _grouped(rows: Tensor, key_heads: int) -> Tensor:
    """(B, H, T, D) -> (B, key_heads, H / key_heads · T, D)."""
    return rows.reshape(len(rows), key_heads, -1, rows.shape[-1])


def _pays(key: Tensor, heads: int) -> bool:
    """Whether repeating the mask for each query group moves fewer bytes than copying the keys and values.

    Per query token, with G = H / K, repeating the mask adds 3·(G − 1)·T bytes (a boolean, and the 16-bit bias that SDPA
    derives from it). Copying the keys and values adds 4·(H − K)·D bytes in 16 bits, and as many for their gradients.
    """
    _, key_heads, length, width = key.shape
    return heads > key_heads and 3 * length < 8 * key_heads * width


def block_mask(document: Tensor, part: Tensor) -> BlockMask:
    """The block mask of a batch for FlexAttention, built without a dense mask. A query q sees a key k if

        document_q = document_k  ∧  k ≤ q  ∧  ¬(part_q = 2 ∧ part_k = 1).

    Args:
        document: (R, T) integers. The tokens of a pair are adjacent and have the same integer; padding has another.
        part: (R, T) integers: 0 prompt, 1 chosen, 2 rejected.

    A block (i, j) is skipped if its queries and keys share no document, if it is above the diagonal, or if all queries
    are rejected and all keys are chosen. It is full if it has a single document, is below the diagonal, and no
    rejected query meets a chosen key. Other blocks are masked element by element.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        blind = (part[row, query] == 2) & (part[row, key] == 1)
        return (document[row, query] == document[row, key]) & (key <= query) & ~blind

    length = document.shape[1]

    def ranges(values: Tensor) -> tuple[Tensor, Tensor]:
        """The minimum and maximum of each block, (R, n). Copies of the last token pad the last block."""
        missing = -length % BLOCK
        blocks = torch.cat([values, values[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, BLOCK))
        return blocks.amin(2), blocks.amax(2)

    first, last = ranges(document)
    lowest, highest = ranges(part)
    at = torch.arange(first.shape[1], device=document.device)
    q, k = (slice(None), slice(None), None), (slice(None), None)
    shared = (first[q] <= last[k]) & (first[k] <= last[q]) & (at[:, None] >= at)
    shared &= ~((lowest[q] == 2) & (lowest[k] == 1) & (highest[k] == 1))
    whole = (first[q] == last[q]) & (first[k] == last[k]) & (first[q] == first[k]) & (at[:, None] > at)
    # parts increase within a document: a block of keys has a chosen one if 1 is between its minimum and maximum
    whole &= ~((highest[q] == 2) & (lowest[k] <= 1) & (highest[k] >= 1))

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        numbers = blocks[:, None].int()
        return numbers.sum(-1, dtype=torch.int32), numbers.argsort(dim=-1, descending=True, stable=True).int()

    partial, full = ordered(shared & ~whole), ordered(whole)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, sees, (length, length))


def flex(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    block_mask: BlockMask | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """FlexAttention if a block mask is given, otherwise `attention`. With a block mask, `attention_mask` is ignored."""
    if block_mask is None:
        return attention(module, query, key, value, attention_mask, dropout, **options)
    if dropout:
        raise UserError("--attn_implementation flex_attention has no dropout: pass --disable_dropout true, or use sdpa")
    device, softcap = query.device.type, options.get("softcap")
    query, key, value = _cast(query, key, value)
    if device != "cpu":  # compiled
        return flex_attention_forward(module, query, key, value, block_mask, **options)[0], None

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    grouped = query.shape[1] != key.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = flex_attention(query, key, value, capped, block_mask, options.get("scaling"), enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


for name, function in ((ATTENTION, attention), (FLEX, flex)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
