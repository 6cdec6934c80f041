"""Log-probabilities of responses under a language model. The LM head runs only where it predicts a response token."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.kernels import ChunkedLogProbFunction

from resdpo_trl.errors import UserError
from resdpo_trl.sources import first_line
from resdpo_trl.text.attention import ATTENTION, FLEX, block_mask
from resdpo_trl.text.fused import in_float32
from resdpo_trl.text.model import positions_of
from resdpo_trl.text.tokens import PairCollator

# number of response tokens per chunk of logits: 4,096 × GPT-2's vocabulary in float32 is 0.8 GB
CHUNK_TOKENS = 4096
FUSED_ON = ("cuda",)  # devices on which TRL's kernels compute the head; on the CPU, TRL's torch path is slower
VOCABULARY_TILE = 32768  # columns per tile of logits in TRL's kernels, as in TRL


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor], router_loss: bool = False) -> tuple[Tensor, ...]:
    """Log-probabilities of the chosen and rejected responses of a `PairCollator` batch.

    Args:
        model: a model after `add_response_head`, wrapped or not.
        batch: B pairs, see `PairCollator`.
        router_loss: also return the load-balancing loss of a mixture of experts, a scalar that TRL adds to the loss of
            DPO. With E experts and k experts per token, it is
                E · Σ_e f_e·P_e,        f_e: assignments to e per token, P_e: the router's mean probability of e
            over the tokens of all layers (Switch Transformers, https://arxiv.org/abs/2101.03961, Eqs. 4 to 6; k = 1
            there). A shared prompt counts twice, as in two rows.

    Returns:
        chosen, rejected: (B,) float32 (float64 for a float64 model), sums over response tokens in nats.
    """
    logps, *router = predicted_logps(model, batch, batch["copies"] if router_loss else None)
    sums = logps.new_zeros(2 * len(batch["chosen_tokens"])).index_add(0, batch["response"], logps)
    return sums[0::2], sums[1::2], *router


def predicted_logps(
    model: torch.nn.Module, batch: dict[str, Tensor], router_weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(N,) log-probabilities of a batch's `predicted` tokens, and the router loss if (R, T) weights are given.

    Raises:
        UserError: a wrapper of the model has cast them to a lower precision, in which their sums would be wrong.
    """
    names = ("input_ids", "attention_mask", "document", "part", "position_ids", "predicted_at", "predicted")
    given = {name: batch[name] for name in names if name in batch}
    found = model(**given, router_weights=router_weights, use_cache=False)
    logps, *router = (found,) if router_weights is None else found
    if logps.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"a wrapper of the model casts its log-probabilities to {logps.dtype}, so their sums would be wrong: keep "
            "the model's outputs in float32 (output_dtype of FSDP2's MixedPrecisionPolicy)"
        )
    return logps, *router


def add_response_head(model: PreTrainedModel, longest_row: int | None = None, max_length: int | None = None) -> None:
    """Patch a model so that `model(…, predicted_at=, predicted=)` returns (N,) log-probabilities of predicted tokens.

    With (R, T) `router_weights` it also returns the load-balancing loss of its routers; see `pair_logps`. The patch
    uses the model's own forward, so that wrappers such as PEFT, DDP, FSDP2 and autocast still work. Without these
    arguments the forward is the original one.

    Args:
        model: a causal language model, without its PEFT wrapper.
        longest_row: tokens of the longest shared row `[prompt | chosen | rejected]`; None without prefix sharing.
        max_length: maximum tokens of a prompt with one response. The default is `longest_row`.

    Raises:
        UserError: the log-probabilities would be wrong (see `_scored_trial`), or would be with a shared prompt.
    """
    trial = None
    if not hasattr(model, "_response_head"):
        trial = _scored_trial(model)
        _patch_forward(model, trial._response_head)  # type: ignore[arg-type]
    if longest_row is not None:
        _check_prefix_sharing(model, longest_row, max_length, trial)


