"""Log-probabilities of responses under a language model, with the LM head run only where a response is predicted."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from resdpo_trl.errors import UserError
from resdpo_trl.text.attention import CPU_ATTENTION
from resdpo_trl.text.batch import PairCollator

# response tokens whose logits are held at once: 4,096 × GPT-2's vocabulary in float32 is 0.8 GB
CHUNK_TOKENS = 4096


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and rejected responses of a `PairCollator` batch.

    Args:
        model: a model given `add_response_head`, wrapped or not.
        batch: see `PairCollator`; B pairs.

    Returns:
        chosen, rejected: (B,) float32 (float64 for a float64 model), sums over response tokens in nats.
    """
    logps = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        predicted_at=batch["predicted_at"],
        predicted=batch["predicted"],
        use_cache=False,
    )
    pairs = len(batch["chosen_tokens"])
    sums = logps.new_zeros(2 * pairs).index_add(0, batch["response"], logps)
    return sums[0::2], sums[1::2]


def add_response_head(model: PreTrainedModel) -> None:
    """Teach `model(…, predicted_at=, predicted=)` to return (N,) log-probabilities of the predicted tokens.

    Going through the model's own forward keeps what wraps it working: PEFT, DDP, FSDP2, autocast. Without these
    arguments the forward is the original one. Raises a UserError for a model whose numbers would be wrong this way.
    """
    if getattr(model, "_has_response_head", False):
        return
    original = model.forward

    # the signature of the class: `generate` checks its arguments against it
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, predicted_at: Any = None, predicted: Any = None, **kwargs: Any) -> Any:
        if predicted_at is None:
            return original(*args, **kwargs)
        hidden = self.base_model(*args, **_with_mask(self, kwargs)).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[predicted_at]  # (N, D)
        return _token_logps(self.get_output_embeddings(), hidden, predicted)

    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = _ResponseHead
    model.forward = types.MethodType(forward, model)
    model._has_response_head = True  # type: ignore[assignment]
    _check_response_head(model)


