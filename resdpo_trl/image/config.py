"""The options of the image recipes. The data's stand in `resdpo_trl.image.data`, the augmentation's in `.augment`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import PAIR_FIGURES
from resdpo_trl.training.arguments import OneMachine, ReferenceUpdate, check_positive, preference_loss, refuse

SAMPLING = ("random", "uniform", "hard", "all")  # of the rejected classes, `trainer.RejectedClasses`

# `TrainingArguments` fields that these trainers do not honour: value that means "not asked for", and what to do instead
REFUSED: dict[str, tuple[Any, str]] = {
    "train_sampling_strategy": ("random", "each epoch has an order of its own, drawn by --seed"),
    "neftune_noise_alpha": (None, "images have no embeddings; see --color_jitter and --affine_degrees"),
    "use_liger_kernel": (False, "its kernels are language models'; see --torch_compile"),
    "include_num_input_tokens_seen": ("no", "images have no tokens"),
} | {
    name: (unset, "evaluation is these trainers' own: every figure, in the precision of training (--bf16)")
    for name, unset in (
        ("bf16_full_eval", False),
        ("fp16_full_eval", False),
        ("prediction_loss_only", False),
        ("eval_accumulation_steps", None),
        ("include_for_metrics", []),
        ("batch_eval_metrics", False),
        ("label_names", None),
    )
}


@dataclass
class ImageModelConfig:
    """The classifier that is built."""

    _argument_group_name = "model"

    arch: str = field(
        default="resnet18",
        metadata={"help": "A ResNet of torchvision's (resnet18, resnet34, resnet50, …), or fast, a small network."},
    )
    stem: Literal["cifar", "imagenet"] = field(
        default="cifar",
        metadata={"help": "First layers of a ResNet: 3×3 without max-pool (cifar) or torchvision's own (imagenet)."},
    )
    head: Literal["linear", "dropout"] = field(
        default="linear", metadata={"help": "Last layers: one linear, or two linear ones with dropout."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Probability of the dropout head."})
    widths: list[int] = field(
        default_factory=lambda: [64, 128, 256], metadata={"help": "Channels of the stages of --arch fast."}
    )
    pretrained_weights: str | None = field(
        default=None,
        metadata={"help": "torchvision's ImageNet weights: a name (DEFAULT, IMAGENET1K_V2) or a local file."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: must lie in [0, 1)")
        if not self.widths or min(self.widths) < 1 or self.widths != sorted(self.widths) or self.widths[0] < 24:
            raise UserError(f"--widths {' '.join(map(str, self.widths))}: must not fall, and start at 24 or more")


@dataclass
class ImageTraining(OneMachine):
    """`OneMachine` for images."""

    figures: ClassVar[tuple[str, ...]]  # of the validation images, by which an epoch may be chosen

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a step on each device."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Images of an evaluation batch."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out an epoch's last, smaller batch, whose batch norms are noisy."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip the gradient's norm; 0 for no clipping."})
    metric_for_best_model: str | None = field(
        default="eval_accuracy", metadata={"help": "Figure by which the best epoch is chosen."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether the larger figure is the better; by default false for losses and the KL."},
    )
    bias_learning_rate_scale: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate of biases and norms, which have no weight decay."}
    )
    muon_learning_rate: float = field(
        default=0.0,
        metadata={"help": "Peak learning rate of Muon for the convolutions' weights; 0 trains them by --optim."},
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Keep images and weights in channels-last memory order."}
    )

    def __post_init__(self) -> None:
        if self.bias_learning_rate_scale <= 0:
            raise UserError(f"--bias_learning_rate_scale {self.bias_learning_rate_scale}: must be above 0")
        if self.muon_learning_rate < 0:
            raise UserError(f"--muon_learning_rate {self.muon_learning_rate}: must be at least 0")
        if self.metric_for_best_model is not None:
            if not self.has_figure(self.metric_for_best_model):
                known = ", ".join(f"eval_{name}" for name in self.figures)
                raise UserError(f"--metric_for_best_model {self.metric_for_best_model}: must be one of {known}")
            if self.greater_is_better is None:
                self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "kl", "rejected"))
        super().__post_init__()
        refuse(self, REFUSED)

    @classmethod
    def has_figure(cls, name: str) -> bool:
        """Whether an evaluation has this figure, named with or without transformers' `eval_`."""
        return name.removeprefix("eval_") in cls.figures


@dataclass
class ImageCrossEntropyConfig(ImageTraining, TrainingArguments):  # type: ignore[misc]  # some fields may be None here
    """`transformers.TrainingArguments` with this project's defaults."""

    _argument_group_name = "cross-entropy and training"
    figures = ("loss", "accuracy")

    output_dir: str | None = field(default="runs/train_cifar", metadata={"help": "The run's folder."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})


