"""The options that both halves share: a run's own, and training on one machine."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from resdpo_trl.errors import UserError
from resdpo_trl.losses import PreferenceLoss

Precision = Literal["bfloat16", "float16", "float32"]
# transformers' fields that shard a model past the checks of `check_sharding`: value when not asked for, and the fix
OF_THE_LAUNCHER: dict[str, tuple[Any, str]] = {
    "fsdp": (None, "pass --config_file accelerate_configs/fsdp2.yaml to accelerate launch"),
    "fsdp_config": (None, "edit accelerate_configs/fsdp2.yaml, and pass it to accelerate launch as --config_file"),
    "deepspeed": (None, "pass --config_file accelerate_configs/deepspeed_zero3.yaml to accelerate launch"),
    "parallelism_config": (None, "use data parallelism, FSDP2 or ZeRO (docs/distributed.md)"),
}


@dataclass
class RunConfig:
    """Options that every recipe shares and transformers does not have."""

    _argument_group_name = "run"

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that --output_dir holds. Nothing else in it is touched."}
    )


@dataclass
class OneMachine:
    """Defaults of transformers' `TrainingArguments` that suit one machine; mixed in before it."""

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "last",
            "help": "Continue the run in --output_dir, from its last checkpoint or from the one named.",
        },
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows of a step on each device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows of an evaluation batch."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision with bfloat16: the default where the hardware has it. V100 and T4 GPUs default to "
            "--fp16, which scales the loss."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,  # not False: transformers 5.23 warns of the old name wherever it is set
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Recompute activations in the backward pass: less memory, more time.",
        },
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Create the Hub's repository as a private one; by default as the account is set.",
        },
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: the trainers choose their columns."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two training lines of metrics.jsonl."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite from the log; it waits for every step."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    select: str | None = field(
        default=None,
        metadata={
            "help": "The epoch whose weights are kept: the one that validates best (best, the default), or the last.",
            "choices": ["best", "last"],
        },
    )
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "transformers' name for --select best; false for --select last.",
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Look for parameters without gradient at every step of several processes: slower."},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the parser reads the first two)
        default="none", metadata={"help": "Also log to tensorboard, wandb, trackio, …: as transformers' Trainer."}
    )

    def __post_init__(self) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        args: Any = self  # the fields of TrainingArguments stand in the class that this is mixed into
        refuse(self, OF_THE_LAUNCHER)
        check_positive(self, "learning_rate")
        if args.max_steps <= 0:  # which go before epochs
            check_positive(self, "num_train_epochs")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
        if not 0 <= args.seed < 2**32:
            raise UserError(f"--seed {args.seed}: must lie between 0 and {2**32 - 1}")
        if not args.output_dir:
            raise UserError("--output_dir: name a folder")
        check_reporters(self.report_to)
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns must stay false: the trainers choose their columns")
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.select != "last"
        kept = "best" if self.load_best_model_at_end else "last"
        if self.select not in (None, kept):
            raise UserError(f"--load_best_model_at_end contradicts --select {self.select}: drop it")
        self.select = kept
        if kept == "best" and (self.eval_strategy != self.save_strategy or self.eval_strategy == "no"):
            raise UserError(
                f"--eval_strategy {self.eval_strategy} and --save_strategy {self.save_strategy} must both be epoch, or "
                "both steps, for the best epoch to be kept: or pass --select last"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_accelerator():
            args.use_cpu = True  # without it accelerate lets each of several CPU processes run for itself
        if args.bf16 is None and not args.fp16:
            precision = hardware_precision(args.use_cpu)
            args.bf16, args.fp16 = precision == "bfloat16", precision == "float16"
        if args.bf16 and not has_accelerator():
            args.use_cpu = True  # transformers takes bfloat16 on a CPU only where the CPU was asked for
        if not has_cuda(args.use_cpu):
            args.dataloader_pin_memory = False  # PyTorch warns at every loader otherwise
        super().__post_init__()  # type: ignore[misc]
        unset_hf_deepspeed_config()  # models load whole (resdpo_trl/training/processes.py)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process, one GPU: transformers would wrap the model in torch's old DataParallel


@dataclass
class ReferenceUpdate:
    """How the reference of DPO changes while the policy is trained; mixed into both halves' DPO options."""

    reference_update: Literal["frozen", "polyak", "copy"] = field(
        default="frozen",
        metadata={
            "help": "The reference over time: frozen; polyak (after every step, reference ← (1−τ)·reference + "
            "τ·policy); copy (of the policy, at each epoch's end)."
        },
    )
    polyak_tau: float = field(default=0.001, metadata={"help": "τ of polyak, in (0, 1]."})
    do_polyak: bool = field(default=False, metadata={"help": "Short for --reference_update polyak."})
    do_copy: bool = field(default=False, metadata={"help": "Short for --reference_update copy."})

    def __post_init__(self) -> None:
        if self.do_polyak and self.do_copy:
            raise UserError("--do_polyak and --do_copy exclude each other: choose one")
        short: Literal["frozen", "polyak", "copy"] = (
            "polyak" if self.do_polyak else "copy" if self.do_copy else "frozen"
        )
        if short != "frozen" and self.reference_update not in ("frozen", short):
            raise UserError(f"--do_{short} contradicts --reference_update {self.reference_update}: drop either")
        if short != "frozen":
            self.reference_update = short
        if not 0 < self.polyak_tau <= 1:
            raise UserError(f"--polyak_tau {self.polyak_tau}: must lie in (0, 1]")
        super().__post_init__()  # type: ignore[misc]


def check_reporters(report_to: str | list[str] | None) -> None:
    """Raise a UserError for a name in --report_to that transformers does not know or whose package is missing."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if not set(names) - {"none", "all"}:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    packages = {"azure_ml": ["azureml"], "flyte": ["flytekit"], "tensorboard": ["tensorboard", "tensorboardX"]}
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            raise UserError(f"--report_to {name}: not among {', '.join(INTEGRATION_TO_CALLBACK)}, all, none")
        known = packages.get(name, [name])
        if name in INTEGRATION_TO_CALLBACK and not any(map(importlib.util.find_spec, known)):
            brought = "'resdpo-trl[watch]'" if name in ("tensorboard", "trackio") else known[0]
            raise UserError(
                f"--report_to {name}: the package {known[0]} is not installed: pip install {brought}; "
                "resdpo-trl report RUN --watch needs none"
            )


def check_positive(config: Any, *names: str) -> None:
    """Raise a UserError for a field that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:  # nan is neither
            raise UserError(f"--{name} {value}: must be above 0, and finite")


def refuse(config: Any, refused: dict[str, tuple[Any, str]]) -> None:
    """Raise a UserError for a field that is set and not honored: name -> (value when not asked for, the fix)."""
    for name, (unset, fix) in refused.items():
        value = getattr(config, name)
        if value != unset:
            raise UserError(f"--{name} is not supported here: {fix}")


def preference_loss(args: Any) -> PreferenceLoss:
    """The loss that a configuration with `DPOConfig`'s fields asks for; a UserError where it makes no sense."""
    if not 0 < args.beta < math.inf:
        raise UserError(f"--beta {args.beta}: must be above 0 (0.1 to 0.5 are usual)")
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
        raise UserError(f"--{error}") from None  # its message begins with the option


def has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def has_cuda(use_cpu: bool = False) -> bool:
    import torch

    return torch.cuda.is_available() and not use_cpu


def hardware_precision(use_cpu: bool = False) -> Precision:
    """The type whose matrix products the device computes fastest: bfloat16, float16 or float32."""
    import torch

    if has_cuda(use_cpu):
        return "bfloat16" if torch.version.hip else cuda_precision(torch.cuda.get_device_capability())
    if torch.backends.mps.is_available() and not use_cpu:
        return "float32"
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has else "float32"


def cuda_precision(capability: tuple[int, int]) -> Precision:
    """`hardware_precision` of an NVIDIA GPU, by its compute capability.

    Tensor cores multiply float16 since Volta (7.0: V100; 7.5: T4) and bfloat16 since Ampere (8.0)
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/, "Compute Capabilities").
    """
    return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"


def has_bfloat16(use_cpu: bool = False) -> bool:
    return hardware_precision(use_cpu) == "bfloat16"
