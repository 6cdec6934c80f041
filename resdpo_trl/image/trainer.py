"""Trainers for images in memory: cross-entropy, and DPO with this project's loss.

The data loader yields image numbers. The images are on the device as uint8. A step gathers its images, augments and
normalizes them there. It reads no figure back, so that no step waits for the device.

An image goes from its file to its loss through four files: `data` (decoding, splits, augmentation), `model` (logits),
this one (log-probabilities, rejected classes) and `resdpo_trl.losses`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional
from transformers import ViTImageProcessor
from trl.trainer.utils import disable_dropout_in_model

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig
from resdpo_trl.image.data import Augmentation, AugmentConfig, Images, hash_seed
from resdpo_trl.image.model import ImageClassifier, share_statistics
from resdpo_trl.image.muon import with_muon
from resdpo_trl.losses import LogProbs, PreferenceLoss, classifier_pairs, wrong_classes
from resdpo_trl.metrics import classifier_metrics, training_figures
from resdpo_trl.scorer import score_rows
from resdpo_trl.training.arguments import preference_loss
from resdpo_trl.training.processes import mean_over_processes, own_rows
from resdpo_trl.training.trainer import RunTrainer


class EpochSampler(Sampler[int]):
    """A permutation of `count` numbers per epoch, drawn from seed and epoch. It is the same on every process.

    The Trainer calls `set_epoch` of its loader's sampler, often more than once per epoch, and so does
    `resdpo_trl.training.trainer`. This sampler passes a new epoch to all other objects that draw once per epoch.

    Args:
        count: the number of images.
        seed: determines the order, together with the epoch.
        others: objects with a `set_epoch` method that have already drawn epoch 0.
    """

    def __init__(self, count: int, seed: int, others: list[Any]):
        self.count, self.seed, self.others, self.epoch = count, seed, others, 0

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch = epoch
        for other in self.others:
            other.set_epoch(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch, "order"))
        return iter(torch.randperm(self.count, generator=generator).tolist())


class RejectedClasses:
    """Draws rejected classes, to make preference pairs from labels. The true class is chosen. The rejected class is

        random    any of the K classes; a pair whose rejected class is the true one has no signal and is masked
        uniform   any of the K−1 wrong classes, with equal probability
        hard      a wrong class, drawn with the reference's probabilities renormalized over the wrong classes
        all       every wrong class at once: the exact expectation of `uniform`, without sampling

    A draw depends only on (seed, epoch, image) and, for `hard`, on the reference.

    Args:
        sampling: one of `SAMPLING`.
        labels: (N,) true classes of the training images.
        classes: K.
        seed: determines the draw, together with the epoch and the image's number.
    """

    def __init__(self, sampling: str, labels: Tensor, classes: int, seed: int):
        self.sampling, self.labels, self.classes, self.seed = sampling, labels, classes, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch, "rejected"))
        self._uniform = torch.rand(len(self.labels), generator=generator).to(self.labels.device)

    def __call__(self, index: Tensor, ref_logps: Tensor) -> Tensor:
        """(B, T) rejected classes of the images numbered `index` (B,), given `ref_logps` (B, K) under the reference.

        T is K−1 for `all` and 1 otherwise.
        """
        labels, draw = self.labels[index], self._uniform[index]
        wrong = wrong_classes(labels, self.classes)
        if self.sampling == "all":
            return wrong
        if self.sampling == "random":
            return (draw * self.classes).long().clamp(max=self.classes - 1)[:, None]
        if self.sampling == "uniform":
            place = (draw * (self.classes - 1)).long()
        else:  # hard: inverse transform sampling with the image's draw
            place = (ref_logps.gather(1, wrong).softmax(1).cumsum(1) <= draw[:, None]).sum(1)
        return wrong.gather(1, place.clamp(max=self.classes - 2)[:, None])


class ImageCrossEntropyTrainer(RunTrainer):
    """Cross-entropy on images in memory.

    Args:
        model: the classifier.
        args: its options.
        train: training images.
        validation: images that `evaluate` uses, without augmentation.
        processor: its mean and standard deviation normalize the images.
        augment: augmentation of the training images.

    Raises:
        UserError: there are too few images for a batch, or they are too small for the crop.

    On several GPUs the batch norms use the statistics of the global batch (SyncBatchNorm). torch has no SyncBatchNorm
    for the CPU: there, each process uses the statistics of its own images, and those of the main process are saved.
    """

    def __init__(
        self,
        model: ImageClassifier,
        args: ImageCrossEntropyConfig | ImageDPOConfig,
        train: Images,
        validation: Images | None,
        processor: ViTImageProcessor,
        augment: AugmentConfig,
    ):
        _check_images(train, args, augment)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        if args.world_size > 1 and args.device.type == "cuda":
            share_statistics(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=range(len(train)),
            eval_dataset=validation,
            data_collator=_number,
        )
        self.model_accepts_loss_kwargs = False
        seed = args.seed if args.data_seed is None else args.data_seed
        device = self.accelerator.device
        self.train_images = Images(train.pixels.to(device), train.labels.to(device))
        self.mean, self.std = list(processor.image_mean), list(processor.image_std)
        self.augmentation = Augmentation(augment, len(train), seed, device)
        self._sampler = EpochSampler(len(train), seed, [self.augmentation])

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels of 0 to 255 -> normalized float32 in the memory order of the model."""
        images = functional.normalize(pixels.to(torch.float32) / 255, self.mean, self.std)
        return images.contiguous(memory_format=torch.channels_last) if self.args.channels_last else images

    def batch(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A training step's augmented, normalized images and their labels."""
        index = inputs["index"]
        images = self.augmentation(self.train_images.pixels[index], index)
        return self.normalize(images), self.train_images.labels[index]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        images, labels = self.batch(inputs)
        logits = model(images).logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.args.label_smoothing_factor)
        self.means.add({"accuracy": own_rows(inputs, logits.detach().argmax(1) == labels)})
        return mean_over_processes(inputs, own_rows(inputs, losses))

    def logps(self, images: Images, description: str = "Scoring") -> Tensor:
        """(N, K) log-probabilities of every image's classes, on the CPU, in the order of the images."""
        return self._logps_under([self.model_wrapped], images, description)[0]

    def _logps_under(self, models: list[Any], images: Images, description: str) -> list[Tensor]:
        def of_batch(pixels: Tensor) -> list[Tensor]:
            with self.accelerator.autocast():
                normalized = self.normalize(pixels.to(self.accelerator.device))
                return [_logps(model, normalized) for model in models]

        rows, batch_size = range(len(images)), self.args.per_device_eval_batch_size
        return score_rows(of_batch, rows, images.pixels.__getitem__, batch_size, models, description)

    def figures(self, rows: Images, description: str) -> dict[str, float]:
        logps = self.logps(rows, description)
        accuracy = (logps.argmax(1) == rows.labels).double().mean()
        return {"loss": float(F.nll_loss(logps.double(), rows.labels)), "accuracy": float(accuracy)}

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weights of convolutions and linear layers decay; biases and norms do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """`--optim` with a separate rate for biases and norms, and with Muon for convolutions if it is enabled."""
        created = self.optimizer is None
        if created and self.args.muon_learning_rate:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer_cls_and_kwargs = with_muon(kind), options
        optimizer = super().create_optimizer(model)
        if created:
            decaying, biases = optimizer.param_groups
            biases["lr"] *= self.args.bias_learning_rate_scale
            if self.args.muon_learning_rate:
                filters = [weight for weight in decaying["params"] if weight.ndim == 4]
                decaying["params"] = [weight for weight in decaying["params"] if weight.ndim != 4]
                optimizer.add_param_group({"params": filters, "lr": self.args.muon_learning_rate, "muon": True})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler


