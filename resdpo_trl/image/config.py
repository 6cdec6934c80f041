"""The options of the image recipes. `resdpo_trl.image.data` has those of the data and of the augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import PAIR_FIGURES
from resdpo_trl.training import arguments
from resdpo_trl.training.arguments import OneMachine, ReferenceUpdate, option, preference_loss

SAMPLING = ("random", "uniform", "hard", "all")  # of the rejected classes, see `trainer.RejectedClasses`
# fields of `TrainingArguments` that these trainers do not honor, and what to do instead
REFUSED = arguments.REFUSED | {
    "train_sampling_strategy": "--seed sets the order of each epoch",
    "neftune_noise_alpha": "images have no embeddings; see --crop_padding and --flip",
    "use_liger_kernel": "its kernels are for language models; see --torch_compile",
    "include_num_input_tokens_seen": "images have no tokens",
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"),
        "pass a smaller --per_device_train_batch_size, and --gradient_accumulation_steps",
    ),
}


@dataclass
class ImageModelConfig:
    """The architecture of the classifier, and its pretrained weights."""

    _argument_group_name = "model"

    arch: str = option("resnet18", "A torchvision ResNet (resnet18, resnet34, resnet50, …), or fast, a small network.")
    stem: Literal["cifar", "imagenet"] = option(
        "cifar", "First layers of a ResNet: 3×3 without max-pool (cifar), or those of torchvision (imagenet)."
    )
    head: Literal["linear", "dropout"] = option("linear", "Last layers: one linear layer, or two with dropout.")
    dropout: float = option(0.1, "Dropout probability of --head dropout.")
    widths: list[int] = option([64, 128, 256], "Channels of the stages of --arch fast.")
    pretrained_weights: str | None = option(
        None, "torchvision's ImageNet weights: a name (DEFAULT, IMAGENET1K_V2) or a .safetensors file."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: must be in [0, 1)")
        if not self.widths or min(self.widths) < 1 or self.widths != sorted(self.widths) or self.widths[0] < 24:
            raise UserError(f"--widths {' '.join(map(str, self.widths))}: must not decrease, and start at 24 or more")


@dataclass
class ImageTraining(OneMachine):
    """`OneMachine` for images."""

    refused = REFUSED
    of_one_stage = OneMachine.of_one_stage | {"warmup_steps"}
    figures: ClassVar[tuple[str, ...]]  # of the validation images, to choose an epoch by

    per_device_train_batch_size: int = option(128, "Images per step on each device.")
    per_device_eval_batch_size: int = option(512, "Images per evaluation batch.")
    dataloader_drop_last: bool = option(True, "Drop an epoch's last, smaller batch: its batch statistics are noisy.")
    max_grad_norm: float = option(0.0, "Maximum norm of the gradient; 0 disables clipping.")
    metric_for_best_model: str | None = option("eval_accuracy", "Figure that selects the best epoch.")
    greater_is_better: bool | None = option(
        None, "Whether a larger figure is better; by default false for losses, the KL and rejected rewards."
    )
    bias_learning_rate_scale: float = option(
        1.0, "Factor on the learning rate of biases and norms, which are not decayed."
    )
    muon_learning_rate: float = option(
        0.0, "Peak learning rate of Muon for the convolutions' weights; 0 trains them with --optim."
    )
    channels_last: bool = option(True, "Store images and weights in channels-last memory format.")

    def __post_init__(self) -> None:
        if self.bias_learning_rate_scale <= 0:
            raise UserError(f"--bias_learning_rate_scale {self.bias_learning_rate_scale}: must be above 0")
        if self.muon_learning_rate < 0:
            raise UserError(f"--muon_learning_rate {self.muon_learning_rate}: must be at least 0")
        if self.metric_for_best_model is not None:
            if self.metric_for_best_model.removeprefix("eval_") not in self.figures:
                known = ", ".join(f"eval_{name}" for name in self.figures)
                raise UserError(f"--metric_for_best_model {self.metric_for_best_model}: must be one of {known}")
            if self.greater_is_better is None:
                self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "kl", "rejected"))
        super().__post_init__()


@dataclass
class ImageCrossEntropyConfig(ImageTraining, TrainingArguments):  # type: ignore[misc]  # some fields may be None here
    """`transformers.TrainingArguments` with this project's defaults."""

    _argument_group_name = "cross-entropy and training"
    figures = ("loss", "accuracy")

    output_dir: str | None = option("runs/train_cifar", "The run's folder.")
    learning_rate: float = option(1e-3, "Peak learning rate of cross-entropy.")


@dataclass
class ImageDPOConfig(ReferenceUpdate, ImageTraining, TrainingArguments):  # type: ignore[misc]  # as above
    """The options of DPO, with the names of `trl.DPOConfig`, and of training."""

    _argument_group_name = "DPO and training"
    refused = REFUSED | {"label_smoothing_factor": "it applies only to cross-entropy: pass --label_smoothing"}
    figures = (*PAIR_FIGURES, "accuracy", "kl")

    output_dir: str | None = option("runs/dpo_cifar", "The run's folder.")
    learning_rate: float = option(1e-4, "Peak learning rate of DPO.")
    beta: float = option(0.1, "Strength of the KL penalty, β, above 0.")
    loss_type: list[str] = option(["sigmoid"], "Loss or losses, as in dpo_hh.py.")
    loss_weights: list[float] | None = option(None, "One weight per loss type; 1 by default.")
    label_smoothing: float = option(0.0, "Probability that a preference is flipped; for exo_pair, its smoothing.")
    f_divergence_type: str = option("reverse_kl", "reverse_kl, forward_kl, js_divergence or alpha_divergence.")
    f_alpha_divergence_coef: float = option(0.5, "α of the α-divergence.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")
    disable_dropout: bool = option(True, "Run policy and reference without dropout.")
    rejected_sampling: Literal["random", "uniform", "hard", "all"] = option(
        "uniform",
        "The rejected class: any class (random), any wrong class (uniform), a wrong class drawn by the reference's "
        "probabilities (hard), or all wrong classes without sampling (all).",
    )
    compare_modes: list[str] = option([], "More modes to train from the same reference, e.g. all/copy or hard/polyak.")
    compare_cross_entropy: bool = option(
        False, "Also train with cross-entropy from scratch for --num_train_epochs, and print a table of all models."
    )

    def __post_init__(self) -> None:
        preference_loss(self)  # raises for invalid options before anything is loaded
        for mode in self.compare_modes:
            parse_mode(mode)
        super().__post_init__()


def parse_mode(mode: str) -> tuple[Any, Any]:
    """all/copy -> (rejected sampling, reference update)."""
    sampling, _, update = mode.partition("/")
    if sampling not in SAMPLING or update not in ("frozen", "polyak", "copy"):
        raise UserError(
            f"--compare_modes {mode}: must be one of {', '.join(SAMPLING)}, a slash, and frozen, polyak or copy"
        )
    return sampling, update