def _with_mask(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Eager attention adds its mask to the scores; SDPA takes a boolean one, FlexAttention one of blocks."""
    mask = kwargs["attention_mask"]
    if mask.ndim == 4 and model.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[row, 0, query, key]

        rows, _, width, _ = mask.shape
        kwargs["attention_mask"] = create_block_mask(sees, rows, None, width, width, device=mask.device)
    if mask.ndim == 4 and model.config._attn_implementation == "eager":
        lowest = torch.finfo(model.dtype).min
        kwargs["attention_mask"] = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~mask, lowest
        )
    return kwargs


def _token_logps(head: torch.nn.Module, hidden: Tensor, predicted: Tensor) -> Tensor:
    """(N, D) hidden states and (N,) tokens -> (N,) log-probabilities."""
    if isinstance(head, _ResponseHead):
        return head(hidden, predicted)
    return _LogProbs.apply(head(hidden), predicted)  # with an adapter, or quantized: in one piece


class _ResponseHead(torch.nn.Linear):
    """An LM head that gives log-probabilities where tokens are given; `CHUNK_TOKENS` rows of logits at once, at most.

    In one call of the module: FSDP2 gathers its weights for a call and scatters them after its backward pass.
    """

    def forward(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            return super().forward(rows)
        if len(tokens) <= CHUNK_TOKENS:
            return _LogProbs.apply(super().forward(rows), tokens)
        device = rows.device.type
        operands: list[Tensor | None] = [rows, self.weight, self.bias]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            operands = [each if each is None else each.to(dtype) for each in operands]
        return _LogProbsInChunks.apply(*operands, tokens)


class _LogProbs(torch.autograd.Function):
    """log softmax(logits)[token], and its gradient (one-hot − softmax): float32 whatever the logits' type, and a few
    rows at a time, so that no float32 copy of (N, vocabulary) is ever written.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normalizer = _normalizer(logits)
        ctx.save_for_backward(logits, tokens, normalizer)
        return _exact(logits.gather(1, tokens[:, None])[:, 0]) - normalizer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, normalizer = ctx.saved_tensors
        # in their place: a second backward pass through them is an error, not a wrong number
        return _into_gradient(logits, tokens, normalizer, gradient), None


class _LogProbsInChunks(torch.autograd.Function):
    """`_LogProbs` of rows·weightᵀ + bias, whose logits are computed again in the backward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        logps, normalizers = [], []
        for part, own in zip(rows.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS), strict=True):
            logits = F.linear(part, weight, bias)
            normalizers.append(_normalizer(logits))
            logps.append(_exact(logits.gather(1, own[:, None])[:, 0]) - normalizers[-1])
        ctx.save_for_backward(rows, weight, bias, tokens, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        rows, weight, bias, tokens, normalizer = ctx.saved_tensors
        of_rows = torch.empty_like(rows)
        # sums over chunks, so in float32
        of_weight = torch.zeros_like(_exact(weight)) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(_exact(bias)) if ctx.needs_input_grad[2] else None
        for start in range(0, len(tokens), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(rows[part], weight, bias)
            of_logits = _into_gradient(logits, tokens[part], normalizer[part], gradient[part])
            of_rows[part] = of_logits @ weight
            if of_weight is not None:
                of_weight += of_logits.T @ rows[part]
            if of_bias is not None:
                of_bias += _exact(of_logits).sum(0)
        return (
            of_rows,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
        )


def _normalizer(logits: Tensor) -> Tensor:
    """(N, V) -> (N,) log Σ exp."""
    return torch.cat([_exact(rows).logsumexp(1) for rows in logits.split(_rows_at_once(logits))])


def _into_gradient(logits: Tensor, tokens: Tensor, normalizer: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of (N, V) logits in their place, from that of their tokens' (N,) log-probabilities."""
    rows = _rows_at_once(logits)
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        weights = gradient[part, None]
        softmax = (_exact(logits[part]) - normalizer[part, None]).exp_()
        logits[part] = softmax.mul_(-weights).scatter_add_(1, tokens[part, None], weights)
    return logits


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose float32 copy a CPU's cache holds; on a GPU few launches matter more."""
    return 128 if logits.device.type == "cpu" else 2048


def check_prefix_sharing(model: PreTrainedModel, longest_row: int) -> None:
    """Raise a UserError where attention would not be what the shared row's mask says.

    Args:
        model: the language model.
        longest_row: tokens of the longest `[prompt | chosen | rejected]`.
    """
    config = model.config.get_text_config()
    name, mend = type(model).__name__, "pass --prefix_sharing false"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < longest_row:
        raise UserError(f"{name} has a sliding window of {window} tokens, less than a row's {longest_row}: {mend}")
    if model.config._attn_implementation not in ("sdpa", "eager", "flex_attention", CPU_ATTENTION):
        raise UserError(
            f"--attn_implementation {model.config._attn_implementation} takes no mask of its own, as prefix sharing "
            f"needs: use sdpa or flex_attention, or {mend}"
        )
    if model.config._attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError("--attn_implementation flex_attention has no backward pass on the CPU: use sdpa")
    plain = _trial(model, False)
    try:
        shared = _trial(model, True)
    except (RuntimeError, ValueError, TypeError) as error:  # recurrent models expect a (B, T) mask, for one
        raise UserError(f"{name} does not take a mask of (B, 1, T, T), as prefix sharing needs: {mend}") from error
    if not torch.allclose(shared, plain, rtol=_tolerance(model), atol=_tolerance(model)):
        raise UserError(f"{name} does not follow the shared prompt's mask and position ids: {mend}")


def _check_response_head(model: PreTrainedModel) -> None:
    """Compare with the model's own logits: a model that scales or caps them after the head would differ."""
    batch = _trial_batch(model)
    with _evaluating(model):
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    own = own.double().log_softmax(-1).flatten(0, 1)[batch["predicted_at"]]
    own = own.gather(1, batch["predicted"][:, None])[:, 0]
    sums = own.new_zeros(2).index_add(0, batch["response"], own)
    if not torch.allclose(_trial(model, False), sums, rtol=_tolerance(model), atol=_tolerance(model)):
        raise UserError(
            f"{type(model).__name__} changes its logits after the LM head, which is not supported; use another model"
        )


def _trial(model: PreTrainedModel, prefix_sharing: bool) -> Tensor:
    with _evaluating(model):
        chosen, rejected = pair_logps(model, _trial_batch(model, prefix_sharing))
    return torch.cat([chosen, rejected]).double()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _trial_batch(model: PreTrainedModel, prefix_sharing: bool = False) -> dict[str, Tensor]:
    tokens = [(7 * n) % model.config.get_text_config().vocab_size for n in range(1, 13)]
    pair = {"prompt_ids": tokens[:5], "chosen_ids": tokens[5:9], "rejected_ids": tokens[9:]}
    return {name: value.to(model.device) for name, value in PairCollator(0, prefix_sharing)([pair]).items()}


def _tolerance(model: PreTrainedModel) -> float:
    exact = model.dtype in (torch.float32, torch.float64) and not getattr(model, "is_quantized", False)
    return 1e-3 if exact else 5e-2
