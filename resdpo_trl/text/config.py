"""The options of the text recipes, as dataclasses over TRL's. The data's stand in `resdpo_trl.text.data`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import PAIR_FIGURES
from resdpo_trl.text.tokens import SHORTEST
from resdpo_trl.training.arguments import (
    OneMachine,
    ReferenceUpdate,
    check_positive,
    has_bfloat16,
    has_cuda,
    preference_loss,
    refuse,
)

# transformers' fields that no trainer here honors: value that means "not asked for", and what to do instead
REFUSED_EVERYWHERE: dict[str, tuple[Any, str]] = {
    "bf16_full_eval": (False, "evaluation has the precision of training; see --bf16"),
    "fp16_full_eval": (False, "evaluation has the precision of training; see --fp16"),
    "prediction_loss_only": (False, "evaluation keeps figures of rows, not logits"),
    "eval_accumulation_steps": (None, "evaluation keeps figures of rows, not logits"),
    "batch_eval_metrics": (False, "evaluation is the mean over all rows"),
    "include_for_metrics": ([], "evaluation is the mean over all rows"),
    "eval_use_gather_object": (False, "evaluation gathers numbers alone"),
    "eval_do_concat_batches": (True, "evaluation is the mean over all rows"),
    "label_names": (None, "the columns are the trainer's own"),
    "length_column_name": ("length", "the column is the trainer's own"),
    "use_cache": (False, "training has no use for a cache"),
    "enable_jit_checkpoint": (False, "SIGTERM and Ctrl-C end a run after a checkpoint already"),
    "local_rank": (-1, "launch with accelerate or torchrun, which say it by the environment"),
    "do_train": (False, "the recipe says what is done"),
    "do_predict": (False, "the recipe says what is done; pass --num_samples for answers"),
}
# `DPOConfig` fields that this trainer does not honor
REFUSED: dict[str, tuple[Any, str]] = REFUSED_EVERYWHERE | {
    "label_smoothing_factor": (0.0, "it smooths the tokens of SFT; DPO's is --label_smoothing"),
    "average_tokens_across_devices": (True, "the loss is a mean over pairs"),
    "liger_kernel_config": (None, "the loss has its own LM head"),
    "ld_alpha": (None, "it weighs tokens inside TRL's own forward"),
    "use_weighting": (False, "it weighs pairs inside TRL's own forward"),
    "padding_free": (False, "batches are of like length already"),
    "truncation_mode": ("keep_start", "the cap keeps every pair; see --max_response_length"),
    "use_liger_kernel": (False, "the loss has its own LM head"),
    "model_init_kwargs": (None, "use --dtype, --attn_implementation and --model_revision"),
    "pad_token": (None, "set it in the tokenizer's folder"),
    "pad_to_multiple_of": (None, "batches are padded to their longest row"),
    "dataset_num_proc": (None, "tokenizing uses every core already"),
    "sync_ref_model": (False, "pass --reference_update polyak"),
    "ref_model_mixup_alpha": (0.6, "pass --reference_update polyak --polyak_tau"),
    "ref_model_sync_steps": (512, "--reference_update polyak moves at every step, copy at each epoch's end"),
}
REFUSED_SFT: dict[str, tuple[Any, str]] = (
    REFUSED_EVERYWHERE
    | {
        "packing": (False, "batches are of like length already"),
        "packing_strategy": ("bfd", "batches are of like length already"),
        "eval_packing": (None, "batches are of like length already"),
        "shuffle_dataset": (False, "every epoch draws its batches anew; see --train_sampling_strategy"),
        "dataset_text_field": ("text", "the texts are prompt and chosen"),
        "assistant_only_loss": (False, "see --completion_only_loss"),
        "dataset_kwargs": (None, "the pairs are tokenized here"),
        "chat_template_path": (None, "set it in the tokenizer's folder"),
        "eos_token": (None, "set it in the tokenizer's folder"),
    }
    | {
        name: REFUSED[name]
        for name in (
            "padding_free",
            "truncation_mode",
            "model_init_kwargs",
            "pad_token",
            "pad_to_multiple_of",
            "dataset_num_proc",
        )
    }
)
REFUSED_REWARD: dict[str, tuple[Any, str]] = (
    REFUSED_EVERYWHERE
    | {
        "label_smoothing_factor": (0.0, "it smooths the tokens of SFT; a reward model has none"),
    }
    | {
        name: REFUSED_SFT[name] if name in REFUSED_SFT else REFUSED[name]
        for name in (
            "model_init_kwargs",
            "pad_token",
            "pad_to_multiple_of",
            "dataset_num_proc",
            "chat_template_path",
            "eos_token",
            "use_liger_kernel",
            "average_tokens_across_devices",
            "liger_kernel_config",
        )
    }
)
# `ModelConfig` fields that say how an adapter is made, and how 4-bit weights are stored
OF_PEFT = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")

# what the SFT stage does not take from the stage after it, though both have the field; nor what is of the Hub
OF_ONE_STAGE = {
    "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "loss_type",
    "label_smoothing_factor", "neftune_noise_alpha", "metric_for_best_model", "greater_is_better", "select",
    "load_best_model_at_end", "resume_from_checkpoint", "report_to",
    # transformers writes the old names, which stand for these, into the new ones
    "gradient_checkpointing", "activation_checkpointing", "activation_checkpointing_kwargs",
}  # fmt: skip


@dataclass
class SamplesConfig:
    """The answers in samples.jsonl."""

    _argument_group_name = "samples"

    num_samples: int = field(
        default=8, metadata={"help": "Held-out prompts that base, reference and policy answer; 0 for none."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer, at most."})

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.max_new_tokens < 1:
            raise UserError("--num_samples must be at least 0 and --max_new_tokens at least 1")


@dataclass
class TextModelConfig(ModelConfig):
    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Any causal language model: a Hub id, a folder, a .gguf file, or smollm2 (the default), which "
            "needs no network."
        },
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default=None,
        metadata={
            "help": "Precision of the weights; by default float32, and bfloat16 for frozen ones under an adapter that "
            "trains with --bf16."
        },
    )

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})

    def __post_init__(self) -> None:
        super().__post_init__()
        unset = {each.name: each.default for each in fields(ModelConfig)}
        refuse(self, {"lora_task_type": ("CAUSAL_LM", "the recipe sets it")})
        if not self.use_peft:
            refuse(self, {name: (unset[name], "it is of an adapter: add --use_peft, or drop it") for name in OF_PEFT})
        if not self.load_in_4bit:
            refuse(self, {name: (unset[name], "it is of 4-bit weights: add --load_in_4bit") for name in OF_4BIT})


@dataclass
class SFTStageConfig:
    """The first stage: the reference, by supervised fine-tuning on the preferred responses."""

    _argument_group_name = "SFT stage"

    reference: str | None = field(
        default=None, metadata={"help": "A folder or Hub id of a finished reference: skips SFT."}
    )
    sft_epochs: float = field(default=1.0, metadata={"help": "Epochs of SFT; 0 takes the model as it is."})
    sft_learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate of SFT; ten times that with --use_peft."}
    )
    sft_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of an SFT step on each device; --per_device_train_batch_size by default."}
    )
    sft_completion_only_loss: bool = field(
        default=True, metadata={"help": "Learn the response's tokens alone (true) or the prompt's too (false)."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sft_epochs < math.inf:
            raise UserError(f"--sft_epochs {self.sft_epochs}: must be at least 0")
        check_positive(self, "sft_learning_rate")


@dataclass
class ShortDialogues(OneMachine):
    """`OneMachine` with a cap on tokens and batches of like length."""

    max_length: int | None = field(
        default=256, metadata={"help": "Tokens of a prompt with one response, at most; no pair is lost to it."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Batches of like length (group_by_length), or none such (random, sequential).",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )
    metric_for_best_model: str | None = field(
        default="eval_loss", metadata={"help": "Figure by which the best epoch is chosen."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Not supported: batches are padded to their longest row."}
    )
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that make batches; 2 with a GPU by default, none without."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "Add a trained LoRA adapter to its base model, and keep that full model instead of it."},
    )

    def __post_init__(self) -> None:
        if self.max_length is None or self.max_length < SHORTEST:
            raise UserError(f"--max_length {self.max_length}: must be at least {SHORTEST} tokens")
        args: Any = self
        if args.do_eval and self.eval_strategy == "no":
            raise UserError("--do_eval is not supported here: pass --eval_strategy epoch or steps")
        if args.activation_offloading and not has_cuda(args.use_cpu):
            raise UserError("--activation_offloading moves activations off a GPU, and there is none: drop it")
        if args.liger_kernel_config is not None and not args.use_liger_kernel:
            raise UserError("--liger_kernel_config is of the Liger kernels: add --use_liger_kernel, or drop it")
        if self.metric_for_best_model is not None and args.greater_is_better is None:  # transformers knows losses alone
            args.greater_is_better = not self.metric_for_best_model.endswith(("loss", "rejected"))
        on_gpu = has_cuda(args.use_cpu)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_gpu else 0
        if args.accelerator_config is None and on_gpu:  # copies run while the GPU computes; memory is pinned by default
            args.accelerator_config = {"non_blocking": args.dataloader_pin_memory}
        super().__post_init__()


@dataclass
class TextDPOConfig(ReferenceUpdate, ShortDialogues, DPOConfig):  # type: ignore[misc]  # it may be None here
    """`trl.DPOConfig` with this project's defaults, and the sharing of the prompt."""

    _argument_group_name = "DPO and training"
    figures = PAIR_FIGURES

    output_dir: str | None = field(default="runs/dpo_hh", metadata={"help": "The run's folder."})
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate of DPO; ten times that with --use_peft."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "How strongly the loss ties the policy to the reference; IPO's τ."}
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Run a pair's prompt once for both responses; the numbers are the same."}
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Compute the reference's log-probabilities once, before training, and keep no reference model in "
            "memory. Not done where --reference_update moves it."
        },
    )
    reference_cache_dir: str = field(
        default="auto",
        metadata={
            "help": "Folder that keeps the reference's log-probabilities for later runs; 'auto' is below HF_HOME, "
            "'none' keeps none."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        refuse(self, REFUSED)
        preference_loss(self)  # refuse what makes no sense before anything is loaded
        asked_for_best = self.select == "best" or self.load_best_model_at_end
        super().__post_init__()
        self.select_asked = self.select  # which the SFT stage follows whether or not the reference moves after it
        if self.reference_update != "frozen":
            # what is computed once would be out of date, and so would losses of different epochs
            self.precompute_ref_log_probs = self.load_best_model_at_end = False
            self.select = "last"
            if asked_for_best:
                raise UserError(
                    f"--select best compares the losses of epochs, and --reference_update {self.reference_update} "
                    "moves what they are measured against: pass --select last"
                )


@dataclass
class TextSFTConfig(ShortDialogues, SFTConfig):  # type: ignore[misc]  # as above
    """`trl.SFTConfig` with this project's defaults."""

    _argument_group_name = "SFT and training"
    figures = ("loss",)

    output_dir: str | None = field(default="runs/sft_hh", metadata={"help": "The run's folder."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate; ten times that with --use_peft."})
    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Learn the response's tokens alone (true) or the prompt's too (false)."}
    )

    def __post_init__(self) -> None:
        refuse(self, REFUSED_SFT)
        super().__post_init__()


@dataclass
class TextRewardConfig(ShortDialogues, RewardConfig):  # type: ignore[misc]  # as above
    """`trl.RewardConfig` with this project's defaults."""

    _argument_group_name = "reward model and training"
    figures = tuple(name for name in PAIR_FIGURES if not name.startswith("logps/"))

    output_dir: str | None = field(default="runs/reward_hh", metadata={"help": "The run's folder."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate; ten times that with --use_peft."})

    def __post_init__(self) -> None:
        refuse(self, REFUSED_REWARD)
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise UserError(f"--center_rewards_coefficient {self.center_rewards_coefficient}: must be at least 0")
        super().__post_init__()


def sft_stage(own: TextDPOConfig | TextRewardConfig, sft: SFTStageConfig) -> TextSFTConfig:
    """The configuration of the SFT stage before another: its own epochs, rate and batch, the rest from that stage."""
    both = {each.name for each in fields(own)} & {each.name for each in fields(TextSFTConfig)}
    return TextSFTConfig(
        num_train_epochs=sft.sft_epochs,
        learning_rate=sft.sft_learning_rate,
        completion_only_loss=sft.sft_completion_only_loss,
        per_device_train_batch_size=sft.sft_batch_size or own.per_device_train_batch_size,
        gradient_checkpointing=own.gradient_checkpointing or None,
        report_to=own.report_to or "none",
        select=own.select_asked if isinstance(own, TextDPOConfig) else own.select,
        **{name: getattr(own, name) for name in sorted(both) if name not in OF_ONE_STAGE and "hub" not in name},
    )


def named_models(words: Sequence[str]) -> dict[str, str]:
    """name -> folder or Hub id, in the order given, of the words NAME=PATH after --models."""
    named: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not name or not equals or not path:
            raise UserError(f"--models {word}: needs NAME=PATH, e.g. good=runs/good/policy")
        if name in named:
            raise UserError(f"--models: the name {name} is given twice")
        named[name] = path
    if not named:
        raise UserError("--models: name at least one, e.g. --models reference=runs/a/reference policy=runs/a/policy")
    return named


@dataclass
class ChatConfig:
    """Which models answer, and how."""

    _argument_group_name = "chat"

    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "NAME=PATH of every model: a folder (LoRA adapters too) or a Hub id. Without it the models of RUN."
        },
    )
    prompt: str | None = field(
        default=None, metadata={"help": "Answer this message and exit; - reads the message from stdin."}
    )
    system: str | None = field(
        default=None, metadata={"help": "A system message, for models with a chat template that takes one."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens of an answer, at most."})
    do_sample: bool = field(default=False, metadata={"help": "Draw the answers; greedy otherwise."})
    temperature: float = field(default=1.0, metadata={"help": "Of --do_sample."})
    top_p: float = field(default=1.0, metadata={"help": "Of --do_sample."})
    seed: int = field(default=42, metadata={"help": "Draws the first answers; seed + 1 the second ones, and so on."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's repository brings."})

    def __post_init__(self) -> None:
        if self.models is not None:
            named_models(self.models)
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt: is empty; pass a message, or - to read it from stdin")
        if self.system is not None and not self.system.strip():
            raise UserError("--system: is empty; pass a message, or drop the flag")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        check_positive(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be in (0, 1]")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise UserError("--temperature and --top_p shape what is drawn: pass --do_sample with them")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must lie between 0 and {2**32 - 1}")


@dataclass
class ChatModelConfig(TextModelConfig):
    """How the models that chat are loaded.

    Generation of one row reads the weights once a token, so they are stored as bfloat16: autocast would convert them
    again at every token.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default=None,
        metadata={"help": "Precision of the weights; bfloat16 where the hardware has it, float32 elsewhere."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            self,
            {
                "model_name_or_path": (None, "name the models with --models NAME=PATH"),
                "use_peft": (False, "a folder with a LoRA adapter is loaded as it is"),
            },
        )
        if self.dtype is None:
            self.dtype = "bfloat16" if has_bfloat16() else "float32"
