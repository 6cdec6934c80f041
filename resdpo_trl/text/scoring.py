"""Log-probabilities of responses under a language model, with the LM head run only where a response is predicted."""

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

# response tokens whose logits are held at once: 4,096 × GPT-2's vocabulary in float32 is 0.8 GB
CHUNK_TOKENS = 4096
FUSED_ON = ("cuda",)  # devices on which TRL's kernels compute the head; on the CPU its torch path is the slower one
VOCABULARY_TILE = 32768  # columns of the logits that TRL's kernels hold at once, as in TRL


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor], router_loss: bool = False) -> tuple[Tensor, ...]:
    """Log-probabilities of the chosen and rejected responses of a `PairCollator` batch.

    Args:
        model: a model given `add_response_head`, wrapped or not.
        batch: see `PairCollator`; B pairs.
        router_loss: return the load-balancing loss of a mixture of experts too, a scalar, as TRL adds it to DPO's. With
            E experts, of which each token is sent to k, it is
                E · Σ_e f_e·P_e,        f_e: assignments to e per token, P_e: the router's mean probability of e
            over the tokens of all layers (Switch Transformers, https://arxiv.org/abs/2101.03961, Eqs. 4 to 6; k = 1
            there). A prompt that is run once counts twice, as in two rows.

    Returns:
        chosen, rejected: (B,) float32 (float64 for a float64 model), sums over response tokens in nats.
    """
    logps, *router = predicted_logps(model, batch, batch["copies"] if router_loss else None)
    sums = logps.new_zeros(2 * len(batch["chosen_tokens"])).index_add(0, batch["response"], logps)
    return sums[0::2], sums[1::2], *router


