"""Options of the text recipes, as subclasses of TRL's dataclasses. `resdpo_trl.text.data` has those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import PAIR_FIGURES
from resdpo_trl.text.tokens import SHORTEST
from resdpo_trl.training import arguments
from resdpo_trl.training.arguments import (
    FromReference,
    OneMachine,
    ReferenceUpdate,
    check_positive,
    has_bfloat16,
    has_cuda,
    option,
    preference_loss,
    refuse,
)

LENGTHS = "batches already have rows of similar length"
OWN_FORWARD = "it weights tokens or pairs inside TRL's own forward"
FOLDER = "set it in the tokenizer's folder"
# fields of TRL's configurations that no trainer here supports, and the alternative
REFUSED = arguments.REFUSED | {
    "ld_alpha": OWN_FORWARD,
    "use_weighting": OWN_FORWARD,
    "padding_free": LENGTHS,
    "packing": LENGTHS,
    "packing_strategy": LENGTHS,
    "eval_packing": LENGTHS,
    "pad_to_multiple_of": "batches are padded to their longest row",
    "truncation_mode": "truncation keeps every pair; see --max_response_length",
    "model_init_kwargs": "use --dtype, --attn_implementation and --model_revision",
    "pad_token": FOLDER,
    "eos_token": FOLDER,
    "chat_template_path": FOLDER,
    "dataset_num_proc": "tokenization already uses every core",
    "dataset_kwargs": "the pairs are tokenized here",
    "dataset_text_field": "SFT trains on the prompt and the chosen response",
    "shuffle_dataset": "every epoch draws new batches; see --train_sampling_strategy",
    "assistant_only_loss": "see --completion_only_loss",
    "sync_ref_model": "pass --reference_update polyak",
    "ref_model_mixup_alpha": "pass --reference_update polyak --polyak_tau",
    "ref_model_sync_steps": "--reference_update polyak updates after every step, and copy between epochs",
}
# fields that SFT supports, but DPO and reward models do not
REFUSED_BUT_FOR_SFT = {
    "label_smoothing_factor": "it smooths the tokens of SFT; DPO uses --label_smoothing",
    "average_tokens_across_devices": "the loss is a mean over pairs",
    "liger_kernel_config": "the loss has its own LM head",
    "use_liger_kernel": "the loss has its own LM head",
}
# fields of `ModelConfig` that configure an adapter, and the storage of 4-bit weights
OF_PEFT = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
OF_4BIT = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


@dataclass
class SamplesConfig:
    """Options of the answers in samples.jsonl."""

    _argument_group_name = "samples"

    num_samples: int = option(8, "Number of held-out prompts that base, reference and policy answer; 0 disables this.")
    max_new_tokens: int = option(64, "Maximum number of tokens per answer.")

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.max_new_tokens < 1:
            raise UserError("--num_samples must be at least 0 and --max_new_tokens at least 1")


@dataclass
class TextModelConfig(ModelConfig):
    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        None,
        "A causal language model: a Hub id, a folder, a .gguf file, or smollm2 (the default; it needs no network).",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = option(
        None,
        "Precision of the weights. The default is float32, or bfloat16 for the frozen weights under an adapter with "
        "--bf16.",
    )
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, {"lora_task_type": "the recipe sets it"})
        if not self.use_peft:
            refuse(self, dict.fromkeys(OF_PEFT, "it configures an adapter: add --use_peft, or remove it"))
        if not self.load_in_4bit:
            refuse(self, dict.fromkeys(OF_4BIT, "it configures 4-bit weights: add --load_in_4bit"))


@dataclass
class ShortDialogues(OneMachine):
    """`OneMachine` with a maximum length, and batches of rows of similar length."""

    refused = REFUSED | REFUSED_BUT_FOR_SFT

    max_length: int | None = option(256, "Maximum tokens of a prompt with one response. Longer rows are truncated.")
    train_sampling_strategy: str = option(
        "group_by_length", "Order of the training rows: batches of similar length (the default), random or sequential.",
        choices=["random", "sequential", "group_by_length"],
    )  # fmt: skip
    metric_for_best_model: str | None = option("eval_loss", "The figure that determines the best epoch.")
    pad_to_multiple_of: int | None = option(None, "Not supported: batches are padded to their longest row.")
    dataloader_num_workers: int | None = option(
        None, "Number of processes that load batches. The default is 2 with a GPU, and 0 without."
    )
    merge_adapter: bool = option(
        False, "Merge a trained LoRA adapter into its base model, and save the full model instead of the adapter."
    )

    def __post_init__(self) -> None:
        if self.max_length is None or self.max_length < SHORTEST:
            raise UserError(f"--max_length {self.max_length}: must be at least {SHORTEST} tokens")
        args: Any = self
        on_gpu = has_cuda(args.use_cpu)
        if self.metric_for_best_model is not None and args.greater_is_better is None:  # transformers knows only losses
            args.greater_is_better = not self.metric_for_best_model.endswith(("loss", "rejected"))
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_gpu else 0
        if args.accelerator_config is None and on_gpu:  # copies run while the GPU computes; memory is pinned by default
            args.accelerator_config = {"non_blocking": args.dataloader_pin_memory}
        super().__post_init__()
        if args.do_eval and self.eval_strategy == "no":
            raise UserError("--do_eval is not supported here: pass --eval_strategy epoch or steps")
        if args.activation_offloading and not on_gpu:
            raise UserError("--activation_offloading moves activations off a GPU, but there is no GPU: remove it")
        if args.liger_kernel_config is not None and not args.use_liger_kernel:
            raise UserError("--liger_kernel_config configures Liger kernels: add --use_liger_kernel, or remove it")


@dataclass
class TextDPOConfig(ReferenceUpdate, ShortDialogues, DPOConfig):  # type: ignore[misc]  # it may be None here
    """`trl.DPOConfig` with this project's defaults, prefix sharing and reference updates."""

    _argument_group_name = "DPO and training"
    figures = PAIR_FIGURES

    output_dir: str | None = option("runs/dpo_hh", "The run's folder.")
    learning_rate: float = option(1e-5, "Peak learning rate of DPO. The default with --use_peft is ten times larger.")
    beta: float = option(0.1, "Strength of the KL penalty, that is, of the tie to the reference. It is τ in IPO.")
    prefix_sharing: bool = option(True, "Run a pair's prompt once for both responses. The results are the same.")
    precompute_ref_log_probs: bool = option(
        True,
        "Compute the reference's log-probabilities once before training, and keep no reference model in memory. "
        "Disabled if --reference_update is not frozen.",
    )
    reference_cache_dir: str = option(
        "auto",
        "Folder to cache the reference's log-probabilities for later runs: auto (in HF_HOME), none, or a path.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        preference_loss(self)  # raises for invalid options before anything is loaded
        asked_for_best = self.select == "best" or self.load_best_model_at_end
        super().__post_init__()
        if self.reference_update != "frozen":
            # precomputed values would be outdated, and losses of different epochs would not be comparable
            self.precompute_ref_log_probs = self.load_best_model_at_end = False
            self.select = "last"
            if asked_for_best:
                raise UserError(
                    f"--select best compares losses of epochs, but --reference_update {self.reference_update} changes "
                    "the reference that they depend on: pass --select last"
                )


@dataclass
class TextSFTConfig(ShortDialogues, SFTConfig):  # type: ignore[misc]  # as above
    """`trl.SFTConfig` with this project's defaults."""

    _argument_group_name = "SFT and training"
    refused = REFUSED
    figures = ("loss",)

    output_dir: str | None = option("runs/sft_hh", "The run's folder.")
    num_train_epochs: float = option(1.0, "Number of SFT epochs. 0 skips SFT before DPO or a reward model.")
    learning_rate: float = option(2e-5, "Peak learning rate of SFT. The default with --use_peft is ten times larger.")
    completion_only_loss: bool | None = option(True, "Compute the loss only on the response, not on the prompt.")

    @property
    def is_skipped(self) -> bool:
        return self.num_train_epochs == 0 and self.max_steps <= 0


@dataclass
class TextRewardConfig(FromReference, ShortDialogues, RewardConfig):  # type: ignore[misc]  # as above
    """`trl.RewardConfig` with this project's defaults."""

    _argument_group_name = "reward model and training"
    figures = tuple(name for name in PAIR_FIGURES if not name.startswith("logps/"))

    output_dir: str | None = option("runs/reward_hh", "The run's folder.")
    learning_rate: float = option(1e-5, "Peak learning rate. The default with --use_peft is ten times larger.")

    def __post_init__(self) -> None:
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise UserError(f"--center_rewards_coefficient {self.center_rewards_coefficient}: must be at least 0")
        super().__post_init__()


def named_models(words: Sequence[str]) -> dict[str, str]:
    """Parse the arguments NAME=PATH of --models: name -> folder or Hub id, in the given order."""
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
    """Options of a chat: the models, and the generation of answers."""

    _argument_group_name = "chat"

    models: list[str] | None = option(
        None, "NAME=PATH of each model: a folder (LoRA adapters too) or a Hub id. The default is the models of RUN."
    )
    prompt: str | None = option(None, "Answer this message and exit. - reads the message from stdin.")
    system: str | None = option(None, "System message, for models with a chat template that supports it.")
    max_new_tokens: int = option(128, "Maximum number of tokens per answer.")
    do_sample: bool = option(False, "Sample the answers. The default is greedy decoding.")
    temperature: float = option(1.0, "Temperature of --do_sample.")
    top_p: float = option(1.0, "Nucleus (top-p) probability of --do_sample.")
    seed: int = option(42, "Seed of the first answers. The second ones use seed + 1, and so on.")
    trust_remote_code: bool = option(False, "Run code from a model's repository.")

    def __post_init__(self) -> None:
        if self.models is not None:
            named_models(self.models)
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: pass a message, or - to read it from stdin")
        if self.system is not None and not self.system.strip():
            raise UserError("--system is empty: pass a message, or remove the flag")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        check_positive(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be in (0, 1]")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise UserError("--temperature and --top_p only affect sampling: add --do_sample")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be between 0 and {2**32 - 1}")


@dataclass
class ChatModelConfig(TextModelConfig):
    """Options of loading the models of a chat.

    The default stores the weights in bfloat16. Generation reads all weights for every token, and autocast would convert
    them each time.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = option(
        None, "Precision of the weights. The default is bfloat16 if the hardware supports it, otherwise float32."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, {
            "model_name_or_path": "pass the models with --models NAME=PATH",
            "use_peft": "a folder with a LoRA adapter is loaded without this flag",
        })  # fmt: skip
        if self.dtype is None:
            self.dtype = "bfloat16" if has_bfloat16() else "float32"
