"""The image job, step by step: images, reference, policy, comparison, files. The recipes call the steps in order."""

from __future__ import annotations

import base64
import dataclasses
import io
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig, ImageModelConfig, parse_mode
from resdpo_trl.image.data import QUICKSTART, AugmentConfig, ImageDataConfig, LabelledImages, load_images
from resdpo_trl.image.model import (
    FAST,
    ImageClassifier,
    ImageClassifierConfig,
    as_numbered_by,
    build_classifier,
    check_architecture,
    image_processor,
    load_classifier,
    load_processor,
)
from resdpo_trl.image.trainer import ImageCrossEntropyTrainer, ImageDPOTrainer
from resdpo_trl.job import Job, describe_run, epochs, free, silent
from resdpo_trl.losses import PreferenceLoss
from resdpo_trl.metrics import classifier_metrics, cross_entropy_metrics, extremes, table, with_intervals
from resdpo_trl.run.card import write_card
from resdpo_trl.run.provenance import read_facts
from resdpo_trl.run.report import SIDE_BY_SIDE, side_by_side
from resdpo_trl.sources import SPLITS, describe_cuts, describe_left_out
from resdpo_trl.training.arguments import RunConfig, preference_loss
from resdpo_trl.training.callbacks import use_run_callbacks
from resdpo_trl.training.processes import is_sharded

FITTED_ON = 5000  # training images that the mean, the standard deviation and the whitening are computed from