def _patch_forward(model: PreTrainedModel, head: str) -> None:
    """Patch a model's forward. With `head` "linear", the LM head returns log-probabilities in chunks of logits, scaled
    or capped as in the model (Cohere, Granite, Gemma 2). With "own", the rest of the model's forward computes logits
    of the N hidden states alone, for models that transform them first (BERT).
    """
    # not bound to `model`: a copy of it must run its own weights
    bound = model.forward
    original = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))
    config = model.config.get_text_config()
    # the logits are c·tanh(s·W·h / c), or s·W·h without c
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)

    # keeps the signature of the class, because `generate` checks its arguments against it
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        predicted_at: Any = None,
        predicted: Any = None,
        router_weights: Any = None,
        **kwargs: Any,
    ) -> Any:
        if predicted_at is None:
            return original(self, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT adds labels=None
        kwargs = _with_mask(self, given)
        if router_weights is not None:
            kwargs["output_router_logits"] = True
        routers: list[Any] = []

        def keep_predicted(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            routers.append(getattr(output, "router_logits", None))
            output.router_logits = None  # otherwise the model's own forward adds a loss
            rows, columns = predicted_at
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]  # (1, N, D)
            return output

        backbone = self.base_model
        if backbone is self:  # Llama 4 has a wrong base_model_prefix
            backbone = next(child for child in self.children() if isinstance(child, PreTrainedModel))
        with backbone.register_forward_hook(keep_predicted):
            if head == "linear":
                hidden = backbone(*args, **kwargs).last_hidden_state[0]
                logps = _token_logps(self.get_output_embeddings(), hidden, predicted, softcap, scale)
            else:
                logps = _LogProbs.apply(original(self, *args, **kwargs).logits[0], predicted)
        if router_weights is None:
            return logps
        return logps, _router_loss(self, routers[0], router_weights)

    model.forward = types.MethodType(forward, model)
    if head == "linear" and type(linear := model.get_output_embeddings()) is torch.nn.Linear:
        linear.__class__ = _ResponseHead
        linear.softcap, linear.scale = softcap, scale  # type: ignore[assignment]
    model._response_head = head  # type: ignore[assignment]


def _with_mask(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Convert the mask for the attention function: additive for eager attention, boolean for SDPA, blocks for `FLEX`.

    Layers get the block mask as a separate keyword. A dummy (1, 1, 1, 1) mask prevents transformers from creating a
    dense one, because it uses a 4-D mask unchanged.
    """
    if "document" in kwargs:
        kwargs["block_mask"] = block_mask(kwargs.pop("document"), kwargs.pop("part"))
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs["input_ids"].device)
    mask = kwargs["attention_mask"]
    if mask.ndim == 4 and model.config._attn_implementation == "eager":
        kwargs["attention_mask"] = (~mask).to(model.dtype) * torch.finfo(model.dtype).min
    return kwargs


def _token_logps(
    head: torch.nn.Module, hidden: Tensor, predicted: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """Compute (N,) log-probabilities from (N, D) hidden states and (N,) tokens."""
    if isinstance(head, _ResponseHead):
        return head(hidden, predicted)
    # a head with an adapter, or a quantized one, is not chunked
    return _LogProbs.apply(_transformed(head(hidden), softcap, scale), predicted)


def _transformed(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ResponseHead(torch.nn.Linear):
    """An LM head that returns log-probabilities if tokens are given, in chunks of `CHUNK_TOKENS` rows of logits.

    All chunks are computed in one call of the module, because FSDP2 gathers its weights for each call. On CUDA, and for
    scaled or capped logits, it uses TRL's function, which computes tiles of logits and sums in float32.
    """

    softcap: float | None
    scale: float

    def forward(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        if tokens is None:
            return super().forward(rows)
        capped = self.softcap is not None or self.scale != 1
        if (capped or rows.device.type in FUSED_ON) and rows.dtype != torch.float64:
            options = (1.0, VOCABULARY_TILE, self.softcap, self.scale, ("log_probs",))
            return ChunkedLogProbFunction.apply(rows, self.weight, self.bias, tokens, *options)[0]

        def logps(rows: Tensor, tokens: Tensor) -> Tensor:
            logits = F.linear(rows, self.weight, self.bias)
            return _LogProbs.apply(_transformed(logits, self.softcap, self.scale), tokens)

        if len(tokens) <= CHUNK_TOKENS:
            return logps(rows, tokens)
        # the backward pass recomputes the logits of a chunk
        chunks = zip(rows.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS), strict=True)
        return torch.cat([checkpoint(logps, *chunk, use_reentrant=False) for chunk in chunks])


class _LogProbs(torch.autograd.Function):
    """log softmax(logits)[token] with the gradient (one-hot − softmax). It computes in float32 for any type of logits,
    and a few rows at a time, so that there is no float32 copy of (N, vocabulary).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normalizer = torch.cat([in_float32(rows).logsumexp(1) for rows in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, tokens, normalizer)
        return in_float32(logits.gather(1, tokens[:, None])[:, 0]) - normalizer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, normalizer = ctx.saved_tensors
        # in place: autograd then raises an error for a second backward pass, instead of returning wrong gradients
        rows = _rows_at_once(logits)
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            weights = gradient[part, None]
            softmax = (in_float32(logits[part]) - normalizer[part, None]).exp_()
            logits[part] = softmax.mul_(-weights).scatter_add_(1, tokens[part, None], weights)
        return logits, None


def _rows_at_once(logits: Tensor) -> int:
    """The number of rows per step: few enough for one core's cache, more on a GPU to reduce kernel launches."""
    return 16 if logits.device.type == "cpu" else 2048


def _router_loss(model: PreTrainedModel, router_logits: Any, weights: Tensor) -> Tensor:
    """The load-balancing loss of `pair_logps`, from the (R·T, E) logits of every layer and (R, T) weights."""
    balance: Callable[..., Any] = load_balancing_loss_func  # its annotation allows only one layer
    try:
        tokens, experts = router_logits[0].shape
        virtual = tokens // len(weights) - weights.shape[1]  # tokens that prompt tuning puts before a row
        weights = F.pad(weights, (virtual, 0), value=1)
        # as in TRL, one function for every family
        loss: Tensor = balance(router_logits, experts, model.config.get_text_config().num_experts_per_tok, weights)
    except Exception as error:  # routers of another form may raise any exception
        raise UserError(
            f"{type(model).__name__}'s router loss can't be computed ({first_line(error)}): pass "
            "--router_aux_loss_coef 0"
        ) from error
    return loss


# --- checks of the log-probabilities -----------------------------------------------------------------------------

CHECK_TOLERANCE = 1e-4  # nats per token; modules that always compute in float32 differ by 1e-5

# PEFT methods that change weights, or the output of a layer for each token independently
PER_TOKEN = {
    "LORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
# PEFT methods that put tokens, or keys and values, before a row
BEFORE_THE_ROW = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"}


def check_adapters(model: Any, new: PeftConfig | None, prefix_sharing: bool) -> None:
    """Raise a UserError for a PEFT method with wrong log-probabilities. tests/text/test_peft.py tests all methods.

    The unsupported methods need a task id (POLY), calls at every step (ADALORA) or their own loss (CPT), or compute a
    token's output from the rest of the batch (LILY).

    Args:
        model: the model, whose adapters are checked.
        new: the configuration of a new adapter, or None.
    """
    for config in (new, *getattr(model, "peft_config", {}).values()):
        if config is None:
            continue
        method = config.peft_type.value
        for option in ("alora_invocation_tokens", "use_asa"):  # they depend on a row's end, and on calls at each step
            if getattr(config, option, None):
                raise UserError(f"the PEFT method {method} is not supported with {option}: omit it")
        if method not in PER_TOKEN | BEFORE_THE_ROW:
            raise UserError(f"the PEFT method {method} is not supported: use LoRA (--use_peft)")
        if method in BEFORE_THE_ROW and prefix_sharing:
            raise UserError(
                f"the PEFT method {method} puts virtual tokens before a row, but the mask of a shared prompt does not "
                "support them: pass --prefix_sharing false"
            )


def _scored_trial(model: PreTrainedModel) -> PreTrainedModel:
    """A trial model with the first `head` of `_patch_forward` that matches the model's own forward.

    Raises:
        UserError: no head matches, or the model sees the tokens that it should predict.
    """
    name, reason = type(model).__name__, ""
    for head in ("linear", "own"):
        try:
            trial = _trial_model(model)
            pair = _trial_pair(trial, 130)  # longer than, e.g., Reformer's chunks of 64 tokens
            own = torch.cat([_own_logps(trial, pair, side) for side in ("chosen_ids", "rejected_ids")])
            before = _own_logps(trial, pair | {"chosen_ids": pair["chosen_ids"][:-1]}, "chosen_ids")
            _patch_forward(trial, head)
            found = _trial_logps(trial, pair, False)
        except Exception as error:  # a forward pass of another form may raise any exception
            reason = first_line(error)
            continue
        if not (before - own[: len(before)]).abs().max() < CHECK_TOLERANCE:
            raise UserError(
                f"{name} sees the tokens that it should predict, so it has no log-probability of a response: use "
                "another model, or set is_decoder in its config.json if it has this option"
            )
        if (found - own).abs().max() < CHECK_TOLERANCE:
            return trial
        reason = "the logits of its forward pass do not match those of its hidden states"
    raise UserError(f"{name} can't be scored ({reason}): use another model")


def _check_prefix_sharing(
    model: PreTrainedModel, longest_row: int, max_length: int | None, trial: PreTrainedModel | None
) -> None:
    """Raise a UserError if a row `[prompt | chosen | rejected]` and two rows give different log-probabilities.

    The check uses a trial model and a pair with the maximum lengths of both formats. It detects local, sliding and
    chunked attention, ALiBi, convolutions and recurrence, if the rows are long enough for them to matter.
    """
    name, fix = type(model).__name__, "pass --prefix_sharing false"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager", ATTENTION, FLEX):
        raise UserError(
            f"--attn_implementation {attention} does not support the custom mask of prefix sharing: use sdpa or "
            f"flex_attention, or {fix}"
        )
    if attention == FLEX and not torch.cuda.is_available():
        raise UserError("--attn_implementation flex_attention has no backward pass on the CPU: use sdpa")
    if trial is None or attention == FLEX:
        trial = _trial_model(model, model._response_head, attention)  # type: ignore[arg-type]
    pair = _trial_pair(trial, longest_row, max_length)
    plain = _trial_logps(trial, pair, False)
    try:
        shared = _trial_logps(trial, pair, True)
    except Exception as error:  # models may raise any exception: recurrent ones expect a (B, T) mask
        raise UserError(f"{name} rejects the mask of a shared prompt ({first_line(error)}): {fix}") from error
    difference = (shared - plain).abs().max().item()
    if not difference < CHECK_TOLERANCE * (1 if trial.dtype == torch.float64 else 10):  # also true for nan
        raise UserError(
            f"{name} has other log-probabilities with a shared prompt (by {difference:.2g} nats per token in a row of "
            f"{longest_row}; typical causes are local attention, ALiBi, convolutions and recurrence): {fix}"
        )


def _trial_model(model: PreTrainedModel, head: str | None = None, attention: str | None = None) -> PreTrainedModel:
    """A float64 model of the same class and configuration, with few layers, few tokens and other weights.

    The weights are normal with variance 1 / fan-in (LeCun et al. 1998, Efficient BackProp, §4.6). They are larger than
    those of a new model, so that every layer matters. Buffers are copied from the model. The trial model has eager
    attention if the model's attention needs CUDA or does not support float64, and has float32 if `attention` is `FLEX`.
    With `head` its forward is patched; see `_patch_forward`.
    """
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # grouped matrix products do not support float64
    if config._attn_implementation not in ("sdpa", ATTENTION):
        config._attn_implementation = attention or "eager"
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        trial = type(model)(config)
        trial.resize_token_embeddings(min(config.get_text_config().vocab_size, 100), mean_resizing=False)
    _cut_layers(trial)
    device = torch.device("cpu") if model.device.type == "mps" else model.device  # MPS has no float64
    if config._attn_implementation != FLEX:
        trial.double()
    trial.to_empty(device=device)
    trial.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            mean, deviation = (0, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else (1, 0.25)
            parameter.normal_(mean, deviation, generator=generator)
        own = {name.replace(".base_layer", ""): value for name, value in model.named_buffers()}  # LoRA wraps layers
        for name, buffer in trial.named_buffers():
            buffer.copy_(own[name])
    if head is not None:
        _patch_forward(trial, head)
    return trial.eval()


def _cut_layers(model: PreTrainedModel) -> None:
    """Keep the first layers: at least two, and enough to have one of each kind.

    Layers are of the same kind if their modules, shapes, settings and per-layer configuration are equal. A setting that
    increases by one from layer to layer is the layer's index and is ignored.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", 0)
    stacks = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == count]
    settings = {name: dict(enumerate(value)) for name, value in vars(config).items() if isinstance(value, list | tuple)}
    settings = {name: value for name, value in settings.items() if len(value) == count}
    for at, stack in enumerate(stacks):
        for index, layer in enumerate(stack):
            for name, module in layer.named_modules():
                own: dict[str, Any] = {
                    key: value for key, value in vars(module).items() if isinstance(value, int | float | str)
                }
                own |= {"class": type(module), "shapes": [each.shape for each in module.parameters(recurse=False)]}
                for key, value in own.items():
                    settings.setdefault(f"{at} {name} {key}", {})[index] = value
    kinds: list[list[Any]] = [[] for _ in range(count)]
    for values in settings.values():
        offsets = {value - index if type(value) is int else None for index, value in values.items()}
        if len(values) < 2 or len(offsets) > 1 or None in offsets:
            for index, kind in enumerate(kinds):
                kind.append(values.get(index))
    needed = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    if needed < count and stacks:
        for stack in stacks:
            del stack[needed:]
        config.num_hidden_layers = needed


def _trial_pair(model: PreTrainedModel, longest_row: int, max_length: int | None = None) -> dict[str, list[int]]:
    """A random pair with long rows: `[prompt | chosen | rejected]` has at least `longest_row` tokens, and
    `[prompt | chosen]` has the maximum length (`max_length`, limited by the model's positions).
    """
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(0)
    row = max(longest_row, 12)
    sequence = min(row, max_length or row, positions_of(model) or row)
    chosen = min(max(row // 4, row - sequence + 1), sequence - 1)
    tokens = torch.randint(config.vocab_size, (sequence + chosen - 1,), generator=generator).tolist()
    prompt = sequence - chosen
    return {"prompt_ids": tokens[:prompt], "chosen_ids": tokens[prompt:sequence], "rejected_ids": tokens[sequence:]}


@torch.no_grad()
def _trial_logps(model: PreTrainedModel, pair: dict[str, list[int]], prefix_sharing: bool) -> Tensor:
    """(N,) log-probabilities of the tokens of both responses, computed by the response head."""
    batch = PairCollator(0, prefix_sharing, model.config._attn_implementation == FLEX)([pair])
    return predicted_logps(model, {name: value.to(model.device) for name, value in batch.items()})[0]


@torch.no_grad()
def _own_logps(model: PreTrainedModel, pair: dict[str, list[int]], side: str) -> Tensor:
    """(N,) log-probabilities of a response's tokens, computed by the model's own forward of one row without padding."""
    row = torch.tensor([pair["prompt_ids"] + pair[side]], device=model.device)
    logps = model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, row[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