def predicted_logps(
    model: torch.nn.Module, batch: dict[str, Tensor], router_weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(N,) log-probabilities of a batch's `predicted` tokens, and the router loss where (R, T) weights are given.

    Raises:
        UserError: what wraps the model has cast them, for their sums would be wrong.
    """
    names = ("input_ids", "attention_mask", "document", "part", "position_ids", "predicted_at", "predicted")
    given = {name: batch[name] for name in names if name in batch}
    found = model(**given, router_weights=router_weights, use_cache=False)
    logps, *router = (found,) if router_weights is None else found
    if logps.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"what wraps the model casts its log-probabilities to {logps.dtype}, whose sums over a response are wrong: "
            "let it leave the model's outputs in float32 (output_dtype of FSDP2's MixedPrecisionPolicy)"
        )
    return logps, *router


def add_response_head(model: PreTrainedModel, longest_row: int | None = None, max_length: int | None = None) -> None:
    """Teach `model(…, predicted_at=, predicted=)` to return (N,) log-probabilities of the predicted tokens.

    With `router_weights`, (R, T), it returns the load-balancing loss of its routers too; see `pair_logps`. Going
    through the model's own forward keeps what wraps it working: PEFT, DDP, FSDP2, autocast. Without these arguments the
    forward is the original one.

    Args:
        model: a causal language model, without its PEFT wrapper.
        longest_row: tokens of the longest shared row `[prompt | chosen | rejected]`; None without prefix sharing.
        max_length: tokens of a prompt with one response, at most; `longest_row` by default.

    Raises:
        UserError: the numbers would be wrong this way (see `_scored_trial`), or wrong where the prompt is shared.
    """
    trial = None
    if not hasattr(model, "_response_head"):
        trial = _scored_trial(model)
        _patch_forward(model, trial._response_head)  # type: ignore[arg-type]
    if longest_row is not None:
        _check_prefix_sharing(model, longest_row, max_length, trial)


def _patch_forward(model: PreTrainedModel, head: str) -> None:
    """Where `head` is "linear", the LM head gives log-probabilities itself, a chunk of logits at a time, scaled or
    capped where the model does that (Cohere, Granite, Gemma 2). Where it is "own", the rest of the model's own forward
    makes the logits from the N hidden states alone: models that transform these first (BERT).
    """
    original = model.forward
    config = model.config.get_text_config()
    # the logits are c·tanh(s·W·h / c), or s·W·h where there is no c
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)

    # the signature of the class: `generate` checks its arguments against it
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
            return original(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT adds labels=None, for one
        kwargs = _with_mask(self, given)
        if router_weights is not None:
            kwargs["output_router_logits"] = True
        routers: list[Any] = []

        def keep_predicted(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            routers.append(getattr(output, "router_logits", None))
            output.router_logits = None  # of which the model's own forward would make a loss too
            rows, columns = predicted_at
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]  # (1, N, D)
            return output

        backbone = self.base_model
        if backbone is self:  # Llama 4 says a wrong prefix
            backbone = next(child for child in self.children() if isinstance(child, PreTrainedModel))
        with backbone.register_forward_hook(keep_predicted):
            if head == "linear":
                hidden = backbone(*args, **kwargs).last_hidden_state[0]
                logps = _token_logps(self.get_output_embeddings(), hidden, predicted, softcap, scale)
            else:
                logps = _LogProbs.apply(original(*args, **kwargs).logits[0], predicted)
        if router_weights is None:
            return logps
        return logps, _router_loss(self, routers[0], router_weights)

    model.forward = types.MethodType(forward, model)
    if head == "linear" and type(linear := model.get_output_embeddings()) is torch.nn.Linear:
        linear.__class__ = _ResponseHead
        linear.softcap, linear.scale = softcap, scale  # type: ignore[assignment]
    model._response_head = head  # type: ignore[assignment]


def _with_mask(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Eager attention adds its mask to the scores; SDPA takes a boolean one, `FLEX` one of blocks.

    The block mask goes through the layers as a keyword of its own. The mask of one cell keeps transformers from making
    a dense one: it takes what has four dimensions as it is.
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
    """(N, D) hidden states and (N,) tokens -> (N,) log-probabilities."""
    if isinstance(head, _ResponseHead):
        return head(hidden, predicted)
    # with an adapter, or quantized: in one piece
    return _LogProbs.apply(_transformed(head(hidden), softcap, scale), predicted)


def _transformed(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ResponseHead(torch.nn.Linear):
    """An LM head that gives log-probabilities where tokens are given; `CHUNK_TOKENS` rows of logits at once, at most.

    In one call of the module: FSDP2 gathers its weights for a call and scatters them after its backward pass. On CUDA,
    and where the logits are scaled or capped, by TRL's function, which holds tiles of logits and sums in float32.
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
        # the logits of a chunk are computed again in the backward pass
        chunks = zip(rows.split(CHUNK_TOKENS), tokens.split(CHUNK_TOKENS), strict=True)
        return torch.cat([checkpoint(logps, *chunk, use_reentrant=False) for chunk in chunks])


class _LogProbs(torch.autograd.Function):
    """log softmax(logits)[token], and its gradient (one-hot − softmax): float32 whatever the logits' type, and a few
    rows at a time, so that no float32 copy of (N, vocabulary) is ever written.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normalizer = torch.cat([in_float32(rows).logsumexp(1) for rows in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, tokens, normalizer)
        return in_float32(logits.gather(1, tokens[:, None])[:, 0]) - normalizer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, normalizer = ctx.saved_tensors
        # in the logits' place: a second backward pass through them is an error, not a wrong number
        rows = _rows_at_once(logits)
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            weights = gradient[part, None]
            softmax = (in_float32(logits[part]) - normalizer[part, None]).exp_()
            logits[part] = softmax.mul_(-weights).scatter_add_(1, tokens[part, None], weights)
        return logits, None


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose float32 copy one core's cache holds; on a GPU few launches matter more."""
    return 16 if logits.device.type == "cpu" else 2048


def _router_loss(model: PreTrainedModel, router_logits: Any, weights: Tensor) -> Tensor:
    """The load-balancing loss of `pair_logps`, from the (R·T, E) logits of every layer and (R, T) weights."""
    balance: Callable[..., Any] = load_balancing_loss_func  # annotated as if it took one layer
    try:
        tokens, experts = router_logits[0].shape
        virtual = tokens // len(weights) - weights.shape[1]  # which prompt tuning puts before a row
        weights = F.pad(weights, (virtual, 0), value=1)
        # one function for every family, as TRL does
        loss: Tensor = balance(router_logits, experts, model.config.get_text_config().num_experts_per_tok, weights)
    except Exception as error:  # routers of another form: whatever that raises
        raise UserError(
            f"{type(model).__name__}'s router loss can't be computed ({first_line(error)}): pass "
            "--router_aux_loss_coef 0"
        ) from error
    return loss


# --- what the numbers are checked with ---------------------------------------------------------------------------

CHECK_TOLERANCE = 1e-4  # nats per token; modules that compute in float32 whatever the model's type leave 1e-5

# PEFT methods that change weights, or what a layer makes of each token by itself
PER_TOKEN = {
    "LORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW",
    "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
# PEFT methods that put tokens, or keys and values, before a row
BEFORE_THE_ROW = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"}


def check_adapters(model: Any, new: PeftConfig | None, prefix_sharing: bool) -> None:
    """Raise a UserError for a PEFT method whose numbers would be wrong; tests/text/test_peft.py has them all.

    Not supported are those that need a task's number (POLY), calls at every step (ADALORA) or a loss of their own
    (CPT), and those in which a token's numbers depend on what else is in the batch (LILY).

    Args:
        model: the model; its adapters are checked where it has some.
        new: the adapter that it gets.
    """
    for config in (new, *getattr(model, "peft_config", {}).values()):
        if config is None:
            continue
        method = config.peft_type.value
        for option in ("alora_invocation_tokens", "use_asa"):  # which depend on a row's end, and on calls at each step
            if getattr(config, option, None):
                raise UserError(f"the PEFT method {method} is not supported with {option}: leave it out")
        if method not in PER_TOKEN | BEFORE_THE_ROW:
            raise UserError(f"the PEFT method {method} is not supported: use LoRA (--use_peft)")
        if method in BEFORE_THE_ROW and prefix_sharing:
            raise UserError(
                f"the PEFT method {method} puts virtual tokens before a row, and the mask of a shared prompt has no "
                "place for them: pass --prefix_sharing false"
            )


def _scored_trial(model: PreTrainedModel) -> PreTrainedModel:
    """A trial model with the first of `_patch_forward`'s ways that gives what the model's own forward gives.

    Raises:
        UserError: none does, or the model sees the tokens that it should predict.
    """
    name, reason = type(model).__name__, ""
    for head in ("linear", "own"):
        try:
            trial = _trial_model(model)
            pair = _trial_pair(trial, 130)  # more than the chunks of 64 of Reformer's random hashing, for one
            own = torch.cat([_own_logps(trial, pair, side) for side in ("chosen_ids", "rejected_ids")])
            before = _own_logps(trial, pair | {"chosen_ids": pair["chosen_ids"][:-1]}, "chosen_ids")
            _patch_forward(trial, head)
            found = _trial_logps(trial, pair, False)
        except Exception as error:  # of a forward pass that has another form: whatever it raises
            reason = first_line(error)
            continue
        if not (before - own[: len(before)]).abs().max() < CHECK_TOLERANCE:
            raise UserError(
                f"{name} sees the tokens that it should predict, so it gives no log-probability of a response: use "
                "another model, or set is_decoder in its config.json where it has that"
            )
        if (found - own).abs().max() < CHECK_TOLERANCE:
            return trial
        reason = "the logits of its own forward pass are not those of its hidden states"
    raise UserError(f"{name} can't be scored ({reason}): use another model")


def _check_prefix_sharing(
    model: PreTrainedModel, longest_row: int, max_length: int | None, trial: PreTrainedModel | None
) -> None:
    """Raise a UserError where a row `[prompt | chosen | rejected]` gives other numbers than two rows.

    Decided by a trial model and a pair whose rows are as long as they may be either way. Local, sliding and chunked
    attention, ALiBi, convolutions and recurrence show in it where the rows are long enough for them to matter.
    """
    name, fix = type(model).__name__, "pass --prefix_sharing false"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager", ATTENTION, FLEX):
        raise UserError(
            f"--attn_implementation {attention} takes no mask of its own, as prefix sharing needs: use sdpa or "
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
    except Exception as error:  # recurrent models expect a (B, T) mask, for one: whatever they raise
        raise UserError(f"{name} does not take the mask of a shared prompt ({first_line(error)}): {fix}") from error
    difference = (shared - plain).abs().max().item()
    if not difference < CHECK_TOLERANCE * (1 if trial.dtype == torch.float64 else 10):  # nor NaN
        raise UserError(
            f"{name} gives other log-probabilities where a pair's prompt is shared (by {difference:.2g} nats per token "
            f"in a row of {longest_row}; local attention, ALiBi, a convolution or recurrence does that): {fix}"
        )


def _trial_model(model: PreTrainedModel, head: str | None = None, attention: str | None = None) -> PreTrainedModel:
    """A float64 model of the same class and configuration: a few layers of every kind, few tokens, other weights.

    The weights are large enough that every layer matters (normal, of variance one over the fan-in: LeCun et al. 1998,
    Efficient BackProp, §4.6), which those of a new model are not. Buffers are the model's own. Attention that only CUDA
    has, or that takes no float64, is not tried: the trial model has eager attention then, or float32 where `attention`
    asks for `FLEX`. With `head` its forward is patched; see `_patch_forward`.
    """
    config = copy.deepcopy(model.config)
    config._experts_implementation = "eager"  # grouped products take no float64
    if config._attn_implementation not in ("sdpa", ATTENTION):
        config._attn_implementation = attention or "eager"
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        trial = type(model)(config)
        trial.resize_token_embeddings(min(config.get_text_config().vocab_size, 100), mean_resizing=False)
    _cut_layers(trial)
    device = torch.device("cpu") if model.device.type == "mps" else model.device  # which has no float64
    if config._attn_implementation != FLEX:
        trial.double()
    trial.to_empty(device=device)
    trial.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            mean, deviation = (0, parameter.shape[-1] ** -0.5) if parameter.ndim > 1 else (1, 0.25)
            parameter.normal_(mean, deviation, generator=generator)
        own = {name.replace(".base_layer", ""): value for name, value in model.named_buffers()}  # under a LoRA
        for name, buffer in trial.named_buffers():
            buffer.copy_(own[name])
    if head is not None:
        _patch_forward(trial, head)
    return trial.eval()


def _cut_layers(model: PreTrainedModel) -> None:
    """Leave the first layers, as many as it takes to have one of each kind and at least two.

    Layers are of one kind where their modules, shapes and settings are the same, and so is what the configuration lists
    for each. A setting that grows by one from layer to layer is the layer's number.
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
    """A random pair of long rows: `[prompt | chosen | rejected]` is no shorter than `longest_row`, and
    `[prompt | chosen]` is as long as one of a pair may be (`max_length`, and within the model's positions).
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
    """(N,) log-probabilities of the tokens of both responses through the response head."""
    batch = PairCollator(0, prefix_sharing, model.config._attn_implementation == FLEX)([pair])
    return predicted_logps(model, {name: value.to(model.device) for name, value in batch.items()})[0]


@torch.no_grad()
def _own_logps(model: PreTrainedModel, pair: dict[str, list[int]], side: str) -> Tensor:
    """(N,) log-probabilities of a response's tokens by the model's own forward of one row, without padding."""
    row = torch.tensor([pair["prompt_ids"] + pair[side]], device=model.device)
    logps = model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, row[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
