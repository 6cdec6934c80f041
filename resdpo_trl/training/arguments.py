"""Options that text and image runs share: the run's own options, and those of training on one machine."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from resdpo_trl.errors import UserError
from resdpo_trl.losses import PreferenceLoss

Precision = Literal["bfloat16", "float16", "float32"]
OWN_COLUMNS = "the trainer chooses its columns"
MEAN = "evaluation is the mean over all rows"
FIGURES = "evaluation keeps figures of rows, not logits"
# fields of transformers' `TrainingArguments` that no trainer here supports, and the alternative
REFUSED = {
    "fsdp": "pass --config_file accelerate_configs/fsdp2.yaml to accelerate launch",
    "fsdp_config": "edit accelerate_configs/fsdp2.yaml and pass it to accelerate launch as --config_file",
    "deepspeed": "pass --config_file accelerate_configs/deepspeed_zero3.yaml to accelerate launch",
    "parallelism_config": "use data parallelism, FSDP2 or ZeRO (docs/distributed.md)",
    "bf16_full_eval": "evaluation uses the precision of training; see --bf16",
    "fp16_full_eval": "evaluation uses the precision of training; see --fp16",
    "prediction_loss_only": FIGURES,
    "eval_accumulation_steps": FIGURES,
    "batch_eval_metrics": MEAN,
    "include_for_metrics": MEAN,
    "eval_do_concat_batches": MEAN,
    "eval_use_gather_object": "evaluation gathers only numbers",
    "label_names": OWN_COLUMNS,
    "length_column_name": OWN_COLUMNS,
    "remove_unused_columns": OWN_COLUMNS,
    "use_cache": "training does not use a cache",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C already stop a run after a checkpoint",
    "local_rank": "launch with accelerate or torchrun, which set it in the environment",
    "do_train": "the recipe determines the stages",
    "do_predict": "the recipe determines the stages; pass --num_samples for answers",
}


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field for a flag, with its default and its help text."""
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Options of every recipe that transformers does not have."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = option(False, "Replace the run in --output_dir. Other files in the folder are kept.")