class ImageDPOTrainer(ImageCrossEntropyTrainer):
    """DPO for classifiers: the true class is preferred to wrong classes. Evaluation does not sample.

    In a step, policy and reference see the same augmented images. The reference runs without gradient in eval mode, so
    that its batch norms do not change. The rejected classes are those of `RejectedClasses`; with `all` the loss of an
    image is the mean over the K−1 wrong classes. Evaluation always uses every wrong class, without augmentation: it
    averages over the wrong classes of an image, then over images.

    Args:
        model: the policy.
        ref_model: the reference; `args.reference_update` may change it in place.
        args, train, validation, processor, augment: as for `ImageCrossEntropyTrainer`.
    """

    def __init__(
        self,
        model: ImageClassifier,
        ref_model: ImageClassifier,
        args: ImageDPOConfig,
        train: Images,
        validation: Images | None,
        processor: ViTImageProcessor,
        augment: AugmentConfig,
    ):
        self.preference_loss: PreferenceLoss = preference_loss(args)
        self.ref_model: Any = ref_model
        if args.disable_dropout:
            for each in (model, ref_model):
                disable_dropout_in_model(each)
        super().__init__(model, args, train, validation, processor, augment)
        if args.channels_last:
            ref_model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        ref_model.requires_grad_(False).eval()
        self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        seed = args.seed if args.data_seed is None else args.data_seed
        labels, classes = self.train_images.labels, int(model.config.num_labels or 0)
        self.rejected = RejectedClasses(args.rejected_sampling, labels, classes, seed)
        self._sampler.others.append(self.rejected)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        images, labels = self.batch(inputs)
        with torch.no_grad():
            ref_logps = _logps(self.ref_model, images)
        logps = _logps(model, images)
        rejected = self.rejected(inputs["index"], ref_logps)
        logps, ref_logps, labels, rejected = (
            own_rows(inputs, values) for values in (logps, ref_logps, labels, rejected)
        )
        pairs = classifier_pairs(logps, ref_logps, labels, rejected)
        signal = rejected != labels[:, None]
        if self.args.rejected_sampling == "random":
            # a "pair" of the true class with itself has a constant loss
            kept = signal[:, 0]
            everywhere = self.accelerator.reduce(kept.sum().float(), "mean") if self.args.world_size > 1 else kept.sum()
            loss = self.preference_loss(_select(pairs, kept)).sum() / everywhere.clamp(min=1 / self.args.world_size)
        else:
            loss = mean_over_processes(inputs, self.preference_loss(pairs))
        self._note(pairs, logps.detach(), ref_logps, labels, signal)
        return loss

    def score(self, images: Images, description: str = "Scoring") -> tuple[Tensor, Tensor]:
        """(N, K) log-probabilities under policy and reference, on the CPU, in the order of the images."""
        policy, reference = self._logps_under([self.model_wrapped, self.ref_model], images, description)
        return policy, reference

    def figures(self, rows: Images, description: str) -> dict[str, float]:
        figures = classifier_metrics(*self.score(rows, description), rows.labels, self.preference_loss)
        return {name: float(values.mean()) for name, values in figures.items()}

    def _note(self, pairs: LogProbs, logps: Tensor, ref_logps: Tensor, labels: Tensor, signal: Tensor) -> None:
        """Keep this step's figures for `log`: means over an image's pairs, then over images.

        Masked pairs count as zero here, and `step_figures` divides by the share of the other pairs.
        """
        figures = training_figures(pairs, self.preference_loss)
        self.means.add(
            {name: value.float().where(signal, 0.0).mean(1) for name, value in figures.items()}
            | {
                "accuracy": logps.argmax(1) == labels,
                "kl": (logps.exp() * (logps - ref_logps)).sum(1),
                "masked_pairs": (~signal).float().mean(1),
            }
        )

    def step_figures(self) -> dict[str, float]:
        """Average the figures of pairs over the pairs that are not masked; omit them if all pairs are masked."""
        means = super().step_figures()
        share = 1 - means.get("masked_pairs", 0.0)
        of_images = ("accuracy", "kl", "masked_pairs")
        return {
            name: value if name in of_images else value / share
            for name, value in means.items()
            if name in of_images or share > 0
        }


def _check_images(train: Images, args: Any, augment: AugmentConfig) -> None:
    """Raise a UserError if the training images do not fill a batch, or can't be cropped as asked."""
    rows = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < rows:
        processes = f" on each of {args.world_size} processes" if args.world_size > 1 else ""
        raise UserError(
            f"--per_device_train_batch_size {args.per_device_train_batch_size}{processes}: {len(train)} training "
            "images do not fill a batch: lower it, or pass --dataloader_drop_last false"
        )
    height, width = train.pixels.shape[2:]
    if augment.crop_padding >= min(height, width):  # more can't be reflected
        raise UserError(
            f"--crop_padding {augment.crop_padding}: must be below the images' size of {width}×{height} pixels"
        )


def _logps(model: Any, images: Tensor) -> Tensor:
    """(B, K) float32 log-probabilities."""
    return model(images).logits.float().log_softmax(1)


def _number(index: list[int]) -> dict[str, Tensor]:
    return {"index": torch.tensor(index)}


def _select(pairs: LogProbs, kept: Tensor) -> LogProbs:
    return LogProbs(pairs.chosen[kept], pairs.rejected[kept], pairs.ref_chosen[kept], pairs.ref_rejected[kept])