@dataclass
class ReferenceStageConfig:
    """The first stage of DPO: the reference, by cross-entropy."""

    _argument_group_name = "reference stage"

    reference: str | None = field(
        default=None, metadata={"help": "A folder or Hub id of a finished classifier: skips the stage."}
    )
    reference_epochs: float = field(default=1.0, metadata={"help": "Epochs of cross-entropy."})
    reference_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the stage."})
    reference_label_smoothing: float = field(default=0.0, metadata={"help": "Label smoothing of the stage."})
    reference_warmup_steps: float = field(
        default=0.0, metadata={"help": "Steps of warm-up of the stage; below 1 a share of its steps."}
    )

    reference_optim: str | None = field(default=None, metadata={"help": "Optimizer of the stage; --optim by default."})
    reference_optim_args: str | None = field(default=None, metadata={"help": "Arguments of --reference_optim."})
    reference_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the stage; --weight_decay by default."}
    )
    reference_bias_learning_rate_scale: float | None = field(
        default=None, metadata={"help": "Bias scale of the stage; --bias_learning_rate_scale by default."}
    )
    reference_muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Muon's rate in the stage; --muon_learning_rate by default."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.reference_epochs < math.inf:
            raise UserError(f"--reference_epochs {self.reference_epochs}: must be above 0; or pass --reference")
        if self.reference_optim_args is not None and self.reference_optim is None:
            raise UserError("--reference_optim_args needs --reference_optim; --optim_args go to both stages")
        check_positive(self, "reference_learning_rate")


@dataclass
class ImageDPOConfig(ReferenceUpdate, ImageTraining, TrainingArguments):  # type: ignore[misc]  # as above
    """DPO's options under the names of `trl.DPOConfig`, and training's."""

    _argument_group_name = "DPO and training"
    figures = (*PAIR_FIGURES, "accuracy", "kl")

    output_dir: str | None = field(default="runs/dpo_cifar", metadata={"help": "The run's folder."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of DPO."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the KL penalty, β, above 0."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": "Loss or losses; as dpo_hh.py's."}
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One weight a loss type; 1 by default."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference is flipped; exo_pair's smoothing."}
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": "reverse_kl, forward_kl, js_divergence or alpha_divergence."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "α of the α-divergence."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop."})
    disable_dropout: bool = field(default=True, metadata={"help": "Run policy and reference without dropout."})
    rejected_sampling: Literal["random", "uniform", "hard", "all"] = field(
        default="uniform",
        metadata={
            "help": "The rejected class: any of all (random), any wrong one (uniform), a wrong one by the reference's "
            "probabilities (hard), or every wrong one, exactly (all)."
        },
    )
    compare_modes: list[str] = field(
        default_factory=list,
        metadata={"help": "Further modes to train from the same reference, as all/copy or hard/polyak."},
    )
    compare_cross_entropy: bool = field(
        default=False,
        metadata={"help": "Also train by cross-entropy from scratch, for --num_train_epochs, and end with a table."},
    )

    def __post_init__(self) -> None:
        preference_loss(self)  # refuse what makes no sense before anything is loaded
        for mode in self.compare_modes:
            parse_mode(mode)
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor is cross-entropy's: pass --label_smoothing")
        super().__post_init__()


def parse_mode(mode: str) -> tuple[Any, Any]:
    """all/copy -> (rejected sampling, reference update)."""
    sampling, _, update = mode.partition("/")
    if sampling not in SAMPLING or update not in ("frozen", "polyak", "copy"):
        raise UserError(
            f"--compare_modes {mode}: must be one of {', '.join(SAMPLING)}, a slash, and frozen, polyak or copy"
        )
    return sampling, update


def reference_stage(dpo: ImageDPOConfig, stage: ReferenceStageConfig) -> ImageCrossEntropyConfig:
    """The configuration of a DPO run's reference stage: its own epochs and optimizer, the rest from DPO.

    It chooses its epoch by DPO's figure where it has that one, and by its accuracy where it has not.
    """
    shared = (
        "output_dir", "seed", "data_seed", "bf16", "fp16", "use_cpu", "adam_beta1", "adam_beta2", "adam_epsilon",
        "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "run_name",
        "dataloader_num_workers", "torch_compile", "tf32",
        "full_determinism", "disable_tqdm", "ddp_timeout", "eval_strategy",
        "ddp_find_unused_parameters",
        "eval_steps", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "channels_last",
        "select", "dataloader_drop_last",
    )  # fmt: skip
    chosen_by = ("metric_for_best_model", "greater_is_better")
    known = dpo.metric_for_best_model is None or ImageCrossEntropyConfig.has_figure(dpo.metric_for_best_model)
    scale, muon = stage.reference_bias_learning_rate_scale, stage.reference_muon_learning_rate
    return ImageCrossEntropyConfig(
        num_train_epochs=stage.reference_epochs,
        learning_rate=stage.reference_learning_rate,
        label_smoothing_factor=stage.reference_label_smoothing,
        warmup_steps=stage.reference_warmup_steps,
        optim=stage.reference_optim or dpo.optim,
        optim_args=stage.reference_optim_args if stage.reference_optim else dpo.optim_args,
        weight_decay=dpo.weight_decay if stage.reference_weight_decay is None else stage.reference_weight_decay,
        bias_learning_rate_scale=dpo.bias_learning_rate_scale if scale is None else scale,
        muon_learning_rate=dpo.muon_learning_rate if muon is None else muon,
        report_to=dpo.report_to or "none",
        **{name: getattr(dpo, name) for name in (*shared, *(chosen_by if known else ()))},
    )