class ImageRun(Job):
    """One run of cross-entropy, or of cross-entropy and DPO, in one folder."""

    def __init__(
        self,
        data: ImageDataConfig,
        model: ImageModelConfig,
        augment: AugmentConfig,
        options: RunConfig,
        training: ImageDPOConfig | ImageCrossEntropyConfig,
        before: ImageCrossEntropyConfig | None = None,
        preset: Path | None = None,
        given: Collection[str] | None = None,
    ):
        """`training` configures DPO, and `before` the reference's cross-entropy; or it is for cross-entropy alone."""
        self.data, self.model, self.augment = data, model, augment
        self.reference = training.reference if isinstance(training, ImageDPOConfig) else None  # of a finished run
        check_architecture(model.arch)
        if is_sharded():
            raise UserError(
                "FSDP and DeepSpeed are not supported for image classifiers, which fit on one GPU: use "
                "accelerate_configs/multi_gpu.yaml"
            )
        parts = {"data": data, "model": model, "augmentation": augment}
        needed = self.reference is None or getattr(training, "compare_cross_entropy", False)
        stages = {"reference": before} if before is not None and needed else {}
        super().__init__(training, options, parts, stages, preset, given)

    def say_what_runs(self) -> None:
        """Print two lines: the job and the hardware."""
        model = f"from {self.reference}" if self.reference else f"of {self.model.arch}"
        source = self.data.dataset_name
        if source == QUICKSTART:
            source = "handwritten digits (no network needed); for ResNet on CIFAR-10: --config cifar/resnet18.yaml"
        stages = "DPO" if self.reference else "cross-entropy and DPO" if self.before else "cross-entropy"
        self.say(f"{stages} {model} on {source}\n{self.hardware_line()}")

    # --- images --------------------------------------------------------------------------------------------------

    def prepare_images(self) -> LabelledImages:
        """Load the images and set up their preprocessing; check that a given reference fits both."""
        named = self.reference
        if named is None and self.resume and self.run.reference.is_dir():
            named = str(self.run.reference)
        given = load_classifier(named, "--reference") if named else None
        started = time.perf_counter()
        images = load_images(self.data)
        self.preparation_seconds = time.perf_counter() - started
        if given is not None:
            images = as_numbered_by(given, images, "--reference", str(named))
        counts = images.counts
        counts["adapted"] = self.adapt(counts["train"])
        height, width = counts["image_size"]
        if height != width:
            raise UserError(
                f"--dataset_name {self.data.dataset_name}: the images are {width}×{height}: pass --image_size "
                f"{min(height, width)}"
            )
        self.say(describe_images(counts) + describe_cuts(counts, self.data))
        if given is not None:
            assert named is not None
            self.processor = load_processor(named, "--reference")
        else:
            mean, std = self._statistics(images)
            self.processor = image_processor(height, mean, std)
        self.begin({split: images[split].fingerprint() for split in SPLITS}, counts)
        return images

    def _statistics(self, images: LabelledImages) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of values in [0, 1]; ImageNet's for pretrained weights."""
        if self.model.pretrained_weights:
            return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        some = images["train"].pixels[:FITTED_ON].float().div_(255)
        return some.mean(dim=(0, 2, 3)).tolist(), some.std(dim=(0, 2, 3)).clamp(min=1e-3).tolist()

    def _new_model(self, images: LabelledImages, seed: int) -> ImageClassifier:
        """A model with the architecture of a given reference, or else of the flags, before training."""
        names, weights = images.label_names, self.model.pretrained_weights
        if self.reference:
            config = ImageClassifierConfig.from_pretrained(str(self.run.reference))
            if config.arch != self.model.arch:
                weights = None  # they belong to --arch
        else:
            shape = dataclasses.asdict(self.model)
            del shape["pretrained_weights"]
            config = ImageClassifierConfig(
                **shape,
                image_size=images["train"].pixels.shape[2],
                id2label=dict(enumerate(names)),
                label2id={name: number for number, name in enumerate(names)},
            )
        some = None
        if config.arch == FAST:  # fits its whitening to them
            mean, std = (
                torch.tensor(values)[:, None, None] for values in (self.processor.image_mean, self.processor.image_std)
            )
            some = images["train"].pixels[:FITTED_ON].float().div_(255).sub_(mean).div_(std)
        return build_classifier(config, seed, some, weights)

    def _facts(self, args: Any, images: LabelledImages) -> dict[str, Any]:
        return self.facts(args, *(images[split].digests() for split in ("train", "validation")))

    # --- cross-entropy -------------------------------------------------------------------------------------------

    def train_cross_entropy(self, images: LabelledImages) -> None:
        """Train with cross-entropy alone, save the model to policy/, and test it once."""
        if self.past("cross_entropy", self.run.policy, self.run.summary.get("cross_entropy")):
            return
        self.run.summarize(cross_entropy=self._cross_entropy("cross_entropy", images, self.training, self.run.policy))

    def make_reference(self, images: LabelledImages) -> None:
        """Train the reference with cross-entropy, or copy a given one, into reference/."""
        if self.past("reference", self.run.reference, self.run.summary.get("reference")):
            return
        if self.reference:
            model = load_classifier(self.reference, "--reference")
            save = model.save_pretrained if self.run.main_process else silent
            facts = read_facts(self.reference, None, "--reference")
            self.publish(self.run.reference, save, self.processor, facts)
            self.run.summarize(reference={"given": self.reference})
            return
        args = self.before["reference"]
        self.run.summarize(reference=self._cross_entropy("reference", images, args, self.run.reference))

    def _cross_entropy(
        self, stage: str, images: LabelledImages, args: ImageCrossEntropyConfig, folder: Path
    ) -> dict[str, Any]:
        """Train with cross-entropy, save to `folder`, and return the figures for summary.json."""
        set_seed(args.seed)
        trainer = ImageCrossEntropyTrainer(
            model=self._new_model(images, args.seed),
            args=self.arguments(stage, args),
            train=images["train"],
            validation=images["validation"],
            processor=self.processor,
            augment=self.augment,
        )
        use_run_callbacks(trainer, self.run, stage, "cross-entropy")
        if not self.before:
            self.push_saves(trainer)
        timed = self.train(trainer, stage)
        self.publish(folder, trainer.save_model, self.processor, self._facts(args, images))
        summary: dict[str, Any] = {
            "steps": trainer.state.global_step, **epochs(trainer), **_speed(trainer, *timed),
        }  # fmt: skip
        for split in ("validation", "test"):
            if split == "validation" or stage != "reference":  # the reference is tested together with the policy
                logps = trainer.logps(images[split])
                summary[split] = with_intervals(cross_entropy_metrics(logps, images[split].labels))
        if "test" in summary:
            self.run.log(stage, "test", trainer.state.global_step, trainer.state.epoch, summary["test"])
        free(trainer)
        return summary

    # --- DPO -----------------------------------------------------------------------------------------------------

    def make_policy(self, images: LabelledImages) -> None:
        """Train the policy from the reference with DPO, save it to policy/, and test both once."""
        if self.past("dpo", self.run.policy, self.run.summary.get("dpo")):
            return
        dpo, reference = self._dpo("dpo", images, self.training, self.run.policy)
        self.run.summarize(
            dpo=dpo,
            reference=self.run.summary.get("reference", {}) | {"test": reference},
            throughput={
                "preparation_seconds": self.preparation_seconds,
                "dpo_seconds": dpo["seconds"],
                "dpo_images_per_second": dpo["images_per_second"],
            },
        )

    def compare(self, images: LabelledImages) -> None:
        """Train the --compare_modes from the same reference, and cross-entropy from scratch for the same epochs."""
        compared: dict[str, Any] = dict(self.run.summary.get("compared", {}))
        folder = self.run.path / "compared"
        if self.run.main_process and (self.training.compare_modes or self.training.compare_cross_entropy):
            folder.mkdir(exist_ok=True)
        for mode in self.training.compare_modes:
            if mode in compared:
                continue
            sampling, update = parse_mode(mode)
            args = dataclasses.replace(self.training, rejected_sampling=sampling, reference_update=update)
            name = mode.replace("/", "-")
            compared[mode], _ = self._dpo(f"dpo-{name}", images, args, folder / name)
            self.run.summarize(compared=compared)
        if self.training.compare_cross_entropy and "cross-entropy" not in compared:
            as_long = {name: getattr(self.training, name) for name in ("num_train_epochs", "max_steps")}
            args = dataclasses.replace(self.before["reference"], **as_long)
            compared["cross-entropy"] = self._cross_entropy("cross_entropy", images, args, folder / "cross_entropy")
            self.run.summarize(compared=compared)

    def _dpo(
        self, stage: str, images: LabelledImages, args: ImageDPOConfig, folder: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train with DPO, save to `folder`, and return the policy's figures and the reference's test figures."""
        set_seed(self.training.seed)
        name = str(self.run.reference)
        trainer = ImageDPOTrainer(
            model=load_classifier(name, "reference"),
            ref_model=load_classifier(name, "reference"),
            args=self.arguments(stage, args),
            train=images["train"],
            validation=images["validation"],
            processor=self.processor,
            augment=self.augment,
        )
        use_run_callbacks(trainer, self.run, stage, "DPO")
        if stage == "dpo":
            self.push_saves(trainer)
        timed = self.train(trainer, stage)
        self.publish(folder, trainer.save_model, self.processor, self._facts(args, images))
        if trainer.moves_reference:  # the figures compare with the saved reference, not with the moved one
            first = load_classifier(name, "reference").state_dict()
            trainer.accelerator.unwrap_model(trainer.ref_model).load_state_dict(first)
        loss = preference_loss(args)
        summary: dict[str, Any] = {
            "steps": trainer.state.global_step,
            **epochs(trainer),
            "beta": loss.beta,
            "loss_type": list(loss.loss_types),
            "rejected_sampling": args.rejected_sampling,
            "reference_update": args.reference_update,
            **_speed(trainer, *timed),
        }
        reference: dict[str, Any] = {}
        for split in ("validation", "test"):
            logps, ref_logps = trainer.score(images[split])
            summary[split] = with_intervals(classifier_metrics(logps, ref_logps, images[split].labels, loss))
            reference = with_intervals(cross_entropy_metrics(ref_logps, images[split].labels))
        if stage == "dpo":  # the last iteration was the test
            self._write_scores(images, logps, ref_logps, loss)
        self.run.log(stage, "test", trainer.state.global_step, trainer.state.epoch, summary["test"])
        free(trainer)
        return summary, reference

    def _write_scores(self, images: LabelledImages, logps: Tensor, ref_logps: Tensor, loss: PreferenceLoss) -> None:
        """Write each test image's mean rewards, with a thumbnail for extreme margins; keep the confusion matrices."""
        test, names = images["test"], images.label_names
        figures = classifier_metrics(logps, ref_logps, test.labels, loss)
        rows: list[dict[str, Any]] = [
            {
                "image": at,
                "label": names[int(test.labels[at])],
                "chosen_reward": figures["rewards/chosen"][at],
                "rejected_reward": figures["rewards/rejected"][at],
                "margin": figures["rewards/margins"][at],
            }
            for at in range(len(test))
        ]
        for at in extremes(figures["rewards/margins"], 12):
            rows[at]["png"] = _png(test.pixels[at])
            for name, found in (("policy", logps), ("reference", ref_logps)):
                best = int(found[at].argmax())
                rows[at][name] = [names[best], float(found[at, best].exp())]
        self.run.write_rows("scores.jsonl", rows)

    def finish(self) -> None:
        """End the run and write the model card."""
        self.end(describe_results, partial(write_card, self.run, self.run.policy, self.reference))


def _png(pixels: Tensor) -> str:
    """(3, H, W) uint8 -> a PNG of at most 64×64 pixels, base64."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((64, 64))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _speed(trainer: ImageCrossEntropyTrainer, seconds: float, first_step: int) -> dict[str, float]:
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"seconds": seconds, "images_per_second": (trainer.state.global_step - first_step) * rows / seconds}


def describe_images(counts: dict[str, Any]) -> str:
    """Lines that describe the loaded images."""
    height, width = counts["image_size"]
    lines = [
        f"images: {counts['train']} train, {counts['validation']} validation, {counts['test']} test; "
        f"{counts['classes']} classes ({_some(counts['class_names'])}), {width}×{height} pixels"
    ]
    for what, names in (
        ("no image", counts["classes_without_images"]), ("no training image", counts["classes_without_training_images"])
    ):  # fmt: skip
        if names:
            lines.append(f"{len(names)} of the data's class names have {what} ({_some(names)})")
    return "\n".join(lines) + describe_left_out(counts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def describe_results(summary: dict[str, Any]) -> str:
    """The tables at the end of a run."""
    tables = [describe_run(summary, "images")]
    if "dpo" in summary:
        tables.append(table(side_by_side(summary), SIDE_BY_SIDE))
    return "\n\n".join([*tables, ""])