@dataclass
class OneMachine:
    """Defaults of transformers' `TrainingArguments` for one machine. This mixin must precede it in a class's bases."""

    refused: ClassVar[Mapping[str, str]] = REFUSED
    # fields that a stage does not inherit from the flags of the stage after it
    of_one_stage: ClassVar[frozenset[str]] = frozenset({
        "num_train_epochs", "max_steps", "learning_rate", "loss_type", "label_smoothing_factor", "neftune_noise_alpha",
        "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
        "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    })  # fmt: skip
    # fields of the whole run: a stage before the last one can't set them
    of_the_run: ClassVar[frozenset[str]] = frozenset({
        "output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token",
        "hub_private_repo", "hub_always_push", "hub_revision", "use_cpu", "bf16", "fp16", "trust_remote_code",
        "max_length", "merge_adapter",
    })  # fmt: skip

    resume_from_checkpoint: str | None = option(
        None, "Continue the run in --output_dir from its last checkpoint, or from the named one.",
        nargs="?", const="last",
    )  # fmt: skip
    per_device_train_batch_size: int = option(16, "Rows per training batch on each device.")
    per_device_eval_batch_size: int = option(32, "Rows per evaluation batch on each device.")
    num_train_epochs: float = option(1.0, "Number of training epochs.")
    bf16: bool | None = option(
        None,
        "Use bfloat16 mixed precision. This is the default if the hardware supports it. V100 and T4 GPUs default to "
        "--fp16, which scales the loss.",
    )
    # None instead of False: transformers 5.23 warns about the deprecated name if it is set
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass. This saves memory but takes time.", nargs="?", const=True
    )
    hub_private_repo: bool | None = option(
        None, "Make a new Hub repository private. The default is the account's setting.", nargs="?", const=True
    )
    remove_unused_columns: bool | None = option(False, "Must be false: the trainers choose their columns.")
    logging_steps: float = option(10, "Steps between two training lines in metrics.jsonl.")
    logging_nan_inf_filter: bool = option(
        False, "Omit losses that are not finite from the log. This synchronizes the device at every step."
    )
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = option("epoch", "When to save a checkpoint: no, steps or epoch.")
    select: str | None = option(
        None, "Keep the weights of the best epoch in validation (best, the default), or of the last epoch (last).",
        choices=["best", "last"],
    )  # fmt: skip
    load_best_model_at_end: bool | None = option(
        None, "transformers' name for --select best; false for --select last.", nargs="?", const=True
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "With several processes, look for parameters without gradients at every step. This is slower."
    )
    report_to: None | str | list[str] = option(  # noqa: RUF036  (the parser reads the first two)
        "none", "Also log to tensorboard, wandb, trackio or another tracker that transformers supports."
    )

    def __post_init__(self) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        args: Any = self  # the class that inherits from this one has the fields of TrainingArguments
        refuse(self, self.refused)
        check_positive(self, "learning_rate")
        if args.max_steps <= 0 and not self.is_skipped:  # max_steps overrides epochs
            check_positive(self, "num_train_epochs")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
        if not 0 <= args.seed < 2**32:
            raise UserError(f"--seed {args.seed}: must be between 0 and {2**32 - 1}")
        if not args.output_dir:
            raise UserError("--output_dir: pass a folder")
        check_reporters(self.report_to)
        if self.select is None:
            self.select = "last" if self.load_best_model_at_end is False else "best"
        if self.load_best_model_at_end not in (None, self.select == "best"):
            raise UserError(f"--load_best_model_at_end contradicts --select {self.select}: remove it")
        self.load_best_model_at_end = self.select == "best"
        if self.select == "best" and (self.eval_strategy != self.save_strategy or self.eval_strategy == "no"):
            raise UserError(
                f"--eval_strategy {self.eval_strategy} and --save_strategy {self.save_strategy}: to keep the best "
                "epoch, both must be epoch or both steps; otherwise pass --select last"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_accelerator():
            args.use_cpu = True  # otherwise accelerate runs each of several CPU processes independently
        if args.bf16 is None and not args.fp16:
            precision = hardware_precision(args.use_cpu)
            args.bf16, args.fp16 = precision == "bfloat16", precision == "float16"
        if args.bf16 and not has_accelerator():
            args.use_cpu = True  # transformers accepts bfloat16 on a CPU only with use_cpu
        if not has_cuda(args.use_cpu):
            args.dataloader_pin_memory = False  # otherwise PyTorch warns for every loader
        super().__post_init__()  # type: ignore[misc]
        unset_hf_deepspeed_config()  # models load whole (resdpo_trl/training/processes.py)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one GPU per process: otherwise transformers wraps the model in torch.nn.DataParallel

    @property
    def is_skipped(self) -> bool:
        """Whether the stage is skipped, so that its starting model is used unchanged."""
        return False


@dataclass
class FromReference:
    """The option of a stage that starts from a reference."""

    reference: str | None = option(None, "Folder or Hub id of a trained reference. It skips the stage that trains one.")


@dataclass
class ReferenceUpdate(FromReference):
    """How DPO updates the reference during training. A mixin for the DPO options of text and images."""

    reference_update: Literal["frozen", "polyak", "copy"] = option(
        "frozen",
        "Update of the reference: frozen (none), polyak (reference ← (1−τ)·reference + τ·policy after every step) or "
        "copy (reference ← policy between epochs).",
    )
    polyak_tau: float = option(0.001, "τ of --reference_update polyak, in (0, 1].")

    def __post_init__(self) -> None:
        if not 0 < self.polyak_tau <= 1:
            raise UserError(f"--polyak_tau {self.polyak_tau}: must be in (0, 1]")
        super().__post_init__()  # type: ignore[misc]


def check_reporters(report_to: str | list[str] | None) -> None:
    """Raise a UserError for a name in --report_to that transformers does not support or whose package is missing."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not set(names) - {"none", "all"}:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    packages = {"azure_ml": ["azureml"], "flyte": ["flytekit"], "tensorboard": ["tensorboard", "tensorboardX"]}
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            raise UserError(f"--report_to {name}: must be among {', '.join(INTEGRATION_TO_CALLBACK)}, all, none")
        known = packages.get(name, [name])
        if name in INTEGRATION_TO_CALLBACK and not any(map(importlib.util.find_spec, known)):
            brought = "'resdpo-trl[watch]'" if name in ("tensorboard", "trackio") else known[0]
            raise UserError(
                f"--report_to {name}: the package {known[0]} is not installed: run pip install {brought}, or use "
                "resdpo-trl report RUN --watch, which needs no package"
            )


def check_positive(config: Any, *names: str) -> None:
    """Raise a UserError for a field that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:  # also false for nan
            raise UserError(f"--{name} {value}: must be above 0 and finite")


def refuse(config: Any, refused: Mapping[str, str]) -> None:
    """Raise a UserError for a field that differs from its default. `refused` maps field names to the fix."""
    for each in fields(config):
        if each.name not in refused:
            continue
        unset = each.default_factory() if each.default_factory is not MISSING else each.default
        value = getattr(config, each.name)
        if value != unset and (value is not False or unset is True):  # false is allowed if the default is off
            raise UserError(f"--{each.name} is not supported here: {refused[each.name]}")


def preference_loss(args: Any) -> PreferenceLoss:
    """The loss of a configuration with the fields of `DPOConfig`. Raise a UserError for invalid options."""
    if not 0 < args.beta < math.inf:
        raise UserError(f"--beta {args.beta}: must be above 0 (typically 0.1 to 0.5)")
    try:
        return PreferenceLoss(
            loss_types=tuple(args.loss_type),
            loss_weights=tuple(args.loss_weights) if args.loss_weights else None,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            f_divergence_type=args.f_divergence_type,
            f_alpha_divergence_coef=args.f_alpha_divergence_coef,
            discopop_tau=args.discopop_tau,
        )
    except ValueError as error:
        raise UserError(f"--{error}") from None  # the message begins with the option


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def has_cuda(use_cpu: bool = False) -> bool:
    import torch

    return torch.cuda.is_available() and not use_cpu


def hardware_precision(use_cpu: bool = False) -> Precision:
    """The data type with the fastest matrix products on the device: bfloat16, float16 or float32."""
    import torch

    if has_cuda(use_cpu):
        return "bfloat16" if torch.version.hip else cuda_precision(torch.cuda.get_device_capability())
    if torch.backends.mps.is_available() and not use_cpu:
        return "float32"
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has else "float32"


def cuda_precision(capability: tuple[int, int]) -> Precision:
    """`hardware_precision` of an NVIDIA GPU with this compute capability.

    Tensor cores support float16 since Volta (7.0: V100; 7.5: T4) and bfloat16 since Ampere (8.0)
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/, "Compute Capabilities").
    """
    return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"


def has_bfloat16(use_cpu: bool = False) -> bool:
    return hardware_precision(use_cpu) == "bfloat16"
