"""Language models and tokenizers: loaded from a folder or the Hub, or built from scratch for the quickstart."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import GELUTanh, NewGELUActivation

from resdpo_trl.errors import UserError
from resdpo_trl.sources import check_model_folder, first_line
from resdpo_trl.text.attention import CPU_ATTENTION
from resdpo_trl.text.config import ScratchConfig, TextModelConfig
from resdpo_trl.text.fused import use_fused_layers
from resdpo_trl.text.tokens import SHORTEST

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str, model: TextModelConfig, trust_remote_code: bool, flag: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub id; padding is the end of text where it has none of its own."""
    check_model_folder(name, flag)
    if trust_remote_code:
        _say_that_code_runs(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of a malformed tokenizer.json: KeyError, TypeError, and tokenizers' bare Exception
        raise not_a_model(name, flag, error) from None
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, model: TextModelConfig, trust_remote_code: bool, flag: str) -> PreTrainedModel:
    """A causal language model, quantized if asked; a folder with a PEFT adapter gives a trainable `PeftModel`."""
    from trl import get_quantization_config

    check_model_folder(name, flag)
    if trust_remote_code:
        _say_that_code_runs(name)
    quantization = get_quantization_config(model)
    options = loading_options(model, trust_remote_code)
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    try:
        if (Path(name) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            loaded = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise not_a_model(name, flag, error) from None
    for module in loaded.modules():
        # where the CPU has bfloat16, bitsandbytes 0.50 repacks 4-bit weights for inference at the first evaluation
        # and has no gradient through them from then on: training would go on without a word and without learning
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return with_faster_parts(loaded, chosen=model.attn_implementation is None)


def with_faster_parts(model: PreTrainedModel, chosen: bool = True) -> PreTrainedModel:
    """GPT-2's GELU as PyTorch's one kernel (transformers' eight take a tenth of a step), and on the CPU the layers of
    `resdpo_trl.text.fused` and the attention of `resdpo_trl.text.attention` where it is ours to choose.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
    base = base_model(model)
    on_cpu = PartialState().device.type == "cpu"
    if on_cpu:
        use_fused_layers(base)
    if chosen and on_cpu and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(CPU_ATTENTION)
    return model


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def loading_options(model: TextModelConfig, trust_remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` of every model gets from the flags."""
    return {
        "revision": model.model_revision,
        "dtype": model.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype),
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, trained on these texts; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def build_model(
    config: ScratchConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> PreTrainedModel:
    """A small GPT-2 with random weights, drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=max(512, max_length),
                n_embd=config.scratch_width,
                n_layer=config.scratch_layers,
                n_head=config.scratch_heads,
                resid_pdrop=config.scratch_dropout,
                embd_pdrop=config.scratch_dropout,
                attn_pdrop=0.0,  # with it SDPA leaves its fused kernel: a fifth of a CPU step
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return with_faster_parts(model)


def unfrozen(model: torch.nn.Module, patterns: Sequence[str], adapter: bool) -> set[str]:
    """The names of the parameters in which one of the regular expressions is found.

    Raises:
        UserError: there is none, or the model gets an `adapter`, which is trained alone.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    if not found:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        raise UserError(
            f"--unfrozen_parameters {' '.join(patterns)}: in no parameter's name; the model has "
            f"{', '.join(modules[:3])}, … {', '.join(modules[-2:])}"
        )
    if adapter and len(found) < len(names):
        raise UserError(
            f"--unfrozen_parameters {' '.join(patterns)}: an adapter (--use_peft) is trained alone; pass "
            "--unfrozen_parameters . with it"
        )
    return found


def positions_of(model: PreTrainedModel) -> int | None:
    """The longest text in tokens that a model takes; None where it sets no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, max_new_tokens: int = 0
) -> None:
    """Raise a UserError where the cap, an answer with the end of its prompt, or the vocabulary is more than the model
    has."""
    config, positions = model.config.get_text_config(), positions_of(model)
    if positions is not None and max_length > positions:
        raise UserError(f"--max_length {max_length}: the model has {positions} positions; pass at most that")
    if positions is not None and max_new_tokens > positions - SHORTEST // 2:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: must leave {SHORTEST // 2} of the model's {positions} positions to "
            "the prompt"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: they do not belong together"
        )


def check_same_tokenizer(
    first: PreTrainedTokenizerBase, first_flag: str, second: PreTrainedTokenizerBase, second_flag: str
) -> None:
    """Raise a UserError where the same text would become other tokens."""
    if first.get_vocab() != second.get_vocab() or first.eos_token_id != second.eos_token_id:
        raise UserError(
            f"{second_flag} has another tokenizer than {first_flag} ({len(second)} and {len(first)} tokens): a "
            "reference must come from the same model family; pass one that was trained from it"
        )


@functools.cache
def _say_that_code_runs(name: str) -> None:
    print(
        f"WARNING: --trust_remote_code: Python files that {name} brings are run with your rights; read them first",
        file=sys.stderr,
    )


def not_a_model(name: str, flag: str, error: BaseException) -> UserError:
    """What to say where transformers can't load a model."""
    reason = first_line(error)
    if "ignore_mismatched_sizes" in reason:  # transformers' words for it name an argument that nobody here passes
        reason = "its weights have other shapes than its config.json says"
    if Path(name).is_dir():
        return UserError(f"{flag} {name}: can't be loaded ({reason})")
    return UserError(
        f"{flag} {name}: not a local folder, and the Hub does not give it ({reason}); pass the folder of a model saved "
        "with save_pretrained, or leave the flag out to build a small one"
    )
