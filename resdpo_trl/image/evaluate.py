"""Evaluation of a classifier: accuracy by class, confusion, calibration, and rewards and KL against a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from torchvision.transforms.v2 import functional
from transformers import ViTImageProcessor

from resdpo_trl.errors import UserError, printable
from resdpo_trl.image.data import ImageDataConfig, Images, load_images
from resdpo_trl.image.model import ImageClassifier, as_numbered_by, load_classifier, load_processor
from resdpo_trl.metrics import (
    FIGURES,
    classifier_metrics,
    cross_entropy_metrics,
    figure_rows,
    number,
    shown,
    table,
    with_intervals,
)
from resdpo_trl.run.folder import use_the_cores, write_figures
from resdpo_trl.run.provenance import as_trained, describe_settings, loss_of, read_facts, unseen
from resdpo_trl.scorer import score_rows
from resdpo_trl.training.arguments import option

CALIBRATION_BINS = 15


@dataclass
class EvaluateConfig:
    """Which classifier to evaluate, and against what."""

    _argument_group_name = "evaluation"

    model: str | None = option(None, "A folder or Hub id of a classifier.")
    reference: str | None = option(None, "The reference of its training; adds rewards and the exact KL.")
    split: Literal["train", "validation", "test"] = option("test", "Split to evaluate.")
    beta: float | None = option(None, "β of the rewards, above 0; by default that of the model's training, or 0.1.")
    loss_type: list[str] | None = option(None, "The loss; by default that of the model's training, or sigmoid.")
    batch_size: int = option(512, "Images per batch.")
    bf16: bool | None = option(
        None, "Score in bfloat16; by default as in the model's training, or if the hardware has it."
    )
    test_time_views: Literal[1, 2, 6] = option(
        1,
        "Average the logits over 1 view (the image), 2 (and its mirror image) or 6 (and both shifted by a "
        "pixel in two directions; https://arxiv.org/abs/2404.00498).",
    )
    output: str | None = option(None, "Also write the figures to this .json file.")

    def __post_init__(self) -> None:
        if self.model is None:
            raise UserError("--model: name a folder or Hub id of a classifier")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise UserError(f"--beta {self.beta}: must be above 0 and finite (0.1 to 0.5 are usual)")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: must be at least 1")


def evaluate(config: EvaluateConfig, data: ImageDataConfig) -> dict[str, Any]:
    """The figures of `config.model` on one split; they are also written to `config.output`, if it is set.

    Settings without a flag are those of the model's training. Test images that the training has used are skipped.
    """
    use_the_cores()
    assert config.model is not None
    named = {"--model": config.model} | ({"--reference": config.reference} if config.reference else {})
    known = [read_facts(name, None, flag) for flag, name in named.items()]
    asked = {
        "beta": config.beta,
        "loss_type": config.loss_type,
        "precision": None if config.bf16 is None else "bfloat16" if config.bf16 else "float32",
    }
    settings = as_trained(known[0], asked, {})
    bf16 = settings["precision"][0] == "bfloat16"
    models = {flag: load_classifier(name, flag) for flag, name in named.items()}
    processor, held_out = load_processor(config.model, "--model"), config.split == "test"
    images = as_numbered_by(models["--model"], load_images(data, held_out), "--model", config.model)
    if len({str(model.config.id2label) for model in models.values()}) > 1:
        raise UserError(
            f"--reference {config.reference}: its classes are not those of --model {config.model}, or have another "
            "order: name the reference that it was trained from"
        )
    rows = images[config.split]
    kept, left_out = unseen(rows.digests(), known if held_out else (), f"--dataset_name {data.dataset_name}")
    split = rows[kept]
    how = (split, processor, config.batch_size, bf16, config.test_time_views)
    logps = {flag: image_logps(model, *how) for flag, model in models.items()}
    figures = {
        "model": config.model,
        "reference": config.reference,
        "data": images.counts,
        "split": config.split,
        "left_out": left_out,
        "settings": {name: {"value": value, "from": origin} for name, (value, origin) in settings.items()},
        "test_time_views": config.test_time_views,
        **classification_figures(logps["--model"], split.labels, images.label_names),
    }
    if config.reference:
        found = classifier_metrics(logps["--model"], logps["--reference"], split.labels, loss_of(settings))
        figures["dpo"] = with_intervals(found)
    if config.output:
        write_figures(config.output, figures)
    return figures


def image_logps(
    model: ImageClassifier,
    images: Images,
    processor: ViTImageProcessor,
    batch_size: int,
    bf16: bool = False,
    test_time_views: int = 1,
) -> Tensor:
    """(N, K) log-probabilities on the CPU, in the order of the images."""
    device = PartialState().device
    network: Any = model.to(device)
    mean, std = list(processor.image_mean), list(processor.image_std)

    def logps(batch: Tensor) -> list[Tensor]:
        pixels = functional.normalize(batch.to(device, torch.float32) / 255, mean, std)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = sum(weight * network(view).logits.float() for weight, view in _views(pixels, test_time_views))
        return [logits.log_softmax(1)]

    return score_rows(logps, range(len(images)), images.pixels.__getitem__, batch_size, [network], "Scoring")[0]


def _views(images: Tensor, count: int) -> list[tuple[float, Tensor]]:
    """1, 2 or 6 views of (B, 3, H, W) images with their weights, which add up to 1."""
    if count == 1:
        return [(1.0, images)]
    if count == 2:
        return [(0.5, images), (0.5, images.flip(3))]
    height, width = images.shape[2:]
    padded = functional.pad(images, [1], padding_mode="reflect")
    moved = [padded[:, :, at : at + height, at : at + width] for at in (0, 2)]
    return [(0.25, images), (0.25, images.flip(3))] + [(0.125, v) for m in moved for v in (m, m.flip(3))]


def classification_figures(logps: Tensor, labels: Tensor, names: list[str]) -> dict[str, Any]:
    """Loss and accuracy with intervals, accuracy by class, confusion matrix, and the expected calibration error over
    bins of equal width (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
    """
    classes = len(names)
    by_class = multiclass_accuracy(logps, labels, num_classes=classes, average=None)
    counts = torch.bincount(labels, minlength=classes)
    return {
        **with_intervals(cross_entropy_metrics(logps, labels)),
        "accuracy_by_class": {
            name: float(by_class[k]) if counts[k] else None  # a class without images has no accuracy
            for k, name in enumerate(names)
        },
        # rows: true classes, columns: predictions
        "confusion_matrix": multiclass_confusion_matrix(logps, labels, num_classes=classes).tolist(),
        "calibration_error": float(
            multiclass_calibration_error(logps.exp(), labels, num_classes=classes, n_bins=CALIBRATION_BINS)
        ),
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures as tables for the terminal."""
    settings = {name: (each["value"], each["from"]) for name, each in figures["settings"].items()}
    views = figures["test_time_views"]
    head = f"on {figures['n']} {figures['split']} images" + (f", {views} views of each" if views > 1 else "")
    accuracy = [["cross-entropy", *shown(figures, "loss", 4)], *figure_rows(figures, ["accuracy"])]
    rows = [*accuracy, ["calibration error", number(figures["calibration_error"], 4), ""]]
    if "dpo" in figures:
        rows.append(["DPO loss", *shown(figures["dpo"], "loss", 4)])
        rows += figure_rows(figures["dpo"], [name for name in FIGURES if name not in figures])
    by_class = figures["accuracy_by_class"]
    classes = [
        [printable(name), number(by_class[name]), *row]
        for name, row in zip(by_class, figures["confusion_matrix"], strict=True)
    ]
    columns = ("predictions (rows: true class)", "accuracy", *map(printable, by_class))
    settings_used = describe_settings(settings, figures["left_out"])
    tables = ["", table(rows, (head, "mean", "95% interval")), "", table(classes, columns), ""]
    return "\n".join(["", f"  {figures['model']}", *settings_used, *tables])
