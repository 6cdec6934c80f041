"""Which causal language models of transformers are scored right, with the prompt shared and without: docs/models.md.

    python benchmarks/model_classes.py > table.md            # every class, about ten minutes on one core
    python benchmarks/model_classes.py gpt_neo cohere         # these model types

Each class is built tiny, with random weights large enough that every layer matters, in float64. Its log-probabilities
of the responses of random pairs are computed by brute force: one forward pass of the model's own for each response, of
one row without padding, position ids or mask. These are compared with what the toolkit computes from the same pairs in
a padded batch, with prefix sharing where the toolkit accepts it and without. Rows are 66 tokens long with sharing;
windows, chunks and the like are 8 tokens, and 512 where sharing is refused then.

Exits with 1 where a class is accepted and its numbers differ.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from resdpo_trl.errors import UserError
from resdpo_trl.text import scoring
from resdpo_trl.text.tokens import PairCollator

TOLERANCE = 1e-3  # nats a response, of 9 to 24 tokens
LONGEST = 66  # tokens of the longest shared row
SHARED, WITHIN, UNSHARED = "yes", "yes, in rows within its window", "no: `--prefix_sharing false`"
REFUSED, NOT_BUILT, WRONG = "refused", "not tried", "WRONG"

SMALL: dict[str, Any] = {
    "vocab_size_per_layer_input": 128, "mamba_d_state": 16,
    "vocab_size": 128, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "intermediate_size": 48,
    "ffn_dim": 48, "n_inner": 48, "num_hidden_layers": 6, "n_layer": 6, "n_layers": 6, "num_layers": 6,
    "decoder_layers": 6, "encoder_layers": 6, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "max_position_embeddings": 512, "n_positions": 512,
    "max_seq_len": 512, "n_ctx": 512, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 4, "depth": 2, "image_size": 32, "patch_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "shared_expert_intermediate_size": 16, "index_head_dim": 16,
    "index_n_heads": 16,  # with few heads scores are zero and tie, and which keys are taken is arbitrary
}  # fmt: skip
WINDOWS = (
    "sliding_window", "attention_chunk_size", "window_size", "local_attention", "attention_window_size", "index_topk",
)  # fmt: skip
LATENT = (  # as many key as query heads
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
    "minicpm3", "sarvam_mla", "youtu", "dots3_note_text", "dots3_note", "bailing_hybrid",
)  # fmt: skip
ENCODERS = (
    "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {  # what further fields of a class must be where it is tiny
    **{kind: {"num_key_value_heads": 4} for kind in LATENT},
    **{kind: {"is_decoder": True} for kind in ENCODERS},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
        "laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "split_ngram_parts": 4,
    },
    "zamba": {"num_hidden_layers": 9, "attn_layer_period": 3, "attn_layer_offset": 1, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "mamba_d_state": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"causal": True},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"] * 3, "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
}  # fmt: skip


def small_config(config_class: Any, window: int, **special: Any) -> Any:
    """A tiny configuration: what is in `SMALL` of the fields that the class has, for its parts too."""
    fields = set(inspect.signature(config_class.__init__).parameters)
    fields |= set(getattr(config_class, "__dataclass_fields__", {}))
    options = {name: value for name, value in SMALL.items() if name in fields}
    options |= {name: window for name in WINDOWS if name in fields}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if not issubclass(part, PreTrainedConfig):
            part = type(getattr(config_class(), name))
        if issubclass(part, PreTrainedConfig):
            options[name] = small_config(part, window)
    return config_class(**options | special)


def tiny_model(kind: str, window: int) -> PreTrainedModel:
    """A tiny float64 model of a model type, its weights normal, of variance one over the fan-in."""
    config = small_config(CONFIG_MAPPING[kind], window, **SPECIAL.get(kind, {}))
    config._experts_implementation = "eager"  # grouped products take no float64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model


def random_pairs() -> list[dict[str, list[int]]]:
    """Four pairs of 66 tokens or fewer. Without sharing no row has more padding than a window: in float64 transformers'
    eager attention gives NaN for a query that sees nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 20, 17), (20, 22, 24), (28, 12, 15), (16, 26, 23)]
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            part: torch.randint(3, 128, (length,), generator=generator).tolist()
            for part, length in zip(parts, shape, strict=True)
        }
        for shape in shapes
    ]


@torch.no_grad()
def brute_force(model: PreTrainedModel, pairs: list[dict[str, list[int]]]) -> torch.Tensor:
    """(2, B) log-probabilities of the chosen and rejected responses."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            row = pair["prompt_ids"] + pair[side]
            logps = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double().log_softmax(-1)
            start = len(pair["prompt_ids"])
            sums.append(sum(logps[start - 1 + at, token].item() for at, token in enumerate(pair[side])))
    return torch.tensor(sums, dtype=torch.float64).view(2, -1)


@torch.no_grad()
def difference(model: PreTrainedModel, pairs: list[dict[str, list[int]]], own: torch.Tensor, sharing: bool) -> float:
    """The largest difference of a response's log-probability from brute force, in nats."""
    found = torch.stack(scoring.pair_logps(model, PairCollator(0, sharing)(pairs)))
    return (found.double() - own).abs().max().item()


def verdict(kind: str, window: int) -> tuple[str, str]:
    """What the toolkit does with a model type, and why."""
    try:
        model, pairs = tiny_model(kind, window), random_pairs()
        own = brute_force(model, pairs)
    except TimeoutError:
        raise
    except Exception as error:  # whatever a class raises where it is tiny or has text alone
        return NOT_BUILT, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    try:
        scoring.add_response_head(model)
    except UserError as error:
        return REFUSED, str(error)
    if not difference(model, pairs, own, sharing=False) < TOLERANCE:
        return WRONG, "without sharing"
    try:
        scoring.add_response_head(model, longest_row=LONGEST)
    except UserError as error:
        return UNSHARED, str(error)
    return (SHARED, "") if difference(model, pairs, own, sharing=True) < TOLERANCE else (WRONG, "with sharing")


def row_of(kind: str) -> str:
    """A row of the table: class, model type, prefix sharing, remark."""
    found, reason = verdict(kind, window=8)
    if found == UNSHARED and verdict(kind, window=512)[0] == SHARED:
        found = WITHIN
    remark = reason if found in (REFUSED, NOT_BUILT, WRONG) else ""
    return f"| {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | {kind} | {found} | {remark.replace('|', '/')} |"


def main() -> int:
    """Print the table's rows of the model types that are named, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types (gpt_neo cohere); all by default")
    parser.add_argument("--seconds", type=int, default=60, help="of processor time that a class may take")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    wrong = 0
    print("| class | model type | prefix sharing | remark |\n| --- | --- | --- | --- |")
    for kind in options.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.setitimer(signal.ITIMER_PROF, options.seconds)
        try:
            row = row_of(kind)
        except TimeoutError:
            row = (
                f"| {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | {kind} | {NOT_BUILT} | more than {options.seconds} s |"
            )
        signal.setitimer(signal.ITIMER_PROF, 0)
        wrong += WRONG in row
        print(row, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
